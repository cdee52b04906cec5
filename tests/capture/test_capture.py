"""Capture: what the recording of a run holds, what it depends on, what it refuses, and that it leaves no mark."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import toys
from effects import Remembers
from models import MODELS
from oracle import assert_same, leaves, step
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from toys import D, mean_square

import pipecompile
from pipecompile.capture import Captured, capture, read_call, summarize
from pipecompile.capture.origin import origin_of
from pipecompile.capture.trace import Trace
from pipecompile.errors import CaptureError

Body = Callable[..., Any]


class Around(nn.Module):
    """Two layers with a function between them, which gets this module, the first layer's result, and the input."""

    def __init__(self, body: Body, **state: Any) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(D, D), nn.Linear(D, D)
        self.body = body
        for name, value in state.items():
            if isinstance(value, Tensor):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)
        self.double()

    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        return self.last(self.body(self, self.first(x), x, *rest))


class Returns(nn.Module):
    """A layer whose result a function makes the output of."""

    def __init__(self, make: Body) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(D, D) for _ in range(2)).double()
        self.make = make

    def forward(self, x: Tensor) -> Any:
        return self.make(self, self.layers[1](self.layers[0](x).tanh()), x)


def floats(batch: int = 4, length: int = 6, *, seed: int = 0) -> Tensor:
    return torch.randn(batch, length, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def pipe_of(model: nn.Module, microbatches: int = 1) -> Any:
    return pipecompile.compile(model, devices=["cpu", "cpu"], microbatches=microbatches, costs="count")


def captured(model: nn.Module, *args: Any) -> Captured:
    return capture(model, read_call(model.forward, args, {}))


def calls(capture: Captured) -> list[str]:
    return [node.op for node in summarize(capture).nodes]


def check(pipe: Any, *args: Any) -> None:
    """A step of the pipeline gives the model's own numbers, and leaves the arguments as they were."""
    copies = [arg.clone() if isinstance(arg, Tensor) else arg for arg in args]
    expected = step(pipe.pipeline.model, pipe.pipeline.model, mean_square, (tuple(copies), {}))
    kept = [(arg, arg.clone()) for arg in args if isinstance(arg, Tensor)]
    assert_same(step(pipe, pipe.pipeline.model, mean_square, (args, {})), expected)
    assert all(torch.equal(arg, copy) for arg, copy in kept), "an argument was written to"


# Sizes


@pytest.mark.parametrize("first", [1, 4])
def test_one_capture_serves_batches_of_one_to_eight(first: int) -> None:
    pipe = pipe_of(MODELS["sizes"].build())
    for batch in (first, *range(1, 9)):
        check(pipe, floats(batch))
    assert pipe.pipeline.captures == 1


@pytest.mark.parametrize("name", ["gpt2", "sizes", "dict_in_out"])
def test_one_capture_serves_several_lengths(name: str) -> None:
    model = MODELS[name]
    pipe = pipe_of(model.build())
    for length in (5, 3, 2, 9, 17):
        inputs = model.inputs(4, length)
        assert_same(
            step(pipe, pipe.pipeline.model, model.loss, inputs),
            step(pipe.pipeline.model, pipe.pipeline.model, model.loss, inputs),
        )
    assert pipe.pipeline.captures == 1


def test_a_question_about_a_size_becomes_a_guard() -> None:
    pipe = pipe_of(Around(lambda _, h, x: h * 2 if x.shape[1] > 4 else h + 1))
    captures = []
    for length in (6, 8, 3, 4, 5):
        check(pipe, floats(4, length))
        captures.append(pipe.pipeline.captures)
    assert captures == [1, 1, 2, 2, 2]
    assert pipe.pipeline.report.guards


def test_a_question_about_the_batch_becomes_a_guard() -> None:
    pipe = pipe_of(Around(lambda _, h, x: h * 2 if len(x) > 2 else h + 1))
    for batch in (4, 2, 1, 3):
        check(pipe, floats(batch))


def test_a_loop_over_a_length_is_captured_anew_for_another_length() -> None:
    pipe = pipe_of(Around(lambda _, h, x: sum(h[:, i] / (i + 1) for i in range(x.shape[1]))))
    for length in (3, 5, 3):
        check(pipe, floats(4, length))
    assert pipe.pipeline.captures == 2


SIZES_AS_NUMBERS: dict[str, Body] = {
    "int": lambda _, h, x: h / int(x.shape[1]),
    "float": lambda _, h, x: h * float(x.shape[1]),
    "root": lambda _, h, x: h / x.shape[1] ** 0.5,
    "half": lambda _, h, x: h[:, : (x.shape[1] + 1) // 2],
    "text": lambda _, h, x: h * len(f"{'a' * x.shape[1]}"),
    "tensor": lambda _, h, x: h * torch.tensor(x.shape[1]),
    "tensor of sizes": lambda _, h, x: h * torch.tensor([x.shape[1], 2]).sum(),
    "as tensor": lambda _, h, x: h * torch.as_tensor(x.shape).sum(),
    "maximum": lambda _, h, x: h * max(x.shape[1], 4),
    "element count": lambda _, h, x: h * x.numel() / x.size(0),
    "a full tensor": lambda _, h, x: h * torch.full((x.shape[1], 1), x.shape[1]),
    "negative": lambda _, h, x: h * -x.shape[1],
    "key": lambda _, h, x: h * {3: 2.0, 6: 5.0, 5: 7.0}[x.shape[1]],
    "numpy": lambda _, h, x: h * torch.from_numpy(np.arange(x.shape[1], dtype=np.float64)).unsqueeze(-1),
}


@pytest.mark.parametrize("body", SIZES_AS_NUMBERS.values(), ids=SIZES_AS_NUMBERS)
def test_a_size_used_as_a_number_is_right_for_every_size(body: Body) -> None:
    pipe = pipe_of(Around(body))
    for length in (6, 3, 5):
        check(pipe, floats(4, length))


def test_two_inputs_of_one_length_may_differ_in_length_later() -> None:
    pipe = pipe_of(Around(lambda _, h, x, y: torch.cat([h, y], dim=1)))
    for first, second in ((6, 6), (6, 4), (5, 5)):
        check(pipe, floats(4, first), floats(4, second))


def test_a_length_equal_to_the_batch_is_not_taken_for_it() -> None:
    pipe = pipe_of(Around(lambda _, h, x: h * x.shape[1] + x.shape[0]))
    for batch, length in ((4, 4), (4, 6), (2, 4)):
        check(pipe, floats(batch, length))


@pytest.mark.parametrize("name", ["input", "type", "max", "getattr", "torch", "size", "_x", "True_", "x1", "output"])
def test_an_argument_may_have_any_name(name: str) -> None:
    space: dict[str, Any] = {}
    exec(f"def forward(self, {name}): return self[1](self[0]({name}))", space)
    model = type("Net", (nn.Sequential,), {"forward": space["forward"]})(nn.Linear(D, D), nn.Linear(D, D)).double()
    check(pipe_of(model), floats())


# Values that Python reads


def ones() -> Tensor:
    return torch.ones(4, 6, dtype=torch.long)


def padded() -> Tensor:
    return torch.ones(4, 6, dtype=torch.long).tril(3)


READS: dict[str, Callable[[Tensor], Any]] = {
    "bool": lambda mask: mask.all(),
    "comparison": lambda mask: mask.sum() == 24,
    "item": lambda mask: mask.sum().item() == 24,
    "int": lambda mask: int(mask.sum()) == 24,
    "float": lambda mask: float(mask.double().mean()) == 1.0,
    "tolist": lambda mask: mask.tolist()[0][-1] == 1,
    "equal": lambda mask: torch.equal(mask, torch.ones_like(mask)),
    "method equal": lambda mask: mask.equal(torch.ones_like(mask)),
    "allclose": lambda mask: torch.allclose(mask.double(), torch.ones(4, 6, dtype=torch.float64)),
    "contains": lambda mask: 0 not in mask,
    "numpy": lambda mask: mask.numpy().min() == 1,
    "array": lambda mask: np.asarray(mask).min() == 1,
    "index": lambda mask: [True, False][mask.logical_not().any().long()],
    "not": lambda mask: not (mask == 0).any(),
    "in place before": lambda mask: mask.clone().sub_(1).abs().sum().item() == 0,
    "python all": lambda mask: all(mask[0]),
    "iteration": lambda mask: all(bool(row.all()) for row in mask),
    "format": lambda mask: f"{mask.min()}" == "1",
    "max of python": lambda mask: min(mask[0]) == 1,
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_a_read_of_an_input_takes_the_right_branch_on_every_call(read: Callable[[Tensor], Any]) -> None:
    pipe = pipe_of(Around(lambda _, h, x, mask: h * 2 if read(mask) else h + 1))
    for mask in (ones(), padded(), ones()):
        check(pipe, floats(), mask)


def test_a_read_that_gives_another_value_is_captured_anew_once() -> None:
    pipe = pipe_of(Around(lambda _, h, x, mask: h * 2 if mask.all() else h + 1))
    for mask in (ones(), ones(), padded(), ones(), padded()):
        pipe(floats(), mask)
    assert pipe.pipeline.captures == 2
    assert any("reads" in guard for guard in pipe.pipeline.report.guards)


def test_a_value_is_read_from_the_whole_batch_not_from_a_microbatch() -> None:
    pipe = pipe_of(Around(lambda _, h, x, mask: h * 2 if mask.all() else h + 1), microbatches=2)
    mask = ones()
    mask[0, -1] = 0  # in the first microbatch alone
    check(pipe, floats(), mask)


def test_a_number_read_from_an_input_is_used_as_a_number() -> None:
    pipe = pipe_of(Around(lambda _, h, x, mask: h[:, : int(mask.sum(dim=1).max())]))
    for mask in (ones(), padded()[:, :5].contiguous()):
        check(pipe, floats(), mask)


def test_a_read_of_a_buffer_is_guarded() -> None:
    pipe = pipe_of(Around(lambda self, h, x: h * 2 if self.switch.item() else h + 1, switch=torch.tensor(1)))
    check(pipe, floats())
    pipe.pipeline.model.switch.zero_()
    check(pipe, floats())
    assert pipe.pipeline.captures == 2


def test_a_read_at_the_root_of_a_buffer_that_forward_writes_is_refused_and_changes_nothing() -> None:
    def body(self: Any, h: Tensor, x: Tensor) -> Tensor:
        self.count.add_(1)
        return h / float(self.count)

    pipe = pipe_of(Around(body, count=torch.tensor(1)))
    with pytest.raises(CaptureError, match="'count', which its forward changes"):
        pipe(floats())
    assert pipe.pipeline.model.count == 1


def test_a_read_of_a_buffer_that_forward_writes_sees_what_earlier_calls_wrote() -> None:
    model = nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D, momentum=None), nn.Linear(D, D)).double()
    pipe = pipe_of(model)
    rows = [floats(8, 1, seed=seed)[:, 0] for seed in range(3)]
    for x in rows:
        pipe(x)
    hidden = [model[0](x) for x in rows]
    expected = sum(h.mean(dim=0) for h in hidden) / len(hidden)
    torch.testing.assert_close(model[1].running_mean, expected.detach())


class Gate(nn.Module):
    """Reads what a fake tensor does not have."""

    def __init__(self, read: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.read = read

    def forward(self, h: Tensor) -> Tensor:
        return h * 2 if self.read(self, h) else h


REFUSED: dict[str, tuple[Callable[[Any, Tensor], Any], str]] = {
    "activation": (lambda _, h: h.sum() > 0, "parameter 'body"),
    "parameter": (lambda self, _: self.weight.item() > 0, "parameter 'weight'"),
    "random number": (lambda _, h: torch.rand(()).item() > 0.5, "random"),
}


class Rooted(Gate):
    """The gate at the root of a model, where no module around it could be kept whole."""

    def __init__(self, read: Callable[[Any, Tensor], Any]) -> None:
        super().__init__(read)
        self.body = nn.Linear(D, D)

    def forward(self, h: Tensor) -> Tensor:
        h = self.body(h)
        return h * 2 if self.read(self, h) else h


@pytest.mark.parametrize(("read", "reason"), REFUSED.values(), ids=REFUSED)
def test_a_read_at_the_root_that_no_input_answers_is_refused_with_the_line(read: Any, reason: str) -> None:
    with pytest.raises(CaptureError, match=rf"test_capture.py:\d+.*{reason}"):
        captured(Rooted(read), torch.ones(2, D))


def test_a_module_that_is_kept_whole_may_bind_its_buffers_anew() -> None:
    model = nn.Sequential(nn.Linear(D, D), Remembers(), nn.Linear(D, D)).double()
    alone, pipe = deepcopy(model), pipe_of(model)
    for seed in range(3):
        x = floats(4, 1, seed=seed)[:, 0]
        torch.testing.assert_close(pipe(x), alone(x))
        assert torch.equal(model[1].largest, alone[1].largest)
    assert model[1].largest > 0


@pytest.mark.parametrize("read", [read for read, _ in REFUSED.values()], ids=REFUSED)
def test_a_module_that_reads_what_no_input_answers_is_kept_whole(read: Any) -> None:
    trace = captured(nn.Sequential(nn.Linear(D, D), Gate(read)), torch.ones(2, D))
    assert list(trace.leaves) == ["1"]
    assert any("module 1 is kept whole" in note for note in trace.notes)


def test_all_modules_of_a_class_are_kept_whole_once_two_have_failed_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quantised model has hundreds of them, and each would cost a trace."""
    traces = []
    run = Trace.run
    monkeypatch.setattr(Trace, "run", lambda trace, reasons: (traces.append(trace), run(trace, reasons))[1])
    read, _ = next(iter(REFUSED.values()))
    model = nn.Sequential(nn.Linear(D, D), *(Gate(read) for _ in range(6)), nn.Linear(D, D))
    trace = captured(model, torch.ones(2, D))
    assert list(trace.leaves) == ["1", "2", "3", "4", "5", "6"]
    assert len(traces) < 6
    assert any("module 5 is kept whole: it has the class and options of '2'" in note for note in trace.notes)


class Sometimes(nn.Module):
    """Branches on its activations only if its options say so."""

    def __init__(self, careful: bool) -> None:
        super().__init__()
        self.weight, self.careful = nn.Parameter(torch.randn(D, D)), careful

    def forward(self, x: Tensor) -> Tensor:
        h = x @ self.weight
        return h / 2 if self.careful and h.abs().amax() > 1e6 else h


def test_a_module_of_other_options_is_not_kept_whole_for_those_of_its_class() -> None:
    model = nn.Sequential(nn.Linear(D, D), *(Sometimes(i in (1, 3)) for i in range(6)), nn.Linear(D, D))
    assert list(captured(model, torch.ones(2, D)).leaves) == ["2", "4"]


# Writes in place


def _read_before(_: Any, h: Tensor, x: Tensor) -> Tensor:
    before = h + 1
    h.mul_(3)
    return before * h


def _through_a_view(_: Any, h: Tensor, x: Tensor) -> Tensor:
    h[:, 1:].mul_(2)
    return h


def _through_a_view_of_a_view(_: Any, h: Tensor, x: Tensor) -> Tensor:
    view = h.transpose(1, 2)
    view[:, :3][..., 0] += 1
    return h + view.mT


def _to_the_base_of_a_view(_: Any, h: Tensor, x: Tensor) -> Tensor:
    view = h[:, 0]
    h.add_(1)
    return h * view.unsqueeze(1)


def _chunks(_: Any, h: Tensor, x: Tensor) -> Tensor:
    y = x.clone()
    left, right = y.chunk(2, dim=-1)
    left.mul_(2)
    right.copy_(left + 1)
    return h + y


def _unbound(_: Any, h: Tensor, x: Tensor) -> Tensor:
    y = torch.zeros_like(h)
    for i, row in enumerate(y.detach().unbind(1)):
        row.add_(i)
    return h * y


def _slices(_: Any, h: Tensor, x: Tensor) -> Tensor:
    out = torch.zeros_like(h)
    out[:, 1:] = h[:, :-1]
    out[:, 0] = 1
    out[..., -1] += h[..., 0]
    return out


def _itself(_: Any, h: Tensor, x: Tensor) -> Tensor:
    h += h
    h[:, 1:] += h[:, :-1].clone()
    return h


def _mask(_: Any, h: Tensor, x: Tensor) -> Tensor:
    h[x > 0] = 0.5
    h.masked_fill_(x < -1, 2)
    return h


def _out(_: Any, h: Tensor, x: Tensor) -> Tensor:
    result = torch.empty_like(x)
    torch.add(x, 1, out=result)
    torch.mul(result, result, out=result)
    return h * result


def _index(_: Any, h: Tensor, x: Tensor) -> Tensor:
    rows = torch.tensor([0, 2])
    return torch.zeros_like(h).index_add_(1, rows, h[:, :2]).index_fill_(1, torch.tensor([1]), 3.0)


def _data(_: Any, h: Tensor, x: Tensor) -> Tensor:
    h.data.mul_(2)
    return h * x


def _detached(_: Any, h: Tensor, x: Tensor) -> Tensor:
    h.detach().add_(1)
    return h * x


def _shape_in_place(_: Any, h: Tensor, x: Tensor) -> Tensor:
    y = h.clone()
    y.unsqueeze_(0)
    y.transpose_(1, 2)
    return y.squeeze(0).mT.mT.transpose(0, 1)


def _nothing_copied(_: Any, h: Tensor, x: Tensor) -> Tensor:
    same = h.contiguous().to(h.dtype)
    same.add_(1)
    return same + h


def _expanded(_: Any, h: Tensor, x: Tensor) -> Tensor:
    bias = torch.zeros(1, 1, D, dtype=h.dtype)
    wide = bias.expand(4, 1, D)
    bias.add_(2)
    return h + wide


def _in_a_loop(_: Any, h: Tensor, x: Tensor) -> Tensor:
    state, states = torch.zeros_like(h[:, 0]), []
    for i in range(3):
        state += h[:, i]
        states.append(state.clone())
    return torch.stack(states, dim=1)


def _under_no_grad(_: Any, h: Tensor, x: Tensor) -> Tensor:
    y = h + 0
    with torch.no_grad():
        y.clamp_(min=0)
    return y * x


def _before_a_saved_use(_: Any, h: Tensor, x: Tensor) -> Tensor:
    y = torch.exp(h)  # its backward reads y
    view = y.view(-1, D)
    z = y + 1
    z[:, 0] = view[0]
    return y * z


def _operators(_: Any, h: Tensor, x: Tensor) -> Tensor:
    y = h + 0
    y *= 2
    y -= x
    y /= 3
    return y


def _power(_: Any, h: Tensor, x: Tensor) -> Tensor:
    y = h.detach() + 3
    y **= 2
    y //= 2
    return h * y


def _setitem_of_a_list(_: Any, h: Tensor, x: Tensor) -> Tensor:
    y = torch.zeros_like(h)
    y[:, [0, 2]] = h[:, [1, 3]]
    y[torch.arange(4), 1] = x[:, 0]
    return y


def _functional(_: Any, h: Tensor, x: Tensor) -> Tensor:
    return F.relu(h + 0, inplace=True) + F.dropout(h + 0, 0.5, training=False, inplace=True)


WRITES = [
    _read_before, _through_a_view, _through_a_view_of_a_view, _to_the_base_of_a_view, _chunks, _unbound, _slices,
    _itself, _mask, _out, _index, _data, _detached, _shape_in_place,
    _nothing_copied, _expanded, _in_a_loop, _under_no_grad, _before_a_saved_use, _operators, _power,
    _setitem_of_a_list,
    _functional,
]  # fmt: skip


OPERATORS: dict[str, Body] = {
    "right": lambda _, h, x: 2 - h + 2 / (h.abs() + 1) + 2 * h + (1 + h),
    "power": lambda _, h, x: 2**h + h**2 + h.abs() ** x.abs(),
    "floor": lambda _, h, x: h * (7 // (x + 9)) + x // 0.5 + h % 3,
    "right rest": lambda _, h, x: h * (7 % (x.abs() + 1)),
    "compare": lambda _, h, x: h * (x > 0) * (x > 0) * (x != 1) * ~(x == 0),
    "logic": lambda _, h, x: h * (((x > 0) | (x < -1)) & ((x > 0) ^ (x > 1))),
    "shift": lambda _, h, x: h * ((x.abs().long() << 2) >> 1),
    "sign": lambda _, h, x: -h + +h + abs(h),
    "matrix": lambda _, h, x: h @ h.mT @ x,
    "divmod": lambda _, h, x: h.div(3, rounding_mode="floor") + h.remainder(2),
    "attributes": lambda _, h, x: h.T.mT.permute(2, 1, 0).real * h.mH.H.shape[-1] if h.ndim == 2 else h.mT.mH * h.ndim,
}


@pytest.mark.parametrize("body", OPERATORS.values(), ids=OPERATORS)
def test_an_operator_of_python_is_its_torch_function(body: Body) -> None:
    check(pipe_of(Around(body)), floats())


@pytest.mark.parametrize("body", WRITES, ids=lambda body: body.__name__[1:])
def test_a_write_in_place_means_what_it_means_to_the_model(body: Body) -> None:
    check(pipe_of(Around(body)), floats())


def _second_input(_: Any, h: Tensor, x: Tensor, y: Tensor) -> Tensor:
    before = y * 2
    y.add_(1)
    return h * y + before


def _second_input_through_a_view(_: Any, h: Tensor, x: Tensor, y: Tensor) -> Tensor:
    y[:, 0] = 0
    y.mT[:, 1:] *= 2
    return h * y


@pytest.mark.parametrize("microbatches", [1, 2])
@pytest.mark.parametrize("body", [_second_input, _second_input_through_a_view])
def test_a_write_to_an_input_is_left_in_the_tensor_of_the_caller(body: Body, microbatches: int) -> None:
    pipe = pipe_of(Around(body), microbatches)
    found = []
    for call in (pipe, pipe.pipeline.model):
        inputs = [floats(), floats(seed=1)]
        pipe.pipeline.model.zero_grad()
        output = call(*inputs)
        output.square().mean().backward()
        found.append((output.detach(), inputs, [p.grad.clone() for p in pipe.pipeline.model.parameters()]))
    torch.testing.assert_close(*found)


def test_a_write_to_a_parameter_is_refused_or_done() -> None:
    pipe = pipe_of(nn.Sequential(nn.Embedding(9, D, max_norm=1.0), nn.Linear(D, D)).double())
    weight = pipe.pipeline.model[0].weight.detach().clone()
    pipe(torch.tensor([[1, 2], [3, 4]]))
    norms = pipe.pipeline.model[0].weight.detach().norm(dim=1)
    assert (weight[1:5].norm(dim=1) > 1).any()
    assert (norms[1:5] < 1 + 1e-6).all()
    assert torch.equal(pipe.pipeline.model[0].weight[5:], weight[5:])


# Buffers


def _counted(self: Any, h: Tensor, x: Tensor) -> Tensor:
    self.count.add_(1)
    return h


def _rebound(self: Any, h: Tensor, x: Tensor) -> Tensor:
    self.count = self.count + 1
    return h


def _rebound_twice(self: Any, h: Tensor, x: Tensor) -> Tensor:
    self.count = self.count + 2
    self.count = self.count - 1
    return h


def _rebound_and_written(self: Any, h: Tensor, x: Tensor) -> Tensor:
    self.count = self.count.clone()
    self.count += 1
    return h


@pytest.mark.parametrize("body", [_counted, _rebound, _rebound_twice, _rebound_and_written])
def test_a_buffer_counts_each_batch_once(body: Body) -> None:
    pipe = pipe_of(Around(body, count=torch.tensor(0)), microbatches=2)
    count = pipe.pipeline.model.count
    for calls in (1, 2, 3):
        pipe(floats())
        assert pipe.pipeline.model.count == calls
    assert pipe.pipeline.model.count is count


def test_a_buffer_read_around_a_write_gives_the_old_and_the_new_value() -> None:
    def body(self: Any, h: Tensor, x: Tensor) -> Tensor:
        old = self.scale * 1
        self.scale.mul_(3)
        return h * old + self.scale

    check(pipe_of(Around(body, scale=torch.tensor(2.0))), floats())


def test_a_buffer_rebound_is_read_by_its_new_value() -> None:
    def body(self: Any, h: Tensor, x: Tensor) -> Tensor:
        old = self.scale
        self.scale = self.scale * 3
        return h * old + self.scale

    check(pipe_of(Around(body, scale=torch.tensor(2.0))), floats())


def test_a_view_of_a_buffer_sees_a_write_to_it() -> None:
    def body(self: Any, h: Tensor, x: Tensor) -> Tensor:
        row = self.rows[0]
        self.rows[:, 1:] = 5
        row.add_(1)
        return h * self.rows.sum() + row

    check(pipe_of(Around(body, rows=torch.ones(2, D))), floats())


def test_a_buffer_in_place_is_never_dropped_and_a_dead_value_is() -> None:
    def body(self: Any, h: Tensor, x: Tensor) -> Tensor:
        self.count.add_(1)
        h.sin()
        return h

    model = Around(body, count=torch.tensor(0))
    assert "add_" in calls(captured(model, floats()))
    assert "sin" not in calls(captured(model, floats()))


def test_a_buffer_that_changes_its_shape_is_bound_anew() -> None:
    def body(self: Any, h: Tensor, x: Tensor) -> Tensor:
        self.seen = torch.cat([self.seen, self.seen])
        return h * self.seen.sum()

    model = Around(body, seen=torch.ones(2))
    pipe = pipe_of(deepcopy(model))
    for _ in range(3):
        torch.testing.assert_close(pipe(floats()), model(floats()))
        assert torch.equal(pipe.pipeline.model.seen, model.seen)
    assert model.seen.shape == (16,)


def test_hidden_state_is_refused() -> None:
    def body(self: Any, h: Tensor, x: Tensor) -> Tensor:
        self.state["last"] = self.hidden = self.hidden + h.detach()
        return h + self.hidden

    model = Around(body, state={})
    model.hidden = torch.zeros((), dtype=torch.float64)
    with pytest.raises(CaptureError, match=r"assigns a new tensor to self\.hidden.*register_buffer"):
        captured(model, floats())


def test_hidden_state_written_in_place_is_refused_or_kept() -> None:
    def body(self: Any, h: Tensor, x: Tensor) -> Tensor:
        self.hidden.add_(1)
        return h * self.hidden

    model = Around(body)
    model.hidden = torch.zeros((), dtype=torch.float64)
    pipe = pipe_of(model)
    try:
        pipe(floats())
    except CaptureError:
        return
    assert model.hidden == 1
    pipe(floats())
    assert model.hidden == 2


# Functions with a backward of their own


class Tripled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 3 * gradient


class Negated(torch.autograd.Function):
    """In place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        return x.neg_()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return -5 * gradient


class Sign(torch.autograd.Function):
    """Its result wants no gradient, and stands beside one that does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, power: int) -> tuple[Tensor, Tensor]:
        ctx.power = power
        sign = x > 0
        ctx.mark_non_differentiable(sign)
        return x**power, sign

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, None]:
        return ctx.power * gradient, None


def _signed(_: Any, h: Tensor, x: Tensor) -> Tensor:
    power, sign = Sign.apply(h, 2)
    return torch.where(sign, power, -power)


FUNCTIONS: dict[str, Body] = {
    "once": lambda _, h, x: Tripled.apply(h),
    "twice": lambda _, h, x: Tripled.apply(Tripled.apply(h)) * x,
    "of an input": lambda _, h, x: Tripled.apply(x) * h,
    "in place": lambda _, h, x: Negated.apply(h + 0),
    "several results": _signed,
    "under no_grad": lambda _, h, x: torch.no_grad()(Tripled.apply)(h) + h,
}


@pytest.mark.parametrize("body", FUNCTIONS.values(), ids=FUNCTIONS)
def test_a_custom_backward_survives(body: Body) -> None:
    check(pipe_of(Around(body)), floats())


def test_a_custom_function_is_one_node() -> None:
    assert calls(captured(Around(FUNCTIONS["once"]), floats())) == ["input", "linear", "Tripled_apply", "linear"]


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_of_the_model_gives_the_same_numbers(reentrant: bool) -> None:
    def body(self: Any, h: Tensor, x: Tensor) -> Tensor:
        return checkpoint(self.block, h, use_reentrant=reentrant)

    check(pipe_of(Around(body, block=nn.Sequential(nn.Linear(D, D), nn.Tanh()))), floats())


# Regions


def _no_grad(self: Any, h: Tensor, x: Tensor) -> Tensor:
    with torch.no_grad():
        scale = h.abs()
    return h * scale


def _no_grad_by_call(self: Any, h: Tensor, x: Tensor) -> Tensor:
    torch.set_grad_enabled(False)
    scale = h.abs()
    torch.set_grad_enabled(True)
    return h * scale


def _grad_within_no_grad(self: Any, h: Tensor, x: Tensor) -> Tensor:
    with torch.no_grad():
        scale = h.abs()
        with torch.enable_grad():
            twice = h * 2
    return twice * scale


def _inference(self: Any, h: Tensor, x: Tensor) -> Tensor:
    with torch.inference_mode():
        scale = h.abs()
    return h + scale.clone()


def _detach(self: Any, h: Tensor, x: Tensor) -> Tensor:
    return h * h.detach() + h.requires_grad_(True) * x.detach()


@pytest.mark.parametrize("body", [_no_grad, _no_grad_by_call, _grad_within_no_grad, _inference, _detach])
def test_gradients_stop_where_the_model_stops_them(body: Body) -> None:
    check(pipe_of(Around(body)), floats())


def test_no_grad_is_recorded_on_the_nodes_within_it() -> None:
    graph = captured(Around(_no_grad), floats()).graph
    grad = {node.name: origin_of(node).region.grad for node in graph.nodes if node.op == "call_function"}
    assert grad == {"linear": True, "abs_1": False, "mul": True, "linear_1": True}


def _autocast(self: Any, h: Tensor, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        low = self.middle(h.float())
        with torch.autocast("cpu", enabled=False):
            full = low.float() @ self.middle.weight
    assert low.dtype == torch.bfloat16
    return full.double()


def _autocast_decorator(self: Any, h: Tensor, x: Tensor) -> Tensor:
    low = torch.autocast("cpu", torch.bfloat16)(self.middle)(h.float())
    assert low.dtype == torch.bfloat16
    return low.double()


class InFloat(Around):
    """Its middle layer is in float32, for autocast to lower."""

    def __init__(self, body: Body) -> None:
        super().__init__(body)
        self.middle = nn.Linear(D, D)


@pytest.mark.parametrize("body", [_autocast, _autocast_decorator])
def test_an_autocast_region_is_recorded_and_entered_again(body: Body) -> None:
    model = InFloat(body)
    casts = {origin_of(node).region.autocast for node in captured(model, floats()).graph.nodes}
    assert (("cpu", "bfloat16", True, True),) in casts
    check(pipe_of(model), floats())


# Outputs


@dataclasses.dataclass
class Pair:
    left: Tensor
    right: Tensor | None
    note: str = "both"


class Both(NamedTuple):
    left: Tensor
    right: dict[str, Any]


class Box:
    def __init__(self, content: Tensor) -> None:
        self.content = content


OUTPUTS: dict[str, Body] = {
    "tensor": lambda _, h, x: h,
    "tuple": lambda _, h, x: (h, h.mean(dim=1)),
    "list": lambda _, h, x: [h, [x, h * 2]],
    "dict": lambda _, h, x: {"a": h, 3: {"b": (h * 2, None)}},
    "ordered dict": lambda _, h, x: OrderedDict(z=h, a=h * 2),
    "dataclass": lambda _, h, x: Pair(h, None),
    "nested dataclass": lambda _, h, x: {"pair": Pair(h, h * 2, "nested")},
    "named tuple": lambda _, h, x: Both(h, {"x": x, "name": "text", "flag": True}),
    "twice the same": lambda _, h, x: (h, h),
    "an input": lambda _, h, x: (h, x),
    "a parameter": lambda self, h, x: (h, self.layers[0].weight),
    "a size": lambda _, h, x: (h, x.shape[1]),
    "a computed size": lambda _, h, x: (h, {"tokens": x.shape[0] * x.shape[1]}),
    "a constant": lambda _, h, x: (h, torch.arange(3)),
    "numbers": lambda _, h, x: (h, 1, 2.5, None, "text"),
    "an input changed": lambda _, h, x: (h, x + 1),
    "a view and its base": lambda _, h, x: (h, h[:, 0]),
}


@pytest.mark.parametrize("make", OUTPUTS.values(), ids=OUTPUTS)
def test_an_output_has_the_models_own_types_and_values(make: Body) -> None:
    model = Returns(make)
    pipe, x = pipe_of(model), floats()
    got, expected = pipe(x), model(x)
    assert type(got) is type(expected)
    pairs = list(zip(leaves(got), leaves(expected), strict=True))
    assert pairs
    for (path, value), (same_path, same) in pairs:
        assert path == same_path
        torch.testing.assert_close(value, same, msg=path) if isinstance(same, Tensor) else None
        assert isinstance(same, Tensor) or (value == same and type(value) is type(same))
        assert not isinstance(same, Tensor) or value.requires_grad == same.requires_grad, path


def test_a_size_in_the_output_follows_the_input() -> None:
    pipe = pipe_of(Returns(OUTPUTS["a computed size"]))
    assert [pipe(floats(2, length))[1]["tokens"] for length in (6, 5, 3)] == [12, 10, 6]


def test_an_object_that_hides_tensors_is_refused() -> None:
    with pytest.raises(CaptureError, match=r"is a Box, which holds tensors in content"):
        captured(Returns(lambda _, h, x: Box(h)), floats())


def test_outputs_have_the_names_of_their_keys() -> None:
    capture = captured(Returns(lambda _, h, x: {"loss": h.mean(), "more": [h, Pair(h, h)]}), floats())
    assert [o.name for o in capture.outputs] == ["loss", "more.0", "more.1.left", "more.1.right", "more.1.note"]
    assert [o.batch_dim for o in capture.outputs[:2]] == [None, 0]


# Constants, parameters and modules

OUTSIDE = torch.full((D,), 0.5, dtype=torch.float64)


CONSTANTS: dict[str, Body] = {
    "of the file": lambda _, h, x: h * OUTSIDE,
    "of a list": lambda self, h, x: h * self.tensors[0],
    "made in forward": lambda _, h, x: h * torch.tensor(2.5, dtype=torch.float64),
    "made of a list": lambda _, h, x: h * torch.tensor([float(i) for i in range(D)]),
    "of numpy": lambda _, h, x: h * torch.from_numpy(np.arange(D)),
    "a numpy number": lambda _, h, x: h * np.float64(2.5),
    "numbers": lambda _, h, x: torch.linspace(0, 1, D) * h + torch.eye(D).sum() + torch.arange(3)[-1],
    "a default dtype": lambda _, h, x: h * torch.ones(D, dtype=torch.get_default_dtype()),
    "like another": lambda _, h, x: h * x.new_full((D,), 3.0) + h.new_zeros(1) + torch.ones_like(x),
    "of a type and a device": lambda _, h, x: h * torch.ones(D).to(h) + torch.zeros(1).type_as(h),
    "one-hot": lambda _, h, x: h * F.one_hot(torch.arange(6) % D, D),
}


@pytest.mark.parametrize("body", CONSTANTS.values(), ids=CONSTANTS)
def test_a_constant_keeps_its_value(body: Body) -> None:
    model = Around(body)
    model.tensors = [torch.full((D,), 3.0, dtype=torch.float64)]
    check(pipe_of(model), floats())


def test_a_constant_that_wants_a_gradient_is_refused_with_its_line() -> None:
    outside = torch.ones(D, dtype=torch.float64, requires_grad=True)
    model = Around(lambda _, h, x: h * outside)
    with pytest.raises(CaptureError, match=r"test_capture.py:\d+: .*not a parameter of the model.*nn\.Parameter"):
        captured(model, floats())


def _recurrent(kind: type[nn.Module], **options: Any) -> Callable[[], nn.Module]:
    return lambda: kind(D, D, batch_first=True, **options)


def _attention() -> nn.Module:
    return nn.TransformerEncoderLayer(D, 2, 8, dropout=0.0, batch_first=True)


MODULES: dict[str, tuple[Callable[[], nn.Module], Body]] = {
    "lstm": (_recurrent(nn.LSTM), lambda self, h, x: self.inner(h)[0]),
    "deep lstm": (_recurrent(nn.LSTM, num_layers=2), lambda self, h, x: self.inner(h)[1][0].transpose(0, 1)),
    "gru": (_recurrent(nn.GRU), lambda self, h, x: self.inner(h)[0]),
    "attention": (_attention, lambda self, h, x: self.inner(h)),
    "decoder": (
        lambda: nn.TransformerDecoderLayer(D, 2, 8, dropout=0.0, batch_first=True),
        lambda self, h, x: self.inner(h, x),
    ),
    "weight norm": (
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(D, D)),
        lambda self, h, x: self.inner(h),
    ),
    "orthogonal": (
        lambda: nn.utils.parametrizations.orthogonal(nn.Linear(D, D), orthogonal_map="cayley"),
        lambda self, h, x: self.inner(h),
    ),
    "spectral norm": (
        lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(D, D)).eval(),
        lambda self, h, x: self.inner(h),
    ),
    "convolution": (lambda: nn.Conv1d(D, D, 3, padding=1), lambda self, h, x: self.inner(h.mT).mT),
    "parameter list": (
        lambda: nn.ParameterList([torch.ones(D), torch.ones(D)]),
        lambda self, h, x: h * self.inner[0] + self.inner[1],
    ),
    "layer norm": (lambda: nn.LayerNorm(D), lambda self, h, x: self.inner(h)),
    "instance norm": (lambda: nn.InstanceNorm1d(D, affine=True), lambda self, h, x: self.inner(h.mT).mT),
}


@pytest.mark.parametrize(("make", "body"), MODULES.values(), ids=MODULES)
def test_a_module_of_torch_gives_the_same_numbers(make: Callable[[], nn.Module], body: Body) -> None:
    model = Around(body, inner=make())
    check(pipe_of(model), floats())


def test_an_lstm_reads_its_parameters_by_their_own_names() -> None:
    graph = summarize(captured(Around(MODULES["lstm"][1], inner=nn.LSTM(D, D, batch_first=True)), floats()))
    names = {f"inner.{kind}_{side}_l0" for kind in ("weight", "bias") for side in ("ih", "hh")}
    assert names <= {parameter.name for parameter in graph.parameters}


def test_a_tied_parameter_is_one_parameter() -> None:
    graph = summarize(captured(MODELS["tied"].build(), torch.ones(2, 5).long(), torch.ones(2, 5).long()))
    names = [parameter.name for parameter in graph.parameters]
    readers = [node.op for node in graph.nodes if "embedding.weight" in node.parameters]
    assert "head.weight" not in names
    assert readers == ["embedding", "linear"]


class OfViews(nn.Module):
    """Goes on with what a view is a view of, which other stages get without the view."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        assert x.tanh()._base is self.last.weight._base is None
        assert self.last.weight[:2]._base is self.last.weight
        view = (2 * self.first(x)).flatten()
        view.mul_(3)
        assert view._base is not None
        return self.last(view._base).square().mean()


class OfArguments(OfViews):
    def forward(self, x: Tensor) -> Tensor:
        whole = x[:, :1]._base
        assert whole is not None
        return self.last(self.first(whole)).mean()


def test_what_a_tensor_is_a_view_of_is_a_value_like_any_other() -> None:
    model, inputs = OfViews().double(), ((torch.rand(6, D, dtype=torch.float64),), {})
    pipe = pipecompile.compile(model, ["cpu", "cpu"], microbatches=2, costs="count")
    assert_same(step(pipe, model, lambda loss: loss, inputs), step(model, model, lambda loss: loss, inputs))


def test_what_an_argument_is_a_view_of_is_refused() -> None:
    with pytest.raises(CaptureError, match=r"an argument is a view of \(_base\).*; pass that tensor as an argument"):
        captured(OfArguments(), torch.rand(4, D))


def test_a_forward_hook_belongs_to_the_model() -> None:
    model = Around(lambda _, h, x: h)
    model.first.register_forward_hook(lambda module, args, output: output * 2)
    model.last.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    check(pipe_of(model), floats())


# The model afterwards


def state_of(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Everything that a trace could have touched, by name and identity."""
    for path, module in model.named_modules():
        for table in ("_parameters", "_buffers", "_modules"):
            yield from ((f"{path} {table} {name}", id(value)) for name, value in getattr(module, table).items())
        yield from ((f"{path} {name}", id(value)) for name, value in module.__dict__.items())
    yield from ((name, tensor._version) for name, tensor in model.state_dict(keep_vars=True).items())


@pytest.mark.parametrize("name", ["gpt2", "unet", "tied", "in_place", "buffers_rebound", "buffers_in_place"])
def test_a_trace_leaves_the_model_as_it_was(name: str) -> None:
    model, (args, kwargs) = MODELS[name].build(), MODELS[name].inputs(4, MODELS[name].lengths[0])
    before = list(state_of(model))
    configuration = repr(getattr(model, "config", None))
    capture(model, read_call(model.forward, args, kwargs))
    assert list(state_of(model)) == before
    assert repr(getattr(model, "config", None)) == configuration


def test_a_trace_that_fails_leaves_the_model_as_it_was() -> None:
    def body(self: Any, h: Tensor, x: Tensor) -> Tensor:
        self.count.add_(1)
        self.new = h
        raise ValueError("no")

    model = Around(body, count=torch.tensor(0))
    before, call = list(state_of(model)), nn.Module.__call__
    with pytest.raises(CaptureError):
        captured(model, floats())
    assert list(state_of(model)) == before
    assert nn.Module.__call__ is call


def test_a_list_or_dict_of_the_model_holds_no_fakes_afterwards() -> None:
    def body(self: Any, h: Tensor, x: Tensor) -> Tensor:
        self.history.append(h)
        self.memory["last"] = h
        return h

    model = Around(body, history=[], memory={})
    captured(model, floats())
    assert model.history == []
    assert model.memory == {}


def test_a_trace_draws_no_random_numbers() -> None:
    model = Around(lambda _, h, x: F.dropout(h) * torch.rand(D) * torch.randn_like(h))
    before = torch.get_rng_state()
    captured(model, floats())
    assert torch.equal(torch.get_rng_state(), before)


# What cannot be traced


class Broken(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return h.view(7, 11, 13)


class Raises(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        raise KeyError("layer")


@pytest.mark.parametrize("kind", [Broken, Raises])
def test_an_error_of_the_trace_names_module_and_line(kind: type[nn.Module]) -> None:
    line = inspect.getsourcelines(kind.forward)[1] + 1
    with pytest.raises(CaptureError, match=rf"module '1\.0', .*test_capture\.py:{line}"):
        captured(nn.Sequential(nn.Linear(D, D), nn.Sequential(kind())), torch.ones(2, D))


def test_what_had_to_be_fixed_is_noted() -> None:
    def body(_: Any, h: Tensor, x: Tensor) -> Tensor:
        if isinstance(x.shape[1], torch.SymInt):
            raise TypeError("plain sizes only")
        return h

    pipe = pipe_of(Around(body))
    check(pipe, floats())
    assert any(re.search("plain sizes only", note) for note in pipe.pipeline.report.notes)


# Where a node comes from


def test_a_node_knows_its_module_and_the_line_of_the_call() -> None:
    capture = captured(MODELS["long_skip"].build(), floats(), floats())
    nodes = summarize(capture).nodes
    paths = [node.path for node in nodes if node.op == "linear"]
    source, line = inspect.getsourcelines(toys.LongSkip.forward)
    assert paths == [f"body.{i}.0" for i in range(6)]
    assert nodes[-1].source == f"tests/toys.py:{line + len(source) - 1}"
    assert nodes[-1].path == ""


def test_a_module_used_twice_is_two_calls_of_one_path() -> None:
    nodes = summarize(captured(MODELS["used_twice"].build(), floats())).nodes
    assert [node.path for node in nodes if node.parameters].count("shared.0.0") == 2


def test_a_type_of_python_and_an_array_of_numpy_are_arguments_that_generated_code_can_write() -> None:
    def body(self: Any, h: Tensor, x: Tensor) -> Tensor:
        return h[:, np.array([1, 0, 1])].to(float) + (x > 0).to(dtype=int)[:, :1]

    check(pipe_of(Around(body)), floats())


def test_what_gives_back_its_argument_shares_memory_that_is_written() -> None:
    """Dropout of nothing and ``contiguous`` give the very same tensor: a write to it needs the stage that made it."""

    class Passes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.drop, self.last = nn.Linear(4, 4), nn.Dropout(0.0), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = F.leaky_relu(self.drop(self.first(x)), inplace=True)
            return self.last(self.last(h).contiguous().relu_())

    captured = capture(model := Passes(), read_call(model.forward, (torch.randn(2, 4),), {}))
    assert any({"linear", "leaky_relu"} <= set(group) for group in captured.groups)
    assert any({"linear_1", "contiguous", "relu_"} <= set(group) for group in captured.groups)


class Lazily(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)


class ByTheItem(Lazily):
    def forward(self, x: Tensor) -> Any:
        yield self.first(x)
        yield self.second(x)


class PartsByTheItem(Lazily):
    def forward(self, x: Tensor) -> Any:
        return {"y": self.second(self.first(x)), "parts": (self.second(row) for row in x)}


class Zips(Lazily):
    def forward(self, x: Tensor) -> Any:
        return zip(self.first(x), self.second(x), strict=True)


@pytest.mark.parametrize(
    ("kind", "what"), [(ByTheItem, "generator"), (PartsByTheItem, r"generator at \['parts'\]"), (Zips, "zip")]
)
def test_a_forward_that_returns_what_is_still_to_run_is_refused(kind: type[nn.Module], what: str) -> None:
    pipe = pipecompile.compile(kind(), ["cpu", "cpu"], microbatches=2, costs="count")
    with pytest.raises(CaptureError, match=f"forward returns a {what}, whose code runs only when .*; return a list"):
        pipe(torch.randn(4, 4))


class TakesAStream(Lazily):
    def forward(self, xs: Any) -> Tensor:
        return sum(self.second(self.first(x)) for x in xs)  # type: ignore[return-value]


def test_an_argument_that_can_be_read_only_once_is_refused() -> None:
    pipe = pipecompile.compile(TakesAStream(), ["cpu", "cpu"], microbatches=2, costs="count")
    with pytest.raises(pipecompile.InputError, match="argument 'xs' is a generator, which can be read only once"):
        pipe(torch.randn(4, 4) for _ in range(2))


class ReturnsItsInput(Lazily):
    def forward(self, x: Tensor) -> Tensor:
        return x


def test_a_call_without_an_operation_says_so() -> None:
    pipe = pipecompile.compile(ReturnsItsInput(), ["cpu", "cpu"], microbatches=2, costs="count")
    with pytest.raises(pipecompile.InfeasibleError, match="no operation of this call depends on"):
        pipe(torch.randn(4, 4))
