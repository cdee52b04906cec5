"""Functions whose backward leaves the gradients of weights for later: the W of zero-bubble schedules.

A backward of a linear layer computes two products: the gradient of its input, for which the stage before waits, and the
gradient of its weight, for which nobody waits before the optimizer's step. These functions compute the first one in the
backward, and put the second one into a queue. Input and output gradient are kept until the queue is emptied.

    queue = Queue()
    with queued(queue):
        ...  # the forward of a stage, with ``SPLIT[f]`` in place of ``f`` where the weight is a parameter
    ...      # its backward
    queue.empty()

What has no function here (normalizations, recurrent layers, modules kept whole, parts that are recomputed or compiled)
computes all its gradients in the backward. So does everything under autocast, where weights are cast.

Source: Zero Bubble Pipeline Parallelism (Qi et al., ICLR 2024), section 2.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

Compute = Callable[[], Tensor]
Accumulate = Callable[[Tensor | None], Tensor]  # from the gradient so far, which it may add to in place
_here = threading.local()


@dataclass
class Queue:
    """The gradients of weights that a backward has left, in its order."""

    waiting: deque[tuple[Tensor, Accumulate]] = field(default_factory=deque)

    def empty(self) -> None:
        """Computes the gradients and adds them to ``grad`` of the weights, in place."""
        with torch.no_grad():
            while self.waiting:
                weight, accumulate = self.waiting.popleft()
                weight.grad = accumulate(weight.grad)


def _product(a: Tensor, b: Tensor) -> Accumulate:
    """The product of two matrices; it needs no memory beside the sum."""
    return lambda total: a @ b if total is None else total.addmm_(a, b)


def _added(compute: Compute) -> Accumulate:
    return lambda total: compute() if total is None else total.add_(compute())


@contextmanager
def queued(queue: Queue | None) -> Iterator[None]:
    """A context in which the forwards of this thread leave gradients of weights in a queue; None: in no queue."""
    before = getattr(_here, "queue", None)
    _here.queue = queue
    try:
        yield
    finally:
        _here.queue = before


def _queue(tensor: Tensor) -> Queue | None:
    """The queue for a function of a tensor; None if its backward computes all gradients."""
    found: Queue | None = getattr(_here, "queue", None)
    if found is None or not torch.is_grad_enabled() or torch.is_autocast_enabled(tensor.device.type):
        return None
    return found


class _Split(torch.autograd.Function):
    """``apply(run, rest, queue, x, *weights)``: ``run(x, *weights)``, whose backward leaves those of weights.

    ``rest(gradient, x, *weights)`` returns how to compute the gradient of ``x``, or None, and of each weight.
    """

    @staticmethod
    def forward(ctx: Any, run: Any, rest: Any, queue: Queue, x: Tensor, *weights: Tensor) -> Tensor:
        ctx.rest, ctx.queue, ctx.weights = rest, queue, weights
        ctx.save_for_backward(x, *weights)
        out: Tensor = run(x, *weights)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        of_input, of_weights = ctx.rest(gradient, *ctx.saved_tensors)
        wanted = ctx.needs_input_grad[4:]
        ctx.queue.waiting += [
            (weight, each) for weight, each, wants in zip(ctx.weights, of_weights, wanted, strict=True) if wants
        ]
        mine = of_input() if ctx.needs_input_grad[3] and of_input is not None else None
        return (None, None, None, mine, *(None,) * len(wanted))


Rest = Callable[..., tuple[Compute | None, Sequence[Accumulate]]]


def _split(run: Callable[..., Tensor], rest: Rest, x: Tensor, *weights: Tensor | None) -> Tensor:
    present = [weight for weight in weights if weight is not None]
    queue = _queue(x)
    if queue is None or not all(map(_is_plain, (x, *present))) or not any(weight.requires_grad for weight in present):
        return run(x, *present)
    out: Tensor = _Split.apply(run, rest, queue, x, *present)  # type: ignore[no-untyped-call]
    return out


def _is_plain(tensor: Tensor) -> bool:
    """Whether products of a tensor are what they are here: no conjugates, sparse rows, or classes with their own."""
    return type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided and not tensor.is_complex()


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear``: ``(..., in), (out, in), (out) -> (..., out)``."""
    if weight.ndim != 2 or (bias is not None and bias.shape != weight.shape[:1]):  # bias may be broadcast
        return F.linear(input, weight, bias)

    def rest(gradient: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
        rows = _rows(gradient)
        of_weights = [_product(rows.t(), _rows(x))]
        if bias is not None:
            of_weights.append(_added(lambda: rows.sum(0)))
        return (lambda: (rows @ weight).view(x.shape)), of_weights

    return _split(F.linear, rest, input, weight, bias)


def addmm(input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """``torch.addmm`` of a bias, an input and a weight: ``(out), (n, in), (in, out) -> (n, out)``."""
    if beta != 1 or alpha != 1 or input.shape != mat2.shape[1:]:
        return torch.addmm(input, mat1, mat2, beta=beta, alpha=alpha)

    def rest(gradient: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> Any:
        return (lambda: gradient @ weight.t()), [_product(x.t(), gradient), _added(lambda: gradient.sum(0))]

    return _split(lambda x, weight, bias: torch.addmm(bias, x, weight), rest, mat1, mat2, input)


def matmul(input: Tensor, other: Tensor) -> Tensor:
    """``torch.matmul`` of an input and a weight: ``(..., in), (in, out) -> (..., out)``."""
    if input.ndim < 2 or other.ndim != 2:
        return torch.matmul(input, other)

    def rest(gradient: Tensor, x: Tensor, weight: Tensor) -> Any:
        rows = _rows(gradient)
        return (lambda: (rows @ weight.t()).view(x.shape)), [_product(_rows(x).t(), rows)]

    return _split(torch.matmul, rest, input, other)


def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """``F.embedding``: ``(...), (rows, width) -> (..., width)``."""
    if sparse or max_norm is not None:
        return F.embedding(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
    padding = -1 if padding_idx is None else padding_idx % len(weight)

    def rest(gradient: Tensor, indices: Tensor, weight: Tensor) -> Any:
        def of_weight() -> Tensor:
            found: Tensor = torch.ops.aten.embedding_dense_backward(
                gradient, indices, len(weight), padding, scale_grad_by_freq
            )
            return found

        return None, [_added(of_weight)]

    def run(indices: Tensor, weight: Tensor) -> Tensor:
        return F.embedding(indices, weight, padding_idx, scale_grad_by_freq=scale_grad_by_freq)

    return _split(run, rest, input, weight)


def _convolution(function: Callable[..., Tensor], dims: int) -> Callable[..., Tensor]:
    """A convolution: ``(batch, in, ...), (out, in / groups, ...), (out) -> (batch, out, ...)``."""

    def convolution(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor:
        def run(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            return function(x, weight, bias, stride, padding, dilation, groups)

        if isinstance(padding, str) or input.ndim != dims + 2:
            return run(input, weight, bias)
        sizes = [_each(stride, dims), _each(padding, dims), _each(dilation, dims)]

        def rest(gradient: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
            def part(place: int) -> Compute:
                wanted = [place == each for each in range(3)]

                def compute() -> Tensor:
                    found: Tensor = torch.ops.aten.convolution_backward(
                        gradient, x, weight, [weight.shape[0]], *sizes, False, [0] * dims, groups, wanted
                    )[place]
                    return found

                return compute

            return part(0), [_added(part(1)), *[_added(part(2))] * (bias is not None)]

        return _split(run, rest, input, weight, bias)

    return convolution


def _each(value: Any, dims: int) -> list[int]:
    return [value] * dims if isinstance(value, int) else [*value] * (dims // len(value))


WEIGHT, BIAS = (1, "weight"), (2, "bias")
# By function of torch: its split form, and the positions and names of the arguments that must be parameters.
SPLIT: Mapping[Any, tuple[Callable[..., Tensor], Sequence[tuple[int, str]]]] = {
    F.linear: (linear, (WEIGHT, BIAS)),
    torch.addmm: (addmm, ((2, "mat2"), (0, "input"))),
    torch.matmul: (matmul, ((1, "other"),)),
    F.embedding: (embedding, (WEIGHT,)),
    F.conv1d: (_convolution(F.conv1d, 1), (WEIGHT, BIAS)),
    F.conv2d: (_convolution(F.conv2d, 2), (WEIGHT, BIAS)),
    F.conv3d: (_convolution(F.conv3d, 3), (WEIGHT, BIAS)),
}
