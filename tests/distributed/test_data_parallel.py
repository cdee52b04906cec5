"""Parts of a batch in several pipelines train as the unsplit model does on the whole batch."""

from __future__ import annotations

import pytest
from launcher import Launcher
from long import LONG

LIMIT = 280
ALIKE = [
    ("ragged", (5, 3)),
    ("contrastive", (4, 3)),
    ("dropping", (4, 4)),
]
MORE = [
    ("gpt2", (4, 4)),
    ("t5", (4, 4)),
    ("two_towers", (2, 6)),
    ("mixtral", (4, 4)),
    ("skip_to_loss", (3, 4)),
    ("buffers_in_place", (4, 4)),
    ("sundry", (8, 8)),
]


@pytest.mark.parametrize(("name", "sizes"), ALIKE + MORE if LONG else ALIKE)
def test_two_parts_train_as_the_unsplit_model(launcher: Launcher, name: str, sizes: tuple[int, ...]) -> None:
    found = launcher.returned("data_scenes:train", 4, limit=LIMIT, name=name, sizes=sizes)
    assert found == [[]] * 4


def test_calls_accumulate_and_the_optimizers_state_is_sharded(launcher: Launcher) -> None:
    options = {"name": "ragged", "sizes": (3, 2), "accumulate": 2, "zero": True}
    assert launcher.returned("data_scenes:train", 4, limit=LIMIT, **options) == [[]] * 4


def test_sparse_gradients_are_summed(launcher: Launcher) -> None:
    assert launcher.returned("data_scenes:sparse_gradients", 4, limit=LIMIT) == [[]] * 4


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "sequential"] if LONG else ["gpipe"])
def test_three_parts_train_as_the_unsplit_model(launcher: Launcher, schedule: str) -> None:
    found = launcher.returned("data_scenes:train", 6, limit=LIMIT, name="ragged", sizes=(2, 1, 3), schedule=schedule)
    assert found == [[]] * 6


def test_what_parts_cannot_do_is_refused_by_all(launcher: Launcher) -> None:
    words = {
        "no loss": "InputError: the mesh has the dimension 'data', but the model does not return a loss",
        "gradient": "ExecutionError: an output other than the loss got a gradient",
        "lengths": "in the first part of the batch and int64 of shape (rows, 7) in part 1",
        "statistics": "CaptureError: the stages write buffer 'norm.running_mean' for each microbatch",
        "pipedream": "schedule='pipedream' does not work with the mesh's dimension 'data'",
        "names": "mesh= has the dimensions ('dp', 'pp'), but a pipeline needs 'stage' and may have 'data'",
    }
    for said in launcher.returned("data_scenes:refused", 4, limit=LIMIT):
        assert said.keys() == words.keys()
        for name, part in words.items():
            assert part in said[name]
