"""Mutants of the split and of the runtime: values, gradients and weights that go astray between stages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from broken import ROWS, WIDTH, Mutant, counted, cut, patched
from mutants_batching import end
from mutants_capture import Repeated, Tied, ids
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from pipecompile.batching import Batched
from pipecompile.capture.call import SHARE
from pipecompile.ir.instruction import Backward, Forward, Recv
from pipecompile.ir.plan_options import PlanOptions
from pipecompile.ops.checkpoint import Recomputed
from pipecompile.runtime import batch, gradients, link, microbatches, steps
from pipecompile.runtime.batch import Batch
from pipecompile.runtime.runner import Microbatch, Runner
from pipecompile.runtime.transport import LocalTransport

TWO = {"plan": PlanOptions(pins={"second": 0, "one": 1})}
THREE = {"devices": ["cpu"] * 3, "plan": PlanOptions(pins={"second": 0, "one": 1, "two": 2})}
PAIR = {1: 2, 2: 1}  # two microbatches of equally many rows


class Join(nn.Module):
    """A layer of the product of two values."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, h: Tensor, other: Tensor) -> Tensor:
        return torch.tanh(self.linear(h * other))


class Skip(nn.Module):
    """The first layer's features are read in the middle and at the end: two values of one shape cross each cut."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.one, self.two = Join(), Join()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first = torch.tanh(self.first(x))
        h = torch.tanh(self.second(first))
        out = self.last(self.two(self.one(h.exp(), first), first))
        return out.pow(2).mean(), out


def loss() -> Callable[[], nn.Module]:
    return end(lambda net, o: o.pow(2).mean())


def features() -> Callable[[], nn.Module]:
    return end(lambda net, o: o)


def wanting() -> dict[str, Tensor]:
    return {"x": torch.randn(ROWS, WIDTH, requires_grad=True)}


def lose_backward(call: Any, self: Runner, microbatch: Microbatch, received: Any) -> Any:
    leaves = microbatch.versions[self.stage.index].leaves.values()
    before = [None if leaf.grad is None else leaf.grad.clone() for leaf in leaves]
    result = call(microbatch, received)
    for leaf, gradient in zip(leaves, before, strict=True):
        leaf.grad = gradient
    return result


def no_gradient(call: Any, self: Runner, microbatch: Microbatch, received: Any) -> Any:
    return {source: (None,) * len(values) for source, values in call(microbatch, received).items()}


def other_input(call: Any, self: Runner, microbatch: Microbatch, *args: Any) -> Any:
    inputs = {name: t.flip(0) if t.ndim else t for name, t in microbatch.inputs.items()}
    return call(replace_inputs(microbatch, inputs), *args)


def replace_inputs(microbatch: Microbatch, inputs: Mapping[str, Tensor]) -> Microbatch:
    microbatch.inputs = inputs
    return microbatch


def without_share(original: Callable[..., Any]) -> Callable[..., Any]:
    def scatter(*args: Any) -> Any:
        parts = original(*args)
        parts[-1][SHARE] = torch.zeros_like(parts[-1][SHARE])
        return parts

    return scatter


def without_reduce(original: Callable[..., Any]) -> Callable[..., Any]:
    def reduce(*args: Any) -> Any:
        return {k: (None,) * len(values) for k, values in original(*args).items()}

    return reduce


def swap_values(stages: Any) -> Any:
    assert any(len(names) > 1 for stage in stages for names in stage.receives.values())
    return tuple(replace(stage, receives={s: names[::-1] for s, names in stage.receives.items()}) for stage in stages)


def one_target(original: Callable[..., Any]) -> Callable[..., Any]:
    def backward(self: Runner, microbatch: Microbatch, received: Any) -> Any:
        last = max(received, default=None)
        kept = {t: v if t != last or len(received) < 2 else (None,) * len(v) for t, v in received.items()}
        return original(self, microbatch, kept)

    return backward


def swap_gradients(original: Callable[..., Any]) -> Callable[..., Any]:
    def gradients(session: Any, batch: Any, microbatches: Any) -> Any:
        found = original(session, batch, microbatches)
        weights = [id(p) for p in batch.parameters if id(p) in found and p.ndim == 2]
        found[weights[0]], found[weights[1]] = found[weights[1]], found[weights[0]]
        return found

    return gradients


def other_weights(original: Callable[..., Any]) -> Callable[..., Any]:
    def run(self: Recomputed, values: tuple[Any, ...]) -> Any:
        with _disable_current_modes():
            if torch._C._current_graph_task_id() != -1:  # in a backward
                values = tuple(1.1 * v if isinstance(v, nn.Parameter) or v.ndim == 2 else v for v in values)
        return original(self, values)

    return run


def exchange(original: Callable[..., Any]) -> Callable[..., Any]:
    def gather(kind: Any, parts: Any, rows: Any) -> Tensor:
        parts = [parts[PAIR.get(i, i)] for i in range(len(parts))] if isinstance(kind, Batched) else parts
        return original(kind, parts, rows)

    return gather


def exchange_gradients(original: Callable[..., Any]) -> Callable[..., Any]:
    def spread(kind: Any, gradient: Tensor, parts: Any, rows: Any) -> Any:
        pieces = original(kind, gradient, parts, rows)
        return [pieces[PAIR.get(i, i)] for i in range(len(pieces))]

    return spread


def other_recv(result: type) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def recv(self: LocalTransport, it: Recv) -> Any:
            if isinstance(it.result, result):
                number = it.result.microbatch
                it = replace(it, result=replace(it.result, microbatch=PAIR.get(number, number)))
            return original(self, it)

        return recv

    return make


def unscaled(saved: Any, factor: Tensor) -> Any:
    return saved.tensors


def half(tensor: Tensor) -> Tensor:
    return tensor / 2


RUNTIME = (
    Mutant(
        "backward of a microbatch lost",
        "the gradients of the third microbatch are missing in each stage",
        patched(Runner, "backward", counted(lose_backward)),
        loss(),
    ),
    Mutant(
        "backward lost, loss outside",
        "the same, if the caller computes the loss",
        patched(Runner, "backward", counted(lose_backward)),
        features(),
    ),
    Mutant(
        "gradient of a sent value lost",
        "the gradient of the third microbatch does not reach the previous stage",
        patched(Runner, "backward", counted(no_gradient)),
        loss(),
    ),
    Mutant(
        "microbatch lost",
        "the last microbatch does not contribute to the loss",
        patched(microbatches, "scatter", without_share),
        loss(),
    ),
    Mutant(
        "rows of a microbatch reversed",
        "the rows of the third microbatch are reversed in one stage",
        patched(Runner, "forward", counted(other_input)),
        features(),
    ),
    Mutant(
        "seed scaled",
        "every backward starts from twice its gradient",
        patched(Runner, "_seed", lambda original: lambda self, seed, output: 2 * original(self, seed, output)),
        loss(),
    ),
    Mutant(
        "loss not scaled",
        "`(loss / 2).backward()` gives the gradients of `loss.backward()`",
        patched(steps, "_multiplied", lambda original: unscaled),
        loss(),
        scale=0.5,
    ),
    Mutant(
        "Reduce skipped",
        "a weight tied across two stages gets the gradient of only one",
        patched(link, "reduced", without_reduce),
        Tied,
        ids,
    ),
    Mutant(
        "values swapped",
        "two values of the same shape that cross a cut together are exchanged",
        cut(swap_values),
        Skip,
        options=TWO,
    ),
    Mutant(
        "skip connection's gradient lost",
        "one of two later stages that read a value returns no gradient",
        patched(Runner, "backward", one_target),
        Skip,
        options=THREE,
    ),
    Mutant(
        "gradients of two parameters exchanged",
        "two parameters of the same shape get each other's gradients",
        patched(steps, "take_gradients", swap_gradients),
        loss(),
    ),
    Mutant(
        "changed weights in recomputation",
        "the recomputation in the backward reads changed weights",
        patched(Recomputed, "_run", other_weights),
        lambda: Repeated(lambda net, h: h),
    ),
    Mutant(
        "outputs swapped",
        "two outputs of the same shape are returned in the wrong order",
        patched(Batch, "given", lambda original: lambda self, tensors: original(self, tensors[::-1])),
        end(lambda net, o: (o, o.exp())),
    ),
    Mutant(
        "outputs of microbatches exchanged",
        "the rows of the second and the third microbatch are exchanged",
        patched(batch, "gather", exchange),
        features(),
    ),
    Mutant(
        "gradients of microbatches exchanged",
        "the second and the third microbatch get each other's part of a gradient",
        patched(gradients, "spread", exchange_gradients),
        features(),
    ),
    Mutant(
        "input gradient halved",
        "the gradient of an input is halved",
        patched(gradients, "_input_gradient", lambda original: lambda *given: original(*given) / 2),
        loss(),
        wanting,
    ),
    Mutant(
        "forwards received in another order",
        "a stage computes with the values of another microbatch",
        patched(LocalTransport, "recv", other_recv(Forward)),
        Skip,
        options={"schedule": "gpipe", **TWO},
    ),
    Mutant(
        "gradients received in another order",
        "the backward of a stage gets the gradients of another microbatch",
        patched(LocalTransport, "recv", other_recv(Backward)),
        Skip,
        options={"schedule": "gpipe", **TWO},
    ),
    Mutant(
        "sent value halved",
        "the values that a stage sends are halved on the way",
        patched(
            LocalTransport,
            "send",
            lambda original: (
                lambda self, send, values: original(
                    self, send, tuple(half(v) if isinstance(send.result, Forward) else v for v in values)
                )
            ),
        ),
        features(),
    ),
)
