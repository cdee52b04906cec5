"""What other threads set on a model while it is traced is neither lost nor in the trace by half."""

from __future__ import annotations

import copy
from threading import Thread
from typing import Any

import pytest
import torch
from losses import assert_step_equal
from torch import Tensor, nn

import pipecompile
from pipecompile.capture.trace import Trace
from pipecompile.errors import CaptureError


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return (self.second(self.first(x) * self.scale)).square().mean()


def disturbed(monkeypatch: pytest.MonkeyPatch, owner: nn.Module, times: int) -> list[float]:
    """Sets ``owner.scale`` in another thread in the first traces. Returns what it has set."""
    run, values = Trace._run, []

    def disturbing(self: Trace, *args: Any) -> Any:
        out = run(self, *args)
        if len(values) < times:
            values.append(3.0 + len(values))
            thread = Thread(target=setattr, args=(owner, "scale", values[-1]))
            thread.start()
            thread.join()
        return out

    monkeypatch.setattr(Trace, "_run", disturbing)
    return values


@pytest.mark.parametrize(("times", "on_the_pipe"), [(1, False), (3, True)])
def test_what_another_thread_sets_in_a_trace_stays_and_is_traced(
    monkeypatch: pytest.MonkeyPatch, times: int, on_the_pipe: bool
) -> None:
    model = Scaled().double()
    pipe = pipecompile.compile(copy.deepcopy(model), ["cpu", "cpu"], microbatches=2, costs="count")
    values = disturbed(monkeypatch, pipe if on_the_pipe else pipe.pipeline.model, times)
    model.scale = 2.0 + times
    found = pipe(x := torch.randn(4, 4, dtype=torch.float64))
    assert len(values) == times
    assert pipe.scale == model.scale
    torch.testing.assert_close(found, model(x))
    pipe.scale = 0.5  # is guarded
    assert_step_equal(pipe.pipeline.model, pipe, {"x": x})


def test_what_is_set_on_another_model_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, other = Scaled().double(), Scaled()
    pipe = pipecompile.compile(model, ["cpu", "cpu"], microbatches=2, costs="count")
    values = disturbed(monkeypatch, other, 1)
    assert_step_equal(model, pipe, {"x": torch.randn(4, 4, dtype=torch.float64)})
    assert other.scale == 3.0
    assert len(values) == pipe.pipeline.captures == 1


def test_a_thread_that_changes_the_model_in_every_trace_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = pipecompile.compile(Scaled(), ["cpu", "cpu"], microbatches=2, costs="count")
    values = disturbed(monkeypatch, pipe, 100)
    with pytest.raises(CaptureError, match=r"another thread has set 'scale' of the model in each of 4 traces"):
        pipe(torch.randn(4, 4))
    assert len(values) == 4
    assert pipe.scale == values[-1]


def test_a_patch_of_setattr_by_others_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    own, seen = nn.Module.__setattr__, []

    def theirs(self: nn.Module, name: str, value: Any) -> None:
        seen.append(name)
        own(self, name, value)

    monkeypatch.setattr(nn.Module, "__setattr__", theirs)
    model = Scaled()
    pipe = pipecompile.compile(model, devices=["cpu"] * 2, schedule="1f1b", microbatches=2)
    disturbed(monkeypatch, model, 1)
    pipe(torch.randn(4, 4)).backward()
    assert nn.Module.__setattr__ is theirs
    assert seen.count("scale") > 1
