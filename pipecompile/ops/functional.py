"""Functions that a captured graph calls beside torch's own: effects of Python statements, written as values."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pipecompile.errors import InputError
from pipecompile.ops.torch_internals import FakeTensor


def setitem(x: Tensor, index: Any, value: Any) -> Tensor:
    """``x[index] = value`` as an expression."""
    x[index] = value
    return x


def hooked(hook: Callable[[Tensor], Tensor | None]) -> Callable[[Tensor], Tensor]:
    """A function that gives its argument with a hook on its gradient, as ``x.register_hook(hook)`` leaves it."""

    def with_hook(x: Tensor) -> Tensor:
        if x.requires_grad:
            x.register_hook(hook)  # type: ignore[no-untyped-call]
        return x

    return with_hook


def number(value: Tensor) -> float:
    """A number that the model's Python has computed before the step, of a tensor without dimensions that brings it."""
    return value.item()


def bincount(input: Tensor, weights: Tensor | None = None, minlength: int = 0) -> Tensor:
    """``torch.bincount`` of a known number of bins.

    Raises:
        ValueError: there is a larger number than the bins that were asked for, which makes the result longer.
    """
    counts = torch.bincount(input, weights, minlength)
    if minlength and len(counts) != minlength:
        raise ValueError(f"bincount has found the number {len(counts) - 1}, but minlength={minlength} bins were traced")
    return counts


def after(x: Tensor, *writers: Any) -> Tensor:
    """``x`` as it is once ``writers`` have written to its storage: makes the order of a write a dependency."""
    return x


def with_data(x: Tensor, value: Tensor) -> Tensor:
    """``x.data = value`` as an expression; what autograd has saved of ``x`` itself has these numbers then too."""
    x.data = value.detach()
    return x


def write_back(buffer: Tensor, value: Tensor) -> Tensor:
    """Gives a buffer the value that the model's forward bound to its name."""
    with torch.no_grad():
        return buffer.copy_(value)


@torch.no_grad()
def moments(x: Tensor) -> Tensor:
    """What running statistics are made of: for each feature (dimension 1) the number of entries, their sum, and that of
    their squares. Of shape ``[3, features]``, in double precision; it adds up over microbatches.
    """
    dims = [dim for dim in range(x.ndim) if dim != 1]
    var, mean = torch.var_mean(x if x.dtype == torch.float64 else x.float(), dims, correction=0)
    var, mean, count = var.double(), mean.double(), torch.full_like(mean, x.numel() // x.shape[1]).double()
    return torch.stack([count, count * mean, count * (var + mean * mean)])


@torch.no_grad()
def add_moments(running_mean: Tensor, running_var: Tensor, total: Tensor, momentum: float) -> Tensor:
    """Moves running statistics as batch normalisation does, by the moments of a whole batch."""
    count, summed, squares = total
    mean = summed / count
    var = (squares / count - mean * mean).clamp(min=0) * count / (count - 1)
    for running, now in ((running_mean, mean), (running_var, var)):
        running.copy_(running.double() * (1 - momentum) + now.to(running.device) * momentum)
    return running_mean


def part_of(value: Any, share: Tensor) -> Tensor:
    """A microbatch's part of what stands for the whole batch, by its share of the rows; keeps the value's type."""
    if isinstance(value, Tensor) and value.is_floating_point():
        share = share.to(value.dtype)
    part: Tensor = share * value
    return part


def masked_scatter_all(x: Tensor, mask: Tensor, source: Tensor) -> Tensor:
    """``x.masked_scatter(mask, source)`` that takes all entries of the source, so that microbatches take their own."""
    if not isinstance(source, FakeTensor):
        places = int(mask.expand_as(x).sum())
        if places != source.numel():
            raise InputError(
                f"masked_scatter has {source.numel()} entries for the {places} places of a microbatch: samples would "
                f"take each other's; use microbatches=1"
            )
    return x.masked_scatter(mask, source)


def valid_weight(target: Tensor, ignore_index: int, weight: Tensor | None) -> Tensor:
    """What a mean of ``F.cross_entropy`` divides by: how many targets count, or the sum of their classes' weights."""
    valid = target != ignore_index
    if weight is None:
        return valid.sum()
    return torch.where(valid, weight[torch.where(valid, target, 0)], 0).sum()


@functools.cache
def over(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A loss summed up and divided by a given total: one microbatch's part of a mean over the whole batch.

    Half precision is summed in single precision, where many entries do not overflow.
    """

    @functools.wraps(loss)
    def part(total: Tensor, scores: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        half = scores.dtype == torch.float16
        summed = loss(scores.float() if half else scores, *args, **kwargs, reduction="sum") / total
        return summed.to(scores.dtype) if half else summed

    part.__name__ = f"{getattr(loss, '__name__', 'loss')}_part"
    part.__module__ = __name__
    return part
