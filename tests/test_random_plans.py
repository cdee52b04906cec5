"""Random models, cut at random, give the numbers of the unsplit model."""

from __future__ import annotations

import pytest
from random_splits import COUNT, FIRST, assert_a_split_equals_eager


@pytest.mark.parametrize("seed", range(FIRST + COUNT, FIRST + 2 * COUNT))
def test_a_random_plan_gives_the_unsplit_models_numbers(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_a_split_equals_eager(seed, monkeypatch, random_plan=True)
