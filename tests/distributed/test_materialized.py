"""A model that no process has as a whole trains bit for bit as one that was loaded or initialised whole."""

from __future__ import annotations

from pathlib import Path

import pytest
from launcher import Launcher
from long import LONG
from materialized_scenes import MAKE

SOME = ["gpt2", "llama", "custom"]
LIMIT = 280


@pytest.mark.parametrize("name", MAKE if LONG else SOME)
def test_a_model_on_meta_trains_as_the_whole_one(launcher: Launcher, tmp_path: Path, name: str) -> None:
    found = launcher.returned("materialized_scenes:trains_alike", 2, limit=LIMIT, name=name, folder=str(tmp_path))
    assert found == [[], []]
