"""Random models, cut by the partitioner, give the numbers of the unsplit model."""

from __future__ import annotations

import pytest
from random_models import drawn
from random_splits import COUNT, FIRST, assert_a_split_equals_eager

from pipecompile.runtime import steps


@pytest.mark.parametrize("seed", range(FIRST, FIRST + COUNT))
def test_a_random_model_gives_the_unsplit_models_numbers(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_a_split_equals_eager(seed, monkeypatch, random_plan=False)


def test_a_wrong_gradient_is_found_and_told_with_a_small_program(monkeypatch: pytest.MonkeyPatch) -> None:
    right = steps.take_gradients
    monkeypatch.setattr(steps, "take_gradients", lambda *args: {key: g * 1.001 for key, g in right(*args).items()})
    with pytest.raises(pytest.fail.Exception, match=r"not close|does not compute") as failed:
        assert_a_split_equals_eager(3, monkeypatch, random_plan=True)
    forward = failed.value.msg.split("def forward")[1].split("{'devices'")[0]
    assert len(forward.strip().splitlines()) <= 4 < len(drawn(3000).statements)
