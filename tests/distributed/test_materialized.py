"""A model that no process has as a whole trains bit for bit as one that was loaded or initialised whole."""

from __future__ import annotations

from pathlib import Path

import pytest
from launcher import Launcher
from long import LONG
from safetensors.torch import save_file
from unfilled import MAKE, initialized

SOME = ["gpt2", "llama", "custom"]


@pytest.mark.parametrize("name", MAKE if LONG else SOME)
def test_a_model_on_meta_trains_as_the_whole_one(launcher: Launcher, tmp_path: Path, name: str) -> None:
    found = launcher.returned("materialized_scenes:trains_alike", 2, name=name, folder=str(tmp_path))
    assert found == [[], []]


@pytest.mark.parametrize(
    ("way", "said"),
    [
        ("other seeds", "rank 1 has another seed than rank 0"),
        ("one has no file", "none' does not exist"),
        ("missing keys", "lacks 'shift', 'idle'"),
        ("no initialiser", "no initialiser sets 'gain'"),
        ("reads another's", "no initialiser sets 'custom.layers.3.linear.weight' to a value that this process can"),
    ],
)
def test_all_processes_refuse_in_the_same_words(launcher: Launcher, tmp_path: Path, way: str, said: str) -> None:
    state = {} if way == "missing keys" else initialized(MAKE["custom"]).state_dict()
    state.pop("head.weight", None)
    save_file(state, tmp_path / "model.safetensors")
    found = launcher.returned("materialized_scenes:refused", 2, way=way, folder=str(tmp_path))
    assert found[0] == found[1]
    assert said in found[0]
