"""Random models on random devices, which run their work in random orders."""

from __future__ import annotations

import os

import pytest
from long import LONG
from random_devices import check, program_of

COUNT = int(os.environ.get("RANDOM_MODELS", "64" if LONG else "2"))


@pytest.mark.parametrize("seed", range(COUNT))
def test_a_random_model_gives_the_cpus_figures(seed: int) -> None:
    check(program_of(seed))
