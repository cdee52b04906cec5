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
computes all its gradients in the backward.

Under autocast, a function sees casts of its weights, and so does its W. As autograd does, a queue adds up the gradients
of a cast that several calls share, before it casts their sum to the type of the weight.

Source: Zero Bubble Pipeline Parallelism (Qi et al., ICLR 2024), section 2.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from pipecompile.ops.casts import LOWERED, Cast
from pipecompile.ops.splittable import (
    SPLITTABLE,
    fits_addmm,
    fits_convolution,
    fits_embedding,
    fits_linear,
    fits_matmul,
)
from pipecompile.ops.torch_internals import _top_saved_tensors_default_hooks

Accumulate = Callable[[Tensor | None], Tensor]  # from the gradient so far, which it may add to in place
OfWeights = Callable[..., Sequence[Accumulate]]  # from a gradient, x and the weights
_here = threading.local()


@dataclass(frozen=True, slots=True)
class Lent:
    """A tensor that others hold too, and must not write into."""

    tensor: Tensor
    version: int

    @staticmethod
    def now(tensor: Tensor) -> Lent:
        return Lent(tensor, tensor._version)

    def read(self) -> Tensor:
        """The tensor.

        Raises:
            RuntimeError: it was written.
        """
        if self.tensor._version != self.version:
            raise RuntimeError(
                f"a tensor of shape {list(self.tensor.shape)} was modified by an inplace operation, but gradients of "
                f"weights need it as it was; clone it first, or use a schedule with whole backwards, such as '1f1b'"
            )
        return self.tensor


@dataclass(frozen=True, slots=True)
class Left:
    """The gradients of the weights of one call, which its backward has left."""

    of_weights: OfWeights
    x: Lent
    weights: Sequence[Tensor]
    casts: Sequence[ReferenceType[Tensor] | None]  # of the weights that the call read, alive until the backward
    gradient: Lent  # of the call's output
    cast: Cast | None  # that the call made of x

    def parts(self) -> Iterator[tuple[Tensor, ReferenceType[Tensor] | None, Accumulate]]:
        """Of each weight that wants a gradient: the weight, the cast of it that was read, and the gradient."""
        x = self.x.read() if self.cast is None else self.cast.of(self.x.read())
        parts = self.of_weights(self.gradient.read(), x, *self.weights)
        for weight, cast, accumulate in zip(self.weights, self.casts, parts, strict=True):
            if weight.requires_grad:
                yield weight, cast, accumulate


@dataclass(frozen=True, slots=True)
class _Sum:
    """The gradients of one cast of a weight, added up in the type of the cast."""

    weight: Tensor
    cast: ReferenceType[Tensor]
    total: Tensor

    def add(self) -> None:
        """Adds them to ``grad`` of the weight."""
        grad = self.weight.grad
        self.weight.grad = self.total.to(self.weight.dtype) if grad is None else grad.add_(self.total)


@dataclass
class Queue:
    """What a backward has left, in its order."""

    waiting: deque[Left] = field(default_factory=deque)

    def empty(self) -> None:
        """Computes the gradients and adds them to ``grad`` of the weights, in place."""
        sums: dict[int, _Sum] = {}  # of the last cast of each weight
        with torch.no_grad():
            while self.waiting:
                for weight, cast, accumulate in self.waiting.popleft().parts():
                    if cast is None:
                        weight.grad = accumulate(weight.grad)
                        continue
                    total, before = accumulate(None), sums.get(id(weight))
                    if before is not None and before.cast is cast:
                        total = before.total + total
                    elif before is not None:
                        before.add()
                    sums[id(weight)] = _Sum(weight, cast, total)
            for last in sums.values():
                last.add()


@dataclass(frozen=True, slots=True)
class _Here:
    """Where the forwards of a thread leave gradients, and the hooks on saved tensors that they run under."""

    queue: Queue
    hooks: tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]] | None


@contextmanager
def queued(queue: Queue | None) -> Iterator[None]:
    """A context in which the forwards of this thread leave gradients of weights in a queue; None: in no queue."""
    before = getattr(_here, "found", None)
    _here.found = None if queue is None else _Here(queue, _top_saved_tensors_default_hooks(True))
    try:
        yield
    finally:
        _here.found = before


def _found(tensor: Tensor) -> _Here | None:
    """What there is for a function of a tensor; None if its backward computes all gradients."""
    found: _Here | None = getattr(_here, "found", None)
    if found is None or not torch.is_grad_enabled():
        return None
    kind = tensor.device.type
    return None if torch.is_autocast_enabled(kind) and kind not in LOWERED else found


def _split(
    run: Callable[..., Tensor], of_weights: OfWeights, x: Tensor, *weights: Tensor | None, lowers: bool = True
) -> Tensor:
    """``run(x, *weights)``, whose backward leaves the gradients of the weights.

    ``run`` sees the weights as constants, so that torch's own backward computes the gradient of ``x`` alone. A hook on
    the function that makes the output keeps the gradient that it starts from: after hooks on the output, and whatever
    is written into the output later. An output that is a view of all that was computed has the hook on the latter.

    Args:
        lowers: whether autocast runs it in lower precision.
    """
    present = [weight for weight in weights if weight is not None]
    here = _found(x)
    if here is None or not all(map(_is_plain, (x, *present))) or not any(weight.requires_grad for weight in present):
        return run(x, *present)
    cast = Cast.here(x.device.type) if lowers else None
    constants = [weight.detach() if cast is None else cast.of_weight(weight) for weight in present]
    casts = [None if c.dtype == w.dtype else ref(c) for c, w in zip(constants, present, strict=True)]
    if cast is not None and not (x.is_leaf and x.requires_grad):  # torch casts a leaf once for all that read it
        x = cast.of(x)
    if not x.requires_grad:
        out: Tensor = _OfWeightsAlone.apply(  # type: ignore[no-untyped-call]
            run, of_weights, here.queue, cast, constants, casts, x, *present
        )
        return out
    out = run(x, *constants)
    whole = out if out._base is None else out._base
    assert whole.grad_fn is not None, "it is computed from x, which requires a gradient"
    kept = x.detach()
    if here.hooks is None:
        lent = partial(Lent, kept, kept._version)
    else:
        pack, unpack = here.hooks
        lent = partial(_unpacked, pack(kept), unpack)

    def left(gradient: Tensor) -> Left:
        given = Lent.now(gradient)
        return Left(of_weights=of_weights, x=lent(), weights=present, casts=casts, gradient=given, cast=cast)

    whole.grad_fn.register_prehook(partial(_leave, here.queue, left))
    return out


def _unpacked(packed: Any, unpack: Callable[[Any], Tensor]) -> Lent:
    return Lent.now(unpack(packed))


def _leave(queue: Queue, left: Callable[[Tensor], Left], gradients: Sequence[Tensor | None]) -> None:
    (gradient,) = gradients
    if gradient is not None:
        queue.waiting.append(left(gradient))


class _OfWeightsAlone(torch.autograd.Function):
    """The same for an ``x`` that requires no gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        run: Any,
        of_weights: Any,
        queue: Queue,
        cast: Any,
        constants: Any,
        casts: Any,
        x: Tensor,
        *weights: Tensor,
    ) -> Tensor:
        ctx.queue = queue
        ctx.left = partial(Left, of_weights=of_weights, weights=weights, casts=casts, cast=cast)
        ctx.save_for_backward(x)
        out: Tensor = run(x, *constants)
        if out._is_view():  # which could not be written into; nothing else has what it is a view of
            out = torch.ops.aten._unsafe_view(out, out.shape)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        left: Left = ctx.left(x=Lent.now(x), gradient=Lent.now(gradient))
        ctx.queue.waiting.append(left)
        return (None,) * (7 + len(left.weights))


def _product(a: Tensor, b: Tensor) -> Accumulate:
    """The product of two matrices; it needs no memory beside the sum."""
    return lambda total: a @ b if total is None else total.addmm_(a, b)


def _added(compute: Callable[[], Tensor]) -> Accumulate:
    return lambda total: compute() if total is None else total.add_(compute())


def _is_plain(tensor: Tensor) -> bool:
    """Whether products of a tensor are what they are here: no conjugates, sparse rows, or classes with their own."""
    return type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided and not tensor.is_complex()


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear``: ``(..., in), (out, in), (out) -> (..., out)``."""
    if not fits_linear(input, weight, bias):
        return F.linear(input, weight, bias)
    return _split(F.linear, _of_linear, input, weight, bias)


def _of_linear(gradient: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Sequence[Accumulate]:
    rows = _rows(gradient)
    of_weight = _product(rows.t(), _rows(x))
    return [of_weight] if bias is None else [of_weight, _added(lambda: rows.sum(0))]


def addmm(input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """``torch.addmm`` of a bias, an input and a weight: ``(out), (n, in), (in, out) -> (n, out)``."""
    if not fits_addmm(input, mat1, mat2, beta=beta, alpha=alpha):
        return torch.addmm(input, mat1, mat2, beta=beta, alpha=alpha)

    return _split(_addmm, _of_addmm, mat1, mat2, input)


def _addmm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.addmm(bias, x, weight)


def _of_addmm(gradient: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> Sequence[Accumulate]:
    return _product(x.t(), gradient), _added(lambda: gradient.sum(0))


def matmul(input: Tensor, other: Tensor) -> Tensor:
    """``torch.matmul`` of an input and a weight: ``(..., in), (in, out) -> (..., out)``."""
    if not fits_matmul(input, other):
        return torch.matmul(input, other)

    return _split(torch.matmul, _of_matmul, input, other)


def _of_matmul(gradient: Tensor, x: Tensor, weight: Tensor) -> Sequence[Accumulate]:
    return [_product(_rows(x).t(), _rows(gradient))]


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
    if not fits_embedding(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse):
        return F.embedding(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
    padding = -1 if padding_idx is None else padding_idx % len(weight)

    def of_weights(gradient: Tensor, indices: Tensor, weight: Tensor) -> Sequence[Accumulate]:
        def of_weight() -> Tensor:
            found: Tensor = torch.ops.aten.embedding_dense_backward(
                gradient, indices, len(weight), padding, scale_grad_by_freq
            )
            return found

        return [_added(of_weight)]

    def run(indices: Tensor, weight: Tensor) -> Tensor:
        return F.embedding(indices, weight, padding_idx, scale_grad_by_freq=scale_grad_by_freq)

    return _split(run, of_weights, input, weight, lowers=False)


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

        if not fits_convolution(dims, input, weight, bias, stride, padding):
            return run(input, weight, bias)
        sizes = [_each(stride, dims), _each(padding, dims), _each(dilation, dims)]

        def of_weights(gradient: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Sequence[Accumulate]:
            wanted = [False, weight.requires_grad, bias is not None and bias.requires_grad]

            @cache
            def both() -> Sequence[Tensor]:  # the kernel of either computes both
                found: Sequence[Tensor] = torch.ops.aten.convolution_backward(
                    gradient, x, weight.to(x.dtype), [weight.shape[0]], *sizes, False, [0] * dims, groups, wanted
                )
                return found

            return [_added(lambda: both()[1]), *[_added(lambda: both()[2])] * (bias is not None)]

        return _split(run, of_weights, input, weight, bias)

    return convolution


def _each(value: Any, dims: int) -> list[int]:
    return [value] * dims if isinstance(value, int) else [*value] * (dims // len(value))


_FORMS: Mapping[str, Callable[..., Tensor]] = {
    "linear": linear,
    "addmm": addmm,
    "matmul": matmul,
    "embedding": embedding,
    "conv1d": _convolution(F.conv1d, 1),
    "conv2d": _convolution(F.conv2d, 2),
    "conv3d": _convolution(F.conv3d, 3),
}
SPLIT = {function: _FORMS[it.name] for function, it in SPLITTABLE.items()}  # by function of torch: its split form
