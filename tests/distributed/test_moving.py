"""Parameters, gradients and optimizers' state go to other processes when the cut moves."""

from __future__ import annotations

from pathlib import Path

import pytest
from launcher import Launcher
from long import some


@pytest.mark.parametrize(("size", "parts"), some([(2, 1), (4, 1), (4, 2)]))
def test_a_training_goes_on_as_one_that_begins_with_the_new_cut(
    launcher: Launcher, tmp_path: Path, size: int, parts: int
) -> None:
    arguments = {"directory": str(tmp_path), "parts": parts, "normalized": parts == 1}
    found = launcher.returned("moving_scenes:moved", size, **arguments)
    for each in found:
        assert each["names"] is True
        assert each["losses"]
        assert each["differ"] == []
        assert each["held"][0] == each["held"][1], "a rank has the memory of its own stages"
        assert "call backward() before replan()" in each["waits"]
        assert each["states"] == len(each["trained"]), "the optimizer keeps a state for each"
    assert any("layers." in name for each in found for name in each["moved"])
    idle = sum(not each["trained"] for each in found)
    assert idle <= (size // parts == 4), "of four ranks, one may have lost all that it trained"


def test_gradients_that_wait_for_a_step_move_too(launcher: Launcher) -> None:
    assert launcher.returned("moving_scenes:gradients_move", 2) == [[], []]


def test_what_cannot_move_is_refused_by_all_and_training_goes_on(launcher: Launcher) -> None:
    words = {
        "early": "call the pipeline first",
        "missing": "pass that of this process",
        "no optimizer": "but got optimizer=7",
        "groups": "the optimizers of rank 0 have AdamW(",
        "fewer": "is to move, but no optimizer that was passed steps it",
        "all at once": "LBFGS keeps state that does not belong to one parameter",
        "other plan": "replan() got pins={",
        "no plan": "replan() got plan=None in rank 0, and plan=given in rank 1",
        "other costs": "replan() got costs=costs with the digest ",
        "no costs": "and costs=None in rank 1",
        "no file": "and costs='not there.json', which cannot be used (",
        "same": "True",
        "measured": "corrected by a measured step",
        "divided": "(fully_shard=True)",
    }
    for said in launcher.returned("moving_scenes:refused", 2):
        assert said.keys() == words.keys(), "and a move without optimizers is made"
        for name, part in words.items():
            assert part in said[name]
