"""torch's anomaly mode finds NaN in stages, and says from which module and line."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from toys import D, blocks

import pipecompile

pytestmark = pytest.mark.filterwarnings("ignore:(Anomaly Detection|Error detected)")


class Makes(nn.Module):
    """Makes NaN: ``forward`` of -1, ``backward`` of 0 only, whose forward is finite."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where

    def forward(self, x: Tensor) -> Tensor:
        if self.where == "forward":
            return torch.log(x * 0 - 1) + x  # NaN
        if self.where == "hidden":
            return torch.where(x > x + 1, torch.log(x * 0 - 1), x)  # chooses no NaN
        return (x * 0).sqrt() + x if self.where == "backward" else x


class Net(nn.Module):
    def __init__(self, where: str, mixes: bool = False) -> None:
        super().__init__()
        self.layers = nn.Sequential(*blocks(1), Makes(where), *blocks(1), nn.Linear(D, D))
        self.mixes = mixes

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers(x)
        if self.mixes:
            y = y @ y.T
            return ((y * 0).sqrt() + y).mean()  # in the tail
        return y.square().mean()


def piped(model: Net, **options: object) -> nn.Module:
    pins = {"layers.0": 0, "layers.2": 1, **({"layers.1": 0} if model.layers[1].where else {})}
    plan = pipecompile.PlanOptions(pins=pins, **options)
    return pipecompile.compile(model, ["cpu"] * 2, microbatches=2, costs="count", verify="never", plan=plan)


def line_of(text: str) -> str:
    lines = Path(__file__).read_text().splitlines()
    return f"test_anomalies.py:{1 + next(number for number, line in enumerate(lines) if text in line)}"


@pytest.mark.parametrize("recompute", ["never", "always"])
def test_nan_of_a_backward_is_from_a_module_and_a_line(recompute: str) -> None:
    pipe = piped(Net("backward"), recompute=recompute)
    with torch.autograd.detect_anomaly(), pytest.raises(pipecompile.ExecutionError) as raised:
        pipe(torch.ones(4, D)).backward()
    said = str(raised.value)
    assert said.startswith("stage 0, 0B0: in the backward of ")
    assert "Function 'MulBackward0' returned nan values in its 0th output" in said
    assert "it is the backward of module 'layers.1', " in said
    assert line_of("(x * 0).sqrt() + x if") in said


@pytest.mark.parametrize(("where", "count"), [("forward", 2), ("hidden", 0)])
def test_nan_of_a_forward_is_told_where_it_is_made_and_where_it_reaches_a_backward(where: str, count: int) -> None:
    pipe = piped(Net(where))
    with torch.autograd.detect_anomaly(), warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        if where == "hidden":
            pipe(torch.ones(4, D)).backward()
            assert all(parameter.grad.isfinite().all() for parameter in pipe.parameters())
        else:
            with pytest.raises(pipecompile.ExecutionError, match=r"stage 1, 1B0: .* its stage had received NaN"):
                pipe(torch.ones(4, D)).backward()
    made = [str(each.message) for each in warned if "makes NaN" in str(each.message)]
    assert len(made) == count
    assert all("stage 0: the forward makes NaN, by log in module 'layers.1', " in each for each in made)
    assert all(line_of("+ x  # NaN") in each for each in made)


def test_nan_of_the_tail_is_from_a_line() -> None:
    pipe = piped(Net("", mixes=True))
    with torch.autograd.detect_anomaly(), pytest.raises(RuntimeError) as raised:
        pipe(torch.ones(4, D)).backward()
    assert line_of("# in the tail") in str(raised.value)


def test_a_call_outside_the_mode_says_that_it_must_be_inside() -> None:
    pipe = piped(Net("backward"))
    loss = pipe(torch.ones(4, D))
    with torch.autograd.detect_anomaly(), pytest.raises(pipecompile.ExecutionError, match="make the call, too") as said:
        loss.backward()
    assert "the gradient of 'layers.0.0.weight' is NaN" in str(said.value)


def test_without_the_mode_or_its_check_nan_is_a_value() -> None:
    pipe = piped(Net("backward"))
    pipe(torch.ones(4, D)).backward()
    with torch.autograd.detect_anomaly(check_nan=False):
        pipe(torch.ones(4, D)).backward()
    assert pipe.layers[0][0].weight.grad.isnan().any()
