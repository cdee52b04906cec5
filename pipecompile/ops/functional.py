"""Functions, other than torch's own, that a captured graph calls: effects of Python statements as expressions."""

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
    """Returns a function that registers a hook on its argument's gradient and returns the argument."""

    def with_hook(x: Tensor) -> Tensor:
        if x.requires_grad:
            x.register_hook(hook)  # type: ignore[no-untyped-call]
        return x

    return with_hook


def number(value: Tensor) -> float:
    """Returns a number that Python has computed before the step, from the tensor without dimensions that carries it."""
    return value.item()


def bincount(input: Tensor, weights: Tensor | None = None, minlength: int = 0) -> Tensor:
    """``torch.bincount`` with a fixed number of bins.

    Raises:
        ValueError: The input contains a value outside the bins, which would make the result longer.
    """
    counts = torch.bincount(input, weights, minlength)
    if minlength and len(counts) != minlength:
        raise ValueError(
            f"bincount found the value {len(counts) - 1}, but was captured with minlength={minlength} bins"
        )
    return counts


def after(x: Tensor, *writers: Any) -> Tensor:
    """Returns ``x``, after ``writers`` have written to its storage; this makes the order of writes a dependency."""
    return x


def with_data(x: Tensor, value: Tensor) -> Tensor:
    """``x.data = value`` as an expression; if autograd has saved ``x`` itself, that changes too."""
    x.data = value.detach()
    return x


def write_back(buffer: Tensor, value: Tensor) -> Tensor:
    """Copies the tensor that forward bound to a buffer's name into the buffer."""
    with torch.no_grad():
        return buffer.copy_(value)


@torch.no_grad()
def moments(x: Tensor) -> Tensor:
    """Returns the moments from which running statistics are computed, shape ``[3, features]``, float64.

    For each feature (dimension 1): the number of entries, their sum, and the sum of their squares. Moments of
    microbatches can be added.
    """
    dims = [dim for dim in range(x.ndim) if dim != 1]
    var, mean = torch.var_mean(x if x.dtype == torch.float64 else x.float(), dims, correction=0)
    var, mean, count = var.double(), mean.double(), torch.full_like(mean, x.numel() // x.shape[1]).double()
    return torch.stack([count, count * mean, count * (var + mean * mean)])


@torch.no_grad()
def add_moments(running_mean: Tensor, running_var: Tensor, total: Tensor, momentum: float) -> Tensor:
    """Updates running statistics as batch normalization does, from the moments of a whole batch."""
    count, summed, squares = total
    mean = summed / count
    var = (squares / count - mean * mean).clamp(min=0) * count / (count - 1)
    for running, now in ((running_mean, mean), (running_var, var)):
        running.copy_(running.double() * (1 - momentum) + now.to(running.device) * momentum)
    return running_mean


def part_of(value: Any, share: Tensor) -> Tensor:
    """Returns a microbatch's part of a value of the whole batch, by its share of the rows; keeps the dtype."""
    if isinstance(value, Tensor) and value.is_floating_point():
        share = share.to(value.dtype)
    part: Tensor = share * value
    return part


def masked_scatter_all(x: Tensor, mask: Tensor, source: Tensor) -> Tensor:
    """``x.masked_scatter(mask, source)`` that must use all of ``source``, so that each microbatch uses its own part."""
    if not isinstance(source, FakeTensor):
        places = int(mask.expand_as(x).sum())
        if places != source.numel():
            raise InputError(
                f"masked_scatter() has {source.numel()} entries for the {places} masked places of a microbatch, so "
                f"samples would use entries of other samples; use microbatches=1"
            )
    return x.masked_scatter(mask, source)


def valid_weight(target: Tensor, ignore_index: int, weight: Tensor | None) -> Tensor:
    """Returns the divisor of the mean of ``F.cross_entropy``: the number of valid targets, or their summed weights."""
    valid = target != ignore_index
    if weight is None:
        return valid.sum()
    return torch.where(valid, weight[torch.where(valid, target, 0)], 0).sum()


@functools.cache
def over(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Returns a function that sums a loss and divides it by a total: one microbatch's part of a mean over the batch.

    float16 is summed in float32, so that many entries do not overflow. Under autocast, losses do so themselves.
    """

    @functools.wraps(loss)
    def part(total: Tensor, scores: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        half = scores.dtype == torch.float16 and not torch.is_autocast_enabled(scores.device.type)
        summed = loss(scores.float() if half else scores, *args, **kwargs, reduction="sum") / total
        return summed.to(scores.dtype) if half else summed

    part.__name__ = f"{getattr(loss, '__name__', 'loss')}_part"
    part.__module__ = __name__
    return part


def is_traceable(function: Any) -> bool:
    """Whether ``torch.compile`` can trace a function of this file: it reads no values and registers no hooks."""
    return function in (setitem, after, part_of, valid_weight, moments) or _is_part(function)


def _is_part(function: Any) -> bool:
    """Whether ``over`` made a function, from a loss of torch's."""
    loss = getattr(function, "__wrapped__", None)
    return loss is not None and function is over(loss) and str(loss.__module__).partition(".")[0] == "torch"
