"""Parts of a model that are kept whole: functions whose result only a running step knows, and what they may not be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from effects import Remembers
from oracle import assert_same, step
from torch import Tensor, nn
from toys import D, mean_square

import pipecompile
from pipecompile.capture import Captured, capture, read_call
from pipecompile.errors import CaptureError, ExecutionError


class Rooted(nn.Module):
    """Two layers with a call between them in the root's own forward, where no module is around it."""

    def __init__(self, between: Callable[..., Tensor]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(D, D), nn.Linear(D, D)
        self.between = between
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(self, self.first(x)))


def normalised(h: Tensor, scale: float = 1.0) -> Tensor:
    """Asks an activation; leaves torch for the answer."""
    largest = float(h.detach().abs().max().numpy())
    return h / largest * scale if largest > 1e-3 else h


def matched(h: Tensor, rows: Tensor) -> list[Tensor]:
    order = sorted(range(h.shape[0]), key=lambda i: h[i].sum().item())
    return [h[order], rows[order]]


class Table:
    """An object between the model and a function."""

    functions: ClassVar = {"normalised": normalised}

    @staticmethod
    def look_up(h: Tensor) -> Tensor:
        return normalised(h, scale=2.0)


class Holder:
    def __init__(self, kept: Tensor) -> None:
        self.kept = kept


def _held(holder: Holder) -> Tensor:
    return normalised(holder.kept)


def _twice(h: Tensor) -> Tensor:
    return normalised(normalised(h) + 1)


def _norm(h: Tensor) -> float:
    return h.detach().norm().item()


def _over_norm(h: Tensor) -> Tensor:
    return h / _norm(h)


ASKS: dict[str, tuple[Callable[..., Tensor], str]] = {
    "global": (lambda _, h: normalised(h), "normalised"),
    "keyword": (lambda _, h: normalised(h, scale=3.0), "normalised"),
    "table": (lambda _, h: Table.functions["normalised"](h), "normalised"),
    "static method": (lambda _, h: Table.look_up(h), "normalised"),
    "two calls": (lambda _, h: _twice(h), "normalised"),
    "tensors in an object, taken out": (lambda _, h: _held(Holder(h)), "normalised"),
    "several results": (lambda _, h: matched(h, h * 2)[1], "matched"),
    "result that is no tensor": (lambda _, h: _over_norm(h), "_over_norm"),
}


def floats(batch: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(batch, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def captured(model: nn.Module, *args: Any) -> Captured:
    return capture(model, read_call(model.forward, args, {}))


@pytest.mark.parametrize(("between", "name"), ASKS.values(), ids=ASKS)
def test_the_innermost_function_around_a_question_is_kept_whole(between: Any, name: str) -> None:
    model = Rooted(between)
    pipe = pipecompile.compile(model, devices=["cpu"] * 2, microbatches=1, costs="count")
    for seed in range(3):
        x = floats(seed=seed)
        assert_same(step(pipe, model, mean_square, ((x,), {})), step(model, model, mean_square, ((x,), {})))
    assert any(f"function {name} (" in note for note in pipe.pipeline.report.notes)


def test_a_function_is_its_own_again_after_the_trace() -> None:
    code = normalised.__code__
    trace = captured(Rooted(ASKS["global"][0]), floats())
    assert normalised.__code__ is code
    assert "normalised" in [node.target.__name__ for node in trace.graph.nodes if node.op == "call_function"]


def test_a_function_inside_a_module_that_asks_leaves_the_rest_of_the_module_visible() -> None:
    model = nn.Sequential(nn.Linear(D, D), Rooted(ASKS["global"][0])).double()
    assert captured(model, floats()).leaves == {}


def _of_module(model: nn.Module, h: Tensor) -> Tensor:
    return model.first(h) if h.sum() > 0 else h


def _writes(h: Tensor) -> Tensor:
    if h.sum() > 0:
        h.mul_(2)
    return h


def _no_result(h: Tensor) -> None:
    if h.isnan().any():
        raise ValueError


def _checked(model: nn.Module, h: Tensor) -> Tensor:
    _no_result(h)
    return h


def _holds(holder: Holder) -> Tensor:
    return holder.kept if holder.kept.sum() > 0 else -holder.kept


REFUSED: dict[str, Callable[..., Tensor]] = {
    "it reads parameters": _of_module,
    "it writes to its argument": lambda _, h: _writes(h),
    "it returns no tensor": _checked,
    "its argument hides a tensor": lambda _, h: _holds(Holder(h)),
}


@pytest.mark.parametrize("between", REFUSED.values(), ids=REFUSED)
def test_a_function_that_cannot_be_kept_whole_is_refused_with_the_line(between: Any) -> None:
    with pytest.raises(CaptureError, match=r"test_opaque_calls.py:\d+"):
        captured(Rooted(between), floats())


class FromForward(nn.Module):
    """Makes a module with a tensor of its own on each run, as some losses do."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return weighed(self.body(x))


class Weighed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.arange(D, dtype=torch.float64))

    def forward(self, h: Tensor) -> Tensor:
        return h * self.weight if h.sum() > 0 else h


def weighed(h: Tensor) -> Tensor:
    return Weighed()(h)


def test_a_module_that_the_forward_makes_is_part_of_the_function_around_it() -> None:
    model = FromForward().double()
    pipe = pipecompile.compile(model, devices=["cpu"] * 2, microbatches=1, costs="count")
    for seed in range(4):
        x = floats(seed=seed)
        assert_same(step(pipe, model, mean_square, ((x,), {})), step(model, model, mean_square, ((x,), {})))


def large(h: Tensor) -> Tensor:
    return h[[i for i in range(len(h)) if h[i, 0].item() > 0]]


def test_a_result_of_another_shape_than_the_trace_holds_for_is_an_error() -> None:
    model = Rooted(lambda _, h: large(h))
    pipe = pipecompile.compile(model, devices=["cpu"] * 2, microbatches=1, costs="count")
    x = floats()
    assert_same(step(pipe, model, mean_square, ((x,), {})), step(model, model, mean_square, ((x,), {})))
    with pytest.raises(ExecutionError, match="function large is kept whole and returns shapes"):
        pipe(-x)


def test_a_capture_runs_modules_that_are_kept_whole_on_copies_of_their_buffers() -> None:
    first = Remembers()
    model = nn.Sequential(nn.Linear(D, D), first, first, nn.Linear(D, D), Remembers()).double()
    trace = captured(model, floats())
    assert list(trace.leaves) == ["1", "4"]
    assert not any(buffer.any() for buffer in model.buffers())
    pipe = pipecompile.compile(model, devices=["cpu"] * 2, microbatches=1, costs="count")
    expected = step(model, model, mean_square, ((floats(),), {}))
    assert_same(step(pipe, model, mean_square, ((floats(),), {})), expected)
    assert expected.buffers["1.largest"] > 0


class Criterion(nn.Module):
    """Makes its loss module on each run: one that asks for attributes while it is made, and one without a question."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x)
        return nn.BCEWithLogitsLoss()(Asks()(h), x.sigmoid())


class Asks(nn.Module):
    def __init__(self, factor: float = 2.0) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, h: Tensor) -> Tensor:
        return h * self.factor if h.sum() > 0 else h


def test_a_module_that_the_forward_makes_may_be_kept_whole() -> None:
    model = Criterion().double()
    assert list(captured(model, floats()).leaves) == ["<Asks>"]
    pipe = pipecompile.compile(model, devices=["cpu"] * 2, microbatches=1, costs="count")
    for seed in range(4):
        inputs = (floats(seed=seed),), {}
        assert_same(step(pipe, model, lambda loss: loss, inputs), step(model, model, lambda loss: loss, inputs))
    assert pipe.pipeline.captures == 1


class ThroughModules(torch.autograd.Function):
    """Runs modules in its forward, and differentiates them in its own backward, as reversible layers do."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, layers: nn.ModuleList) -> Tensor:
        ctx.layers, ctx.h = layers, h.detach()
        with torch.no_grad():
            for layer in layers:
                h = h + layer(h)
        return h

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        with torch.enable_grad():
            start = out = ctx.h.requires_grad_()
            for layer in ctx.layers:
                out = out + layer(out)
            torch.autograd.backward(out, gradient)
        return start.grad, None


class Reversible(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(D, D) for _ in range(2))

    def forward(self, h: Tensor) -> Tensor:
        return ThroughModules.apply(h, self.layers)


def test_a_module_whose_autograd_function_takes_modules_is_kept_whole_with_their_parameters() -> None:
    model = nn.Sequential(nn.Linear(D, D), Reversible(), nn.Linear(D, D)).double()
    assert list(captured(model, floats()).leaves) == ["1"]
    pipe = pipecompile.compile(model, devices=["cpu"] * 2, microbatches=2, costs="count")
    inputs = (floats(),), {}
    expected = step(model, model, mean_square, inputs)
    assert_same(step(pipe, model, mean_square, inputs), expected)
    assert expected.gradients["1.layers.0.weight"] is not None


class WithLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner = nn.Linear(D, D), Reversible()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.first(x)).pow(2).mean()


def test_a_backward_that_runs_modules_differentiates_them_for_a_loss_that_is_scaled_later() -> None:
    model = WithLoss().double()
    pipe = pipecompile.compile(model, devices=["cpu"] * 2, microbatches=2, costs="count")
    inputs = (floats(),), {}
    assert_same(step(pipe, model, lambda loss: 3 * loss, inputs), step(model, model, lambda loss: 3 * loss, inputs))


def test_an_autograd_function_of_the_root_that_takes_modules_is_refused() -> None:
    with pytest.raises(CaptureError, match="ThroughModules takes modules"):
        captured(Reversible().double(), floats())


# Parameters that several such modules hold


class Banked(nn.Module):
    """VB-LoRA: each layer takes its weights from a bank that all layers hold under names of their own."""

    def __init__(self, bank: nn.Parameter) -> None:
        super().__init__()
        self.bank = bank
        self.linear = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        if self.linear(x).isinf().any():
            raise RuntimeError("infinite")
        return torch.tanh(self.linear(x) * self.bank)


@pytest.mark.parametrize("stages", [1, 2, 4])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_a_parameter_that_several_modules_kept_whole_hold_gets_the_sum_of_their_gradients(
    stages: int, scale: float
) -> None:
    bank = nn.Parameter(torch.rand(D))
    model = nn.Sequential(*(Banked(bank) for _ in range(4)), nn.Linear(D, 1)).double()
    pipe = pipecompile.compile(model, ["cpu"] * stages, microbatches=2, costs="count")
    inputs = ((floats(6),), {})

    def loss(output: Tensor) -> Tensor:
        return scale * mean_square(output)

    for _ in range(2):
        actual, expected = step(pipe, model, loss, inputs), step(model, model, loss, inputs)
        assert expected.gradients["0.bank"] is not None
        assert_same(actual, expected)
    tied = {tied.parameter for tied in pipe.pipeline.plan.tied}
    assert tied == ({"0.bank"} if stages > 1 else set())


class Nested(nn.Module):
    """Is kept whole, and its modules have the names of a leaf's own attributes once."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.calls = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x)
        return torch.tanh(self.calls(h if h.sum() > 1e9 else h.tanh()))


@pytest.mark.parametrize("verify", ["first", "never"])
def test_a_module_kept_whole_may_have_modules_of_any_name(verify: str) -> None:
    model = nn.Sequential(nn.Linear(D, D), Nested(), nn.Linear(D, 1)).double()
    pipe = pipecompile.compile(
        model, ["cpu", "cpu"], microbatches=2, costs="count", verify=verify, loss_fn=lambda out, target: out.sum()
    )
    inputs = (floats(6),), {}
    expected = step(model, model, lambda out: out.sum() / 4, inputs)
    actual = step(lambda x: pipe(x, target=x), model, lambda loss: loss / 4, inputs)
    assert actual.gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        torch.testing.assert_close(actual.gradients[name], gradient)


class Packed(nn.Module):
    """A recurrent module on packed sequences, whose lengths only data tells."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.inner = kind(D, D, batch_first=True, bidirectional=True)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths.tolist(), batch_first=True, enforce_sorted=False)
        out, _ = self.inner(packed)
        return nn.utils.rnn.pad_packed_sequence(out, batch_first=True, total_length=x.shape[1])[0]


class WithPacked(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.first, self.packed, self.last = nn.Linear(D, D), Packed(kind), nn.Linear(2 * D, D)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        return self.last(self.packed(self.first(x), lengths))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_a_recurrent_module_on_packed_sequences(kind: type[nn.RNNBase]) -> None:
    model = WithPacked(kind).double()
    inputs = ((torch.randn(4, 5, D, dtype=torch.float64), torch.tensor([5, 3, 2, 4])), {})
    for microbatches in (1, 2):
        pipe = pipecompile.compile(model, ["cpu", "cpu"], microbatches=microbatches, costs="count")
        for _ in range(2):
            assert_same(step(pipe, model, mean_square, inputs), step(model, model, mean_square, inputs))
