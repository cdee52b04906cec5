"""Which calls have a split form (``split_backward.py``), by what they read and with which options.

The forms ask it of the tensors that they get, and a graph asks it of a traced call, so that plans charge what is split.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor
from torch.nn import functional as F

from pipecompile.ir.split_nodes import SPLITTINGS


def fits_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    return weight.ndim == 2 and (bias is None or bias.shape == weight.shape[:1])  # bias may be broadcast


def fits_addmm(input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1) -> bool:
    return beta == 1 and alpha == 1 and input.shape == mat2.shape[1:]


def fits_matmul(input: Tensor, other: Tensor) -> bool:
    return input.ndim >= 2 and other.ndim == 2


def fits_embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> bool:
    return not sparse and max_norm is None


def fits_convolution(
    dims: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> bool:
    return not isinstance(padding, str) and input.ndim == dims + 2


@dataclass(frozen=True, slots=True)
class Splittable:
    """A function that has a split form.

    Attributes:
        name: of the form.
        places: the positions and names of the arguments that must be parameters; the first one is needed.
        fits: whether the form does with some arguments what the function does.
    """

    name: str
    places: Sequence[tuple[int, str]]
    fits: Callable[..., bool]


WEIGHT, BIAS = (1, "weight"), (2, "bias")
_FUNCTIONS: Mapping[str, tuple[Sequence[Any], Splittable]] = {
    "linear": ([F.linear], Splittable("linear", (WEIGHT, BIAS), fits_linear)),
    "addmm": ([torch.addmm, torch.Tensor.addmm], Splittable("addmm", ((2, "mat2"), (0, "input")), fits_addmm)),
    "matmul": ([torch.matmul, torch.Tensor.matmul], Splittable("matmul", ((1, "other"),), fits_matmul)),
    "embedding": ([F.embedding], Splittable("embedding", (WEIGHT,), fits_embedding)),
    "conv1d": ([F.conv1d], Splittable("conv1d", (WEIGHT, BIAS), partial(fits_convolution, 1))),
    "conv2d": ([F.conv2d], Splittable("conv2d", (WEIGHT, BIAS), partial(fits_convolution, 2))),
    "conv3d": ([F.conv3d], Splittable("conv3d", (WEIGHT, BIAS), partial(fits_convolution, 3))),
}
SPLITTABLE = {function: it for functions, it in map(_FUNCTIONS.__getitem__, SPLITTINGS) for function in functions}


def weights_of(call: fx.Node) -> Sequence[fx.Node] | None:
    """The arguments of a call that must be parameters if its backward is split; None if it cannot be."""
    if call.op != "call_function" or call.target not in SPLITTABLE:
        return None
    places = SPLITTABLE[call.target].places
    given = [call.args[place] if place < len(call.args) else call.kwargs.get(name) for place, name in places]
    weights = [each for each in given if isinstance(each, fx.Node)]
    return weights if isinstance(given[0], fx.Node) else None


def fits(call: fx.Node) -> bool:
    """Whether the split form of a traced call does what its function does, by its options and shapes."""
    args, kwargs = fx.map_arg((call.args, call.kwargs), lambda node: node.meta.get("val"))
    read = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    try:
        return bool(SPLITTABLE[call.target].fits(*args, **kwargs)) and not any(value.is_complex() for value in read)
    except (TypeError, AttributeError):  # other arguments, or such that are not traced
        return False
