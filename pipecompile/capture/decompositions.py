"""Functions that the tracer records as several: the result, and a write to a buffer that is exact once per batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipecompile.ops.torch_internals import pytree


def decomposition_of(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Returns the function to trace in place of a call, or None to record the call as it is."""
    if kwargs.get("out") is not None:
        return _written(func) if _fits(func, args, kwargs) else None
    if func is not F.instance_norm:
        return None
    given = signature(_tracked_instance_norm).bind(*args, **kwargs)
    given.apply_defaults()
    tracked = given.arguments["use_input_stats"] and given.arguments["running_mean"] is not None
    return _tracked_instance_norm if tracked else None


def _fits(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether ``out=`` has the shapes and dtypes of the results; torch resizes or casts into others."""
    given = (*pytree.tree_leaves((args, dict(kwargs))),)
    if torch.is_grad_enabled() and any(isinstance(item, Tensor) and item.requires_grad for item in given):
        return False  # an error of torch's
    try:
        with torch.no_grad():
            results = func(*args, **{name: value for name, value in kwargs.items() if name != "out"})
    except Exception:  # such as a function that needs it
        return False
    pairs = [*zip(_each(kwargs["out"]), _each(results), strict=False)]
    return all(to.shape == value.shape and to.dtype == value.dtype for to, value in pairs)


def _written(func: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function that computes results and copies them into ``out``: two calls that have rules."""

    def run(*args: Any, out: Any, **kwargs: Any) -> Any:
        results = func(*args, **kwargs)
        for to, value in zip(_each(out), _each(results), strict=True):
            to.copy_(value)
        return out if isinstance(results, Tensor) else type(results)(out)

    return run


def _each(out: Any) -> tuple[Tensor, ...]:
    return (out,) if isinstance(out, Tensor) else tuple(out)


def _tracked_instance_norm(
    input: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Instance normalization that moves its running statistics by the means of those of all samples.

    torch writes them inside the kernel. As a write of a mean over the batch, they are those of the whole batch.
    """
    with torch.no_grad():
        places = input.detach().flatten(2).to(running_mean.dtype)
        running_mean.lerp_(places.mean(2).mean(0), momentum)
        running_var.lerp_(places.var(2).mean(0), momentum)
    return F.instance_norm(input, None, None, weight, bias, True, momentum, eps)
