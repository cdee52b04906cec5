"""Whatever one process of a pipeline does or suffers, all end with one error, or refuse the call and go on."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from failing_scenes import Net, batch
from hosts import lack
from launcher import Cut, Ended, Hurt, Launcher, report
from long import LONG


def one_error(ended: list[Ended], *but: int) -> str:
    """The text of the error that all ranks but these have raised."""
    found = [each for each in ended if each.rank not in but]
    assert {each.error for each in found} == {"RankError"}, report(ended)
    assert len({each.text for each in found}) == 1, report(ended)
    return found[0].text


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (8, "ranks 0 and 1 do not make the same call: the values of their inputs differ"),
        (5, "with inputs of sizes [5, 10]; all ranks"),
    ],
)
def test_other_batches_are_refused_and_the_next_call_works(launcher: Launcher, rows: int, says: str) -> None:
    found = launcher.returned("failing_scenes:other_batches", 2, rows=rows)
    for text, before, after in found:
        assert says in text
        assert "all ranks of a pipeline must make the same calls on the same batches" in text
        assert before == after
    assert found[0] == found[1]


def test_other_batches_of_one_part_are_refused(launcher: Launcher) -> None:
    found = launcher.returned("failing_scenes:other_batches", 4, rows=8, parts=2)
    for text, before, after in found:
        assert "do not make the same call: the values of their inputs differ" in text
        assert before == after


def test_one_more_call_in_a_part_is_refused_when_the_others_close(launcher: Launcher) -> None:
    ended = launcher.run("failing_scenes:one_more_call", 4)
    errors = {each.error for each in ended}  # a rank that is late hears of it from one that has ended
    assert "InputError" in errors <= {"InputError", "RankError"}, report(ended)
    assert all("to close the pipeline, and rank 2 at call " in each.text for each in ended), report(ended)


def test_other_models_are_refused(launcher: Launcher) -> None:
    ended = launcher.run("failing_scenes:other_model", 3)
    assert {each.error for each in ended} == {"InputError"}, report(ended)
    (text,) = {each.text for each in ended}
    assert text.startswith("the graph of the model of ranks 1, 2 differs from that of rank 0")


@pytest.fixture(scope="module")
def misuses(launcher: Launcher) -> list[Any]:
    return launcher.returned("failing_scenes:misuses", 2)


def test_other_settings_are_refused(misuses: list[Any]) -> None:
    one, two = (each["other_settings"] for each in misuses)
    assert one == two
    said = [
        "compile() got schedule='1f1b' in rank 0, and schedule='gpipe' in rank 1; pass the same options",
        "compile() got search_seconds=6.0 in rank 0, and search_seconds=5.0 in rank 1",
        "loss_fn=torch.nn.functional.mse_loss in rank 0, and loss_fn=torch.nn.functional.l1_loss in rank 1",
        "the graph of the model of rank 1 differs from that of rank 0",
        "a call of a new kind, in training with gradients on, with inputs x: float32 [7, 10]",
        "a tensor that forward reads and that is neither a parameter nor a buffer (_constant0: [1, 10]) of rank 1",
        "compile() got costs='measure' in rank 0, and costs='count' in rank 1",
    ]
    for words, text in zip(said, one, strict=True):
        assert words in text


def test_other_backwards_are_refused_at_the_next_call(misuses: list[Any]) -> None:
    one, two = (each["other_backwards"] for each in misuses)
    assert one == two
    assert len(one) == 2
    assert one[0].count(", after the backward of call ") == 1
    assert one[1].count(" with the gradient 1, ") == one[1].count(" with the gradient 2;") == 1


def test_a_step_or_a_clearing_of_one_process_alone_is_told(misuses: list[Any]) -> None:
    one, two = (each["other_steps"] for each in misuses)
    assert one == two
    (stepped,), (cleared,), accumulated, frozen = one
    assert stepped.startswith("rank 0 has stepped parameters since the last call, but rank 1 has not, though it has")
    assert cleared.startswith("rank 0 has cleared its gradients since the last call, but rank 1 has kept its own")
    assert accumulated == frozen == []


def test_an_output_that_is_elsewhere_says_so(misuses: list[Any]) -> None:
    one, two = (each["reads_an_output"] for each in misuses)
    assert not two  # which has it
    uses = {"item", "branch", "format", "write", "part", "numpy", "mask", "regularized", "copied", "kept"}
    assert set(one) == uses | {"own backward"}
    for text in one.values():
        assert "pass outputs='all' to compile()" in text


def test_optimizers_that_see_one_process_only_are_refused(misuses: list[Any]) -> None:
    for lbfgs, scaler, states, hooks in (each["other_optimizers"] for each in misuses):
        assert states == "states: 0"  # which a checkpoint could not name
        assert hooks == "hooks: 1, closed: 0"
        assert "LBFGS computes its step from all parameters at once" in lbfgs
        assert "use scaler = pipe.pipeline.grad_scaler()" in scaler


def test_pipelines_that_are_called_in_other_orders(launcher: Launcher) -> None:
    ended = launcher.run("failing_scenes:crossing", 2)
    assert {each.error for each in ended} == {"RankError"}, report(ended)
    for each in ended:
        assert "of another pipeline, so neither can go on" in each.text, report(ended)
        assert "must call their pipelines in the same order" in each.text


def test_a_rank_that_saves_alone_and_one_that_waits_for_it_in_a_barrier(launcher: Launcher, tmp_path: Path) -> None:
    text = one_error(launcher.run("failing_scenes:saves_alone", 2, folder=str(tmp_path)))
    assert (
        f"save to '{tmp_path}/step_1', while rank 1 waits in torch.distributed.barrier() at failing_scenes.py:" in text
    )
    assert "so neither can go on; all processes must make the same calls of the pipeline, save() and close()" in text


def test_pipelines_of_other_processes_and_groups_of_the_script_are_left_alone(launcher: Launcher) -> None:
    found = launcher.returned("failing_scenes:rows_of_a_mesh", 4)
    expected = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        expected.append(Net()(batch()).item())
    for rank, (said, losses) in enumerate(found):
        row = rank // 2
        assert said == ("'of the second row'" if row else "")
        assert losses == pytest.approx([expected[row]] * (2 + row) + [expected[0]], rel=1e-5)


def test_a_wrapper_of_whole_models_is_refused_before_it_aborts_the_process(launcher: Launcher) -> None:
    one, two = launcher.returned("failing_scenes:wrapped", 2)
    assert one == two
    assert "each process of this pipeline has those of its own stage; leave it out" in one


def test_a_rank_that_makes_no_call_is_not_waited_for_for_ever(launcher: Launcher) -> None:
    text = one_error(launcher.run("failing_scenes:no_call", 2))
    assert "waited 0.5 s in call" in text
    assert "makes no call" in text


@pytest.mark.parametrize(("at", "backward", "where"), [(2, False, "1F1"), (6, False, "1F1"), (3, True, "1B2")])
def test_an_exception_in_a_stage_is_the_error_of_all(launcher: Launcher, at: int, backward: bool, where: str) -> None:
    ended = launcher.run("failing_scenes:raises", 2, at=at, backward=backward)
    text = one_error(ended)
    assert text.startswith("rank 1 (host ")
    assert f"ExecutionError: stage 1, {where}: " in text
    assert "ValueError: the model's own" in text
    assert "failing_scenes.py" in text


@pytest.mark.parametrize("backward", [True, False])
def test_nan_is_the_error_of_all_in_anomaly_mode(launcher: Launcher, backward: bool) -> None:
    ended = launcher.run("failing_scenes:makes_nan", 2, rank=0, backward=backward)
    text, where = one_error(ended), "module 'layers.0.1', "
    if backward:
        assert text.startswith("rank 0 (host ")
        assert "ExecutionError: stage 0, 0B0: " in text
        assert f"it is the backward of {where}" in text
    else:  # which reaches the backward of another stage, and a warning says where it was made
        assert text.startswith("rank 1 (host ")
        assert "stage 1, 1B0: " in text
        assert "had received NaN" in text
        assert f"UserWarning: stage 0: the forward makes NaN, by log in {where}" in ended[0].output
    assert "failing_scenes.py:" in text


@pytest.mark.parametrize(("rank", "size", "parts"), [(0, 3, 1), (1, 3, 1), (2, 4, 2)])
def test_a_rank_that_is_killed(launcher: Launcher, rank: int, size: int, parts: int) -> None:
    hurt = Hurt(rank, signal.SIGKILL, at="training")
    ended = launcher.run("failing_scenes:trains_on", size, hurt=hurt, parts=parts)
    assert one_error(ended, rank).startswith(f"rank {rank}")


@pytest.mark.skipif(bool(lack()), reason=lack() or "hosts can be cut off")
@pytest.mark.parametrize(("size", "how"), [(3, "drop"), (3, "down")] if LONG else [(3, "drop")])
def test_a_host_that_is_cut_off(launcher: Launcher, size: int, how: str) -> None:
    ended = launcher.run("failing_scenes:trains_on", size, hurt=Cut(1, how, at="training"))
    assert one_error(ended, 1).startswith("rank 1 (host host1): gave no sign for 4 s: it was stopped or killed, or is ")
    assert "the store of the process group does not answer" in one_error(ended, 0, 2)
    assert "or this host is cut off" in ended[1].text


def test_a_rank_that_stops(launcher: Launcher) -> None:
    ended = launcher.run("failing_scenes:trains_on", 3, hurt=Hurt(1, signal.SIGSTOP, at="training"))
    assert one_error(ended).startswith("rank 1")  # of the one that stopped, when it goes on, too


def test_an_exception_between_calls_is_told_to_the_others(launcher: Launcher) -> None:
    ended = launcher.run("failing_scenes:raises_between", 3)
    assert ended[1].error == "KeyError", report(ended)
    assert "KeyError: 'data'" in one_error(ended, 1)


def test_a_call_after_a_failure_says_the_same(launcher: Launcher) -> None:
    ended = launcher.run("failing_scenes:after_a_failure", 2)
    assert all(each.result for each in ended), report(ended)
    said = {text for each in ended for text in each.result}
    assert len(said) == 1
    assert "the model's own" in said.pop()


def test_models_of_other_weights_are_refused(launcher: Launcher) -> None:
    ended = launcher.run("failing_scenes:other_seed", 2)
    assert {each.error for each in ended} == {"InputError"}, report(ended)
    (text,) = {each.text for each in ended}
    assert text.startswith("'layers.0.0.weight' of rank 1 differs from that of rank 0")
    assert "set the same seed" in text


@pytest.mark.parametrize(
    ("which", "says"),
    [
        ("module", "a call of capture "),
        ("gradients", "with gradients off"),
        ("anomaly", "a call of capture 1 with gradients on, anomaly detection"),
    ],
)
def test_ranks_in_other_modes_are_refused_and_the_next_call_works(launcher: Launcher, which: str, says: str) -> None:
    found = launcher.returned("failing_scenes:other_modes", 2, which=which)
    for text, _, _ in found:
        assert "ranks 0 and 1 do not make the same call" in text
        assert says in text
    assert found[0] == found[1]


def test_what_processes_cannot_do_is_refused_by_all(launcher: Launcher) -> None:
    found = launcher.returned("failing_scenes:refused", 2)
    words = {
        "replicas": "replicas=(2,) does not work with mesh=",
        "verify": "verify=3 does not work with mesh=",
        "input": "argument 'x' requires a gradient",
        "names": "mesh= has the dimensions ('rows',)",
        "both": "give one of them",
        "replan": "but got optimizer=None",
        "load": "load the weights before compile(), or use pipecompile.load()",
        "early": "pass example_inputs= to compile()",
    }
    for said in found:
        assert said.keys() == words.keys()
        for name, part in words.items():
            assert part in said[name]


def test_tools_see_what_a_rank_has_and_nothing_that_it_has_not(launcher: Launcher) -> None:
    one, two = launcher.returned("failing_scenes:shares", 2)
    everywhere = {"layers.4.num_batches_tracked"}  # counts calls, which all ranks make
    assert set(one["of the pipe"]) & set(two["of the pipe"]) == everywhere
    assert sorted({*one["of the pipe"], *two["of the pipe"]}) == sorted(one["all"])
    for found in (one, two):
        assert found["of the pipe"] == found["of the model"] == found["of a part"]
        assert found["as before"]
        assert found["warned once"]
        assert found["asked"] <= 1  # for all modules
        assert {name.removeprefix("of.") for name in found["names"]} < set(found["of the pipe"]) | {"layers"}
        assert found["names"]
    assert max(one["held"], two["held"]) < one["bytes"] < one["held"] + two["held"]  # and one number of each other
