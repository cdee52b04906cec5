"""Parts of a batch in several pipelines train as the unsplit model does on the whole batch."""

from __future__ import annotations

from pathlib import Path

import pytest
from launcher import Launcher
from long import LONG

ALIKE = [
    ("contrastive", (4, 3)),
    ("dropping", (4, 4)),
]
MORE = [
    ("ragged", (5, 3)),
    ("gpt2", (4, 4)),
    ("t5", (4, 4)),
    ("two_towers", (2, 6)),
    ("mixtral", (4, 4)),
    ("skip_to_loss", (3, 4)),
    ("buffers_in_place", (4, 4)),
    ("sundry", (8, 8)),
]
SEVERAL_STAGES = ["bfs", "interleaved-1f1b", "interleaved-zb", "v-half", "v-min", "dualpipe-v", "zb-h1", "zb-h2"]
DIVIDED = [("dropping", (4, 4), {"bucket": 1000})]  # large parameters travel alone, small ones together
MORE_DIVIDED = [
    ("dropping", (4, 4), {}),
    ("gpt2", (4, 4), {"accumulate": 2}),
    ("contrastive", (4, 3), {}),
    ("skip_to_loss", (3, 4), {}),
    ("mixtral", (4, 4), {}),
    ("dropping", (4, 4), {"plan": {"recompute": "always"}}),
    ("dropping", (4, 4), {"stage_compile": "aot_eager"}),
]


@pytest.mark.parametrize(("name", "sizes"), ALIKE + MORE if LONG else ALIKE)
def test_two_parts_train_as_the_unsplit_model(launcher: Launcher, name: str, sizes: tuple[int, ...]) -> None:
    found = launcher.returned("data_scenes:train", 4, name=name, sizes=sizes)
    assert found == [[]] * 4


@pytest.mark.parametrize("schedule", ["zb-v", *SEVERAL_STAGES] if LONG else ["zb-v"])
@pytest.mark.parametrize("shard", [False, True] if LONG else [True])
def test_two_parts_of_ranks_with_several_stages_train_as_the_unsplit_model(
    launcher: Launcher, schedule: str, shard: bool
) -> None:
    options = {"name": "ragged", "sizes": (5, 3), "schedule": schedule, "shard": shard}
    assert launcher.returned("data_scenes:train", 4, **options) == [[]] * 4


@pytest.mark.parametrize(("parts", "sizes"), [(1, (16,)), (2, (8, 8)), (2, (8, 4))] if LONG else [(2, (8, 4))])
def test_all_processes_take_the_number_that_auto_chooses(
    launcher: Launcher, parts: int, sizes: tuple[int, ...]
) -> None:
    most = launcher.returned("data_scenes:chosen", 2 * parts, parts=parts, sizes=sizes, per_call=0.0)
    least = launcher.returned("data_scenes:chosen", 2 * parts, parts=parts, sizes=sizes, per_call=0.5)
    for found in (most, least):
        assert [odd for *_, odd in found] == [[]] * 2 * parts
        assert len({(schedule, count, tuple(said)) for schedule, count, said, _ in found}) == 1
        assert any("not planned with" in line for line in found[0][2])
    assert most[0][1] > least[0][1]
    assert least[0][1] < 4


def test_calls_accumulate_and_the_optimizers_state_is_sharded(launcher: Launcher) -> None:
    options = {"name": "ragged", "sizes": (3, 2), "accumulate": 2, "zero": True}
    assert launcher.returned("data_scenes:train", 4, **options) == [[]] * 4


def test_divided_parameters_train_as_the_unsplit_model(launcher: Launcher) -> None:
    options = {"name": "ragged", "sizes": (5, 3), "accumulate": 2, "shard": True}
    assert launcher.returned("data_scenes:train", 4, **options) == [[]] * 4


@pytest.mark.parametrize(("name", "sizes", "options"), DIVIDED + MORE_DIVIDED if LONG else DIVIDED)
def test_divided_parameters_train_bit_for_bit_as_whole_ones(
    launcher: Launcher, name: str, sizes: tuple[int, ...], options: dict[str, object]
) -> None:
    found = launcher.returned("data_scenes:sharded", 4, name=name, sizes=sizes, **options)
    assert found == [[]] * 4


@pytest.mark.skipif(not LONG, reason="in make long")
def test_parameters_are_divided_over_three_parts(launcher: Launcher) -> None:
    options = {"name": "ragged", "sizes": (2, 1, 3), "shard": True}
    assert launcher.returned("data_scenes:train", 6, **options) == [[]] * 6


def test_divided_parameters_are_exported_and_frozen_and_stepped(launcher: Launcher, tmp_path: Path) -> None:
    for odd, trained, kinds in launcher.returned(
        "data_scenes:divided_beside_the_pipe", 4, folder=str(tmp_path / "out")
    ):
        assert odd == []
        assert trained
        assert all(trained)
        assert kinds == ["DTensor", "DTensor"] * len(trained)


def test_sparse_gradients_are_summed(launcher: Launcher) -> None:
    assert launcher.returned("data_scenes:sparse_gradients", 4) == [[]] * 4


@pytest.mark.skipif(not LONG, reason="two parts and three divided ones run here: make long")
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "sequential"])
def test_three_parts_train_as_the_unsplit_model(launcher: Launcher, schedule: str) -> None:
    found = launcher.returned("data_scenes:train", 6, name="ragged", sizes=(2, 1, 3), schedule=schedule)
    assert found == [[]] * 6


def test_what_parts_cannot_do_is_refused_by_all(launcher: Launcher) -> None:
    words = {
        "no loss": "InputError: the mesh has the dimension 'data', but the model does not return a loss",
        "gradient": "ExecutionError: an output other than the loss got a gradient",
        "lengths": "input_ids: int64 [rows, 7]",
        "statistics": "CaptureError: the stages write buffer 'norm.running_mean' for each microbatch",
        "pipedream": "schedule='pipedream' does not work with the mesh's dimension 'data'",
        "DTensor": "parameter '0.weight' is a DTensor, divided over processes by fully_shard() or otherwise",
        "optimizer": "whose rows are divided over processes (fully_shard=True), so it would not be trained",
        "number": "scale: 2.0, ",
        "kind": "scale: float32 [rows, 1]",
        "names": "mesh= has the dimensions ('dp', 'pp'), but a pipeline needs 'stage' and may have 'data'",
    }
    for said in launcher.returned("data_scenes:refused", 4):
        assert said.keys() == words.keys()
        for name, part in words.items():
            assert part in said[name]
