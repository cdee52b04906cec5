"""Random numbers for comparing two runs of a model: the same for every row, for any number of rows.

A pipeline draws per microbatch, the unsplit model for the whole batch, so equal seeds give different numbers. Here the
numbers depend only on the position in the last dimension (for vectors and single numbers, on nothing), so that a
microbatch draws its part of the whole batch's numbers. Both runs use them; training draws other numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pipecompile.ops.operators import named

Arguments = Mapping[str, Any]
Fill = Callable[[Tensor, Arguments], Any]  # uniform numbers, arguments by name -> values

_DROPOUT = named(
    "dropout dropout1d dropout2d dropout3d alpha_dropout feature_dropout feature_alpha_dropout", aten=False
)
_ATTENTION = named("scaled_dot_product_attention", aten=False)


def _uniform(u: Tensor, given: Arguments) -> Any:
    low, high = given.get("from", 0.0), given.get("to", 1.0)
    return low + (high - low) * u


def _standard_normal(u: Tensor, given: Arguments) -> Any:
    return torch.special.ndtri(u.clamp(1e-6, 1 - 1e-6))


def _normal(u: Tensor, given: Arguments) -> Any:
    mean, std = given.get("mean", 0.0), given.get("std", 1.0)
    return _standard_normal(u, given) * std + mean


def _integers(u: Tensor, given: Arguments) -> Any:
    low, high = given.get("low", 0), given["high"]
    return low + torch.floor(u * (high - low))


def _bernoulli(u: Tensor, given: Arguments) -> Any:
    return u < given["p"]


def _exponential(u: Tensor, given: Arguments) -> Any:
    return -torch.log1p(-u) / given.get("lambd", 1.0)


def _poisson(u: Tensor, given: Arguments) -> Any:
    rates = given["input"]
    return torch.floor(rates + rates.sqrt() * _standard_normal(u, given)).clamp_min(0)


def _multinomial(u: Tensor, given: Arguments) -> Any:
    """Draws with replacement invert the distribution; others take the largest of perturbed logarithms (Gumbel)."""
    weights = given["input"].double()
    if given.get("replacement", False):
        ends = (weights / weights.sum(-1, keepdim=True)).cumsum(-1)
        places = u.expand(*weights.shape[:-1], given["num_samples"]).contiguous()
        return torch.searchsorted(ends, places, right=True).clamp_max(weights.shape[-1] - 1)
    spread = (u.reshape(-1)[0] + 0.618034 * torch.arange(1, weights.shape[-1] + 1, device=u.device)) % 1
    return (weights.log() - torch.log(-torch.log(spread.clamp(1e-6, 1 - 1e-6)))).topk(given["num_samples"]).indices


# How values are computed from uniform numbers.
_FILLS: Mapping[str, Fill] = {
    "rand": _uniform,
    "rand_like": _uniform,
    "uniform": _uniform,
    "randn": _standard_normal,
    "randn_like": _standard_normal,
    "normal": _normal,
    "randint": _integers,
    "randint_like": _integers,
    "bernoulli": _bernoulli,
    "exponential": _exponential,
    "poisson": _poisson,
    "multinomial": _multinomial,
}
_PARAMETERS = {
    "uniform": ("from", "to"),
    "normal": ("mean", "std"),
    "exponential": ("lambd",),
    "poisson": ("input",),
    "multinomial": ("input", "num_samples", "replacement"),
}
_NAMES = named(" ".join(_FILLS), aten=False)


def draws_by_row(function: Callable[..., Any]) -> bool:
    """Whether a random function can use numbers that do not depend on the number of rows."""
    return function in _DROPOUT or function in _NAMES or function in _ATTENTION


def drawn_by_row(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], seed: int) -> Any:
    """Calls a random function with numbers that are the same for every row.

    Attention is called without dropout, because its mask cannot be set from outside.
    """
    if function in _ATTENTION:
        return _without_dropout(function, args, kwargs)
    in_place = function.__name__.endswith("_")
    if function in _DROPOUT:
        return _dropped(in_place, args, kwargs, seed)
    name = _NAMES[function]
    out: Tensor = function(*args, **kwargs)
    given = _given(name, in_place, args, kwargs)
    with torch.no_grad():
        return out.copy_(_FILLS[name](_numbers(out, seed), given))


def _given(name: str, in_place: bool, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the parameters of the distribution from the arguments of a call."""
    if name in ("randint", "randint_like"):
        return _bounds(args[1:] if name == "randint_like" else args, kwargs)
    if name == "bernoulli":
        first = args[1] if len(args) > 1 else kwargs.get("p")
        probabilities = args[0] if args else kwargs.get("input")
        return {"p": first if first is not None else 0.5 if in_place else probabilities}
    names = _PARAMETERS.get(name, ())
    return {**dict(zip(names, args[in_place:], strict=False)), **kwargs}


def _bounds(args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the bounds of random integers: ``randint(high, size)`` or ``randint(low, high, size)``."""
    numbers = [a for a in args if isinstance(a, int | float | torch.SymInt) or (isinstance(a, Tensor) and a.ndim == 0)]
    low, high = kwargs.get("low"), kwargs.get("high")
    if high is None and numbers:
        high = numbers.pop()
    if low is None:
        low = numbers.pop() if numbers else 0
    return {"low": low, "high": high}


def _numbers(like: Tensor, seed: int) -> Tensor:
    """Returns uniform numbers for the last dimension of a tensor; a single number for a vector."""
    count = like.shape[-1] if like.ndim > 1 else 1
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(count, generator=generator, dtype=torch.float64).to(like.device)
    return drawn if like.ndim else drawn[0]


def _dropped(in_place: bool, args: Sequence[Any], kwargs: Mapping[str, Any], seed: int) -> Tensor:
    given = {**dict(zip(("input", "p", "training", "inplace"), args, strict=False)), **kwargs}
    x, p = given["input"], float(given.get("p", 0.5))
    keep = _numbers(x, seed) >= p
    keep = keep if bool(keep.any()) or p == 1.0 else torch.ones_like(keep)
    scale = (keep.to(x.dtype) / (1 - p)) if p < 1.0 else torch.zeros_like(keep, dtype=x.dtype)
    result: Tensor = x.mul_(scale) if in_place or given.get("inplace", False) else x * scale
    return result


def _without_dropout(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    if len(args) > 4:
        return function(*args[:4], 0.0, *args[5:], **kwargs)
    return function(*args, **{**kwargs, "dropout_p": 0.0})
