"""A forward that a tool sets on a pipe (``model.forward = wrapped(model.forward)``) is set on the model."""

from __future__ import annotations

import copy
import functools
import inspect
from types import MethodType
from typing import Any

import pytest
import torch
from accelerate import Accelerator, dispatch_model
from accelerate.state import AcceleratorState
from oracle import assert_same, step
from test_facade import both, llama, loss_of, trained
from torch import Tensor, nn
from toys import D, blocks

import pipecompile
from pipecompile.errors import ReentryError


def doubled(module: nn.Module) -> None:
    """As a tool does that only holds the bound method."""
    before = module.forward

    @functools.wraps(before)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return before(*args, **kwargs) * 2

    module.forward = forward  # type: ignore[assignment]


def shifted(module: nn.Module) -> None:
    """As a tool does that takes the function out of the bound method."""
    function = module.forward.__func__  # type: ignore[attr-defined]

    @functools.wraps(function)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return function(self, *args, **kwargs) + self.memory.bias.sum()

    module.forward = MethodType(forward, module)  # type: ignore[assignment]


@pytest.mark.parametrize("first", [False, True], ids=["before the first call", "after it"])
@pytest.mark.parametrize("tools", [[doubled], [shifted], [shifted, shifted], [shifted, doubled]])
def test_a_forward_that_wraps_the_pipes_is_captured(tools: list[Any], first: bool) -> None:
    pipe, model, call = both("custom")
    signature = inspect.signature(model.forward)
    for module in (pipe, model):
        if first:
            step(module, module, loss_of, call)
        for tool in tools:
            tool(module)
    assert inspect.signature(pipe.forward) == signature
    assert_same(step(pipe, pipe, loss_of, call), step(model, model, loss_of, call))
    assert pipe.pipeline.captures == 1 + first
    assert pipe.pipeline.plan.num_stages == 2
    torch.testing.assert_close(pipe.forward(*call[0]), model(*call[0]))
    for module in (pipe, model):
        del module.forward
    assert_same(step(pipe, pipe, loss_of, call), step(model, model, loss_of, call))


def test_a_copy_has_the_forward_that_was_set() -> None:
    pipe, model, call = both("custom")
    for module in (pipe, model):
        shifted(module)
        shifted(module)
    ours, theirs = copy.deepcopy(pipe), copy.deepcopy(model)
    for module in (ours, theirs):
        with torch.no_grad():
            module.memory.bias.add_(1)
    assert_same(step(ours, ours, loss_of, call), step(theirs, theirs, loss_of, call))
    assert_same(step(pipe, pipe, loss_of, call), step(model, model, loss_of, call))
    assert copy.copy(pipe).pipeline is pipe.pipeline


def test_a_loss_function_comes_after_the_forward_that_was_set() -> None:
    model = blocks(4).double()
    pipe = pipecompile.compile(
        copy.deepcopy(model), ["cpu", "cpu"], microbatches=2, costs="count", loss_fn=nn.functional.mse_loss
    )
    doubled(pipe)
    x, y = torch.randn(2, 4, D, dtype=torch.float64)
    loss = pipe(x, target=y)
    torch.testing.assert_close(loss, nn.functional.mse_loss(model(x) * 2, y))


def test_code_of_the_model_that_calls_the_pipe_is_refused() -> None:
    pipe, _, (args, _) = both("custom")
    pipe.forward = lambda x: pipe(x) * 2
    with pytest.raises(ReentryError, match="would wait for its own call"):
        pipe(*args)


@pytest.mark.filterwarnings("ignore")
def test_the_model_generates_through_a_forward_that_was_set() -> None:
    pipe, model, (_, call) = both("llama")
    seen = []
    for module in (pipe, model):
        before = module.forward
        module.forward = lambda *args, f=before, **kwargs: seen.append(1) or f(*args, **kwargs)
    ids, options = call["input_ids"], {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(pipe.eval().generate(ids, **options), model.eval().generate(ids, **options))
    assert len(seen) == 10


# accelerate


@pytest.mark.filterwarnings("ignore")
def test_accelerate_trains_in_bfloat16_and_gives_the_model_back() -> None:
    pipe, model, (_, call) = both("llama")
    seen: list[list[Tensor]] = []
    for module in (pipe.float(), model.float()):
        AcceleratorState._reset_state(True)
        accelerator = Accelerator(cpu=True, mixed_precision="bf16")
        prepared, optimizer = accelerator.prepare(module, torch.optim.SGD(module.parameters(), lr=0.5))
        output = prepared(**call)
        accelerator.backward(output.loss)
        accelerator.clip_grad_norm_(prepared.parameters(), 0.5)
        optimizer.step()
        copied = copy.deepcopy(prepared)
        given = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
        assert given is module
        assert output.logits.dtype == torch.float32
        seen.append([output.loss.detach(), output.logits.detach(), copied(**call).loss, given(**call).loss])
        assert not torch.equal(seen[-1][2], seen[-1][3])  # only the copy is still in bfloat16
    for ours, theirs in zip(*seen, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-3)
    AcceleratorState._reset_state(True)


@pytest.mark.filterwarnings("ignore")
def test_a_model_with_hooks_of_accelerate() -> None:
    _, model, call = both("llama")
    pipe = pipecompile.compile(copy.deepcopy(model), ["cpu", "cpu"], microbatches=2, costs="count")
    hooked = dispatch_model(pipe, {"": "cpu"}, force_hooks=True)
    assert hooked is pipe
    before = pipecompile.compile(dispatch_model(llama().double(), {"": "cpu"}, force_hooks=True), ["cpu", "cpu"])
    before.load_state_dict(model.state_dict())
    expected = trained(model, call)
    for name, value in trained(pipe, call).items():
        torch.testing.assert_close(value, expected[name])
    for name, value in trained(before, call).items():
        torch.testing.assert_close(value, expected[name])


def renaming(forward: Any) -> Any:
    """As ``transformers.utils.deprecation.deprecate_kwarg``: a keyword has an old name, which the new one beats."""

    @functools.wraps(forward)
    def renamed(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        old = kwargs.pop("weight", None)
        if "scale" not in kwargs and old is not None:
            kwargs["scale"] = old * 10
        return forward(self, *args, **kwargs)

    return renamed


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = blocks(4).double()

    @renaming
    def forward(self, x: Tensor, scale: float = 1.0, **others: Any) -> Tensor:
        return (self.body(x) * scale).pow(2).mean()


@pytest.mark.parametrize("loss_fn", [None, lambda output, target: (output - target).pow(2)])
def test_a_forward_that_is_wrapped_gets_keywords_as_keywords(loss_fn: Any) -> None:
    model = Scaled()
    pipe = pipecompile.compile(model, ["cpu"] * 2, microbatches=2, costs="count", loss_fn=loss_fn, verify="never")
    x = torch.randn(4, D, dtype=torch.float64)
    target = {} if loss_fn is None else {"target": torch.tensor(2.0, dtype=torch.float64)}

    def unsplit(*args: Any, target: Any = None, **kwargs: Any) -> Any:
        return model(*args, **kwargs) if loss_fn is None else loss_fn(model(*args, **kwargs), target)

    for args, kwargs in [((), {"x": x, "scale": 2.0, "weight": 3.0}), ((x,), {"weight": 3.0}), ((x, 2.0), {})]:
        call = args, kwargs | target
        assert_same(step(pipe, model, lambda y: y, call), step(unsplit, model, lambda y: y, call))
