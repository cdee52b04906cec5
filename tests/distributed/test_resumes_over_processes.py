"""A training over several processes is saved, killed, and goes on: on as many, on fewer, in threads, unsplit."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
from launcher import Hurt, Launcher, report
from resumed import Net, batch, begun, on

import pipecompile


@pytest.fixture(scope="module")
def saved(launcher: Launcher, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of four processes after three steps, and what they went on to."""
    folder = tmp_path_factory.mktemp("saved")
    found = launcher.returned("checkpoint_scenes:saves", 4, folder=str(folder / "step_3"), asynchronous=True)
    torch.save(found, folder / "found.pt")
    return folder


def went_on(folder: Path) -> tuple[dict[int, float], dict[str, torch.Tensor]]:
    """The losses of steps 3 to 5, and the weights after them, of the four processes that saved."""
    found = torch.load(folder / "found.pt", weights_only=True)
    losses = found[0][0]
    assert all(each == losses for each, _ in found)
    return {step: losses[step] for step in (3, 4, 5)}, {n: t for _, weights in found for n, t in weights.items()}


@pytest.mark.parametrize(("size", "called"), [(4, False), (2, True), (3, False)])
def test_processes_go_on_bit_for_bit(launcher: Launcher, saved: Path, size: int, called: bool) -> None:
    folder = str(saved / "step_3")
    found = launcher.returned("checkpoint_scenes:loads", size, folder=folder, steps=3, called=called)
    losses, weights = went_on(saved)
    assert [each for each, _ in found] == [losses] * size
    own = {name: tensor for _, part in found for name, tensor in part.items()}
    assert own.keys() == weights.keys() == Net().state_dict().keys()
    assert [name for name, tensor in weights.items() if not torch.equal(own[name], tensor)] == []


@pytest.mark.parametrize("shard", [False, True])
def test_two_parts_of_each_batch_go_on_and_are_saved(launcher: Launcher, saved: Path, shard: bool) -> None:
    """To rounding, since parts are summed in another order; the running statistics are deferred."""
    found = launcher.returned("checkpoint_scenes:two_parts", 4, folder=str(saved / "step_3"), shard=shard)
    losses, weights = went_on(saved)
    trained = {name for name in weights if "running" not in name}
    assert {name for _, part in found for name in part} == weights.keys()
    for each, part in found:
        assert each == pytest.approx(losses, rel=1e-4)
        for name in trained & part.keys():
            torch.testing.assert_close(part[name], weights[name], rtol=1e-3, atol=1e-5)
    resumed = begun(seed=1, **on(2)).load(saved / f"step_3_and_1{'_shards' * shard}").run(2)
    assert resumed.losses == pytest.approx({step: losses[step] for step in (4, 5)}, rel=1e-4)


def test_threads_go_on_bit_for_bit(saved: Path) -> None:
    resumed = begun(seed=1, **on(2)).load(saved / "step_3").run(3)
    losses, weights = went_on(saved)
    assert resumed.losses == losses
    found = resumed.weights
    assert [name for name, tensor in weights.items() if not torch.equal(found[name], tensor)] == []


def test_a_checkpoint_of_threads_goes_on_over_processes(launcher: Launcher, tmp_path: Path) -> None:
    straight = begun(**on(3)).run(3)
    straight.save(tmp_path / "step_3")
    straight.run(3)
    found = launcher.returned("checkpoint_scenes:loads", 2, folder=str(tmp_path / "step_3"), steps=3, called=False)
    assert [each for each, _ in found] == [{step: straight.losses[step] for step in (3, 4, 5)}] * 2


def test_the_first_call_after_a_load_may_be_an_evaluation(launcher: Launcher, saved: Path) -> None:
    folder = str(saved / "step_3")
    found = launcher.returned("checkpoint_scenes:evaluates_after_a_load", 4, folder=folder)
    unsplit = begun(seed=1).load(folder).pipe.eval()
    with torch.no_grad():
        expected = unsplit(batch(0)).item()
    assert found == pytest.approx([expected] * 4, rel=1e-6)
    assert len(set(found)) == 1


def test_the_stages_own_optimizers_go_on(launcher: Launcher, tmp_path: Path) -> None:
    found = launcher.returned("checkpoint_scenes:flushed", 2, folder=str(tmp_path / "flushed"))
    assert all(len(each) > 3 and all(each) for each in found), found


def test_a_process_without_a_stage(launcher: Launcher, tmp_path: Path) -> None:
    one, two = launcher.returned("checkpoint_scenes:without_a_stage", 2, folder=str(tmp_path / "step_2"))
    assert one[0] == two[0]
    assert len(one[1]) > 10


def test_processes_export_together(launcher: Launcher, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    launcher.returned("checkpoint_scenes:exports", 3, folder=str(tmp_path / "out"))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted({*index["weight_map"].values()})
    assert len(files) > 3
    found = {name: tensor for file in files for name, tensor in load_file(tmp_path / "out" / file).items()}
    expected = begun(**on(3)).run(2).weights
    assert found.keys() == expected.keys() - {"head.weight"} == index["weight_map"].keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_misuse_is_refused_in_all_processes_and_the_next_save_works(launcher: Launcher, tmp_path: Path) -> None:
    one, two = launcher.returned("checkpoint_scenes:refused", 2, folder=str(tmp_path))
    of_one, of_two = one.pop("the model"), two.pop("the model")
    assert "pass the pipe itself" in of_one[1]
    assert "pass the pipe itself" in of_two[1]
    assert one == two
    expected = {
        "exists": ("InputError", "exists, and is not overwritten"),
        "one saves": ("InputError", "do not make the same call"),
        "other names": ("InputError", "do not make the same call"),
        "absent": ("InputError", "does not exist; pass the folder that save() was given"),
        "full": ("CheckpointError", "rank 1: OSError: [Errno 28] No space left on device"),
        "full in the background": ("CheckpointError", "rank 1: OSError: [Errno 28] No space left on device"),
        "after that": ("CheckpointError", "rank 1: OSError: [Errno 28] No space left on device"),
    }
    assert {name: kind for name, (kind, _) in one.items()} == {name: kind for name, (kind, _) in expected.items()}
    assert [name for name, (_, text) in expected.items() if text not in one[name][1]] == []
    assert sorted(each.name for each in tmp_path.iterdir()) == ["step_1", "step_5"]


def test_a_pipe_that_is_not_split_yet_is_refused(launcher: Launcher, tmp_path: Path) -> None:
    found = launcher.returned("checkpoint_scenes:early", 2, folder=str(tmp_path / "early"))
    assert len(set(found)) == 1
    assert "not known before the model is split; pass example_inputs=" in found[0]
    assert list(tmp_path.iterdir()) == []


def test_a_rank_that_is_killed_while_it_writes_leaves_the_last_checkpoint(launcher: Launcher, tmp_path: Path) -> None:
    hurt = Hurt(1, signal.SIGKILL, at="writing")
    ended = launcher.run("checkpoint_scenes:killed_while_it_writes", 3, hurt=hurt, folder=str(tmp_path))
    assert [each.error for each in ended] == ["RankError", None, "RankError"], report(ended)
    assert ended[0].text == ended[2].text
    assert pipecompile.latest(tmp_path) == tmp_path / "step_1"
    assert [each.name for each in tmp_path.iterdir() if not each.name.startswith(".")] == ["step_1"]


@pytest.mark.parametrize(("after", "victims"), [(10.3, [1]), (21.6, [0, 1])])
def test_a_training_that_is_killed_has_the_losses_of_one_that_is_not(
    launcher: Launcher, tmp_path: Path, after: float, victims: list[int]
) -> None:
    options = {"folder": str(tmp_path), "steps": 40, "every": 2}
    ended = launcher.run("checkpoint_scenes:trains", 2, after=after, victims=victims, **options)
    assert [each.code == -signal.SIGKILL for each in ended] == [rank in victims for rank in range(2)], report(ended)
    launcher.returned("checkpoint_scenes:trains", 2, after=0.0, victims=[], **options)
    notes = [json.loads(line) for line in (tmp_path / "losses.jsonl").read_text().splitlines()]
    expected = begun(**on(2)).run(40).losses
    assert {step for step, _ in notes} == set(range(40))
    assert [step for step, loss in notes if float.fromhex(loss) != expected[step]] == []
