"""The garbage collector during a compilation: it runs seldom, and is then as it was before."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import pipecompile
from pipecompile.capture.state.quiet_torch import SELDOM
from pipecompile.compiler import batches


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    enabled, thresholds = gc.isenabled(), gc.get_threshold()
    yield
    (gc.enable if enabled else gc.disable)()
    gc.set_threshold(*thresholds)


@pytest.mark.parametrize(
    ("given", "inside"), [((700, 10, 10), SELDOM), ((SELDOM + 1, 5, 6), SELDOM + 1), ((0, 10, 10), 0)]
)
@pytest.mark.parametrize("fails", [False, True])
def test_it_runs_seldom_and_is_then_as_before(
    given: tuple[int, int, int], inside: int, fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[bool, int]] = []
    compile_call = batches.compile_call

    def seeing(*args: Any, **kwargs: Any) -> Any:
        seen.append((gc.isenabled(), gc.get_threshold()[0]))
        if fails:
            raise pipecompile.CaptureError("it fails")
        return compile_call(*args, **kwargs)

    monkeypatch.setattr(batches, "compile_call", seeing)
    gc.enable()
    gc.set_threshold(*given)
    pipe = pipecompile.compile(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), ["cpu", "cpu"], microbatches=2)
    if fails:
        with pytest.raises(pipecompile.CaptureError, match="it fails"):
            pipe(torch.ones(4, 4))
    else:
        pipe(torch.ones(4, 4))
    assert seen == [(True, inside)]
    assert gc.isenabled()
    assert gc.get_threshold() == given


def test_one_that_is_off_stays_off() -> None:
    gc.disable()
    pipe = pipecompile.compile(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), ["cpu", "cpu"], microbatches=2)
    pipe(torch.ones(4, 4))
    assert not gc.isenabled()
