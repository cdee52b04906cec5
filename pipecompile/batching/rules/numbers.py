"""Numbers among a call's arguments that count samples, and the names by which calls are known."""

from __future__ import annotations

from typing import Any

import torch.fx as fx
from torch import Tensor

from pipecompile.batching.scale import Scale
from pipecompile.capture.purity import name_of

# Functions whose numbers may be sizes of the result, which are looked at instead.
TAKES_SIZES = frozenset(
    {
        "view", "reshape", "expand", "repeat", "tile", "broadcast_to", "unflatten", "flatten", "zeros", "ones", "empty",
        "full", "new_zeros", "new_ones", "new_empty", "new_full", "rand", "randn", "randint", "empty_strided", "arange",
        "getitem", "setitem", "split", "narrow", "slice", "_unsafe_view", "_reshape_alias",
    }
)  # fmt: skip


def counts_samples(node: fx.Node, scale: Scale) -> bool:
    """Whether a call computes with a number that depends on the batch: no experiment at one size would show it."""
    twin = scale.twin[node]
    return plain_name(node) not in TAKES_SIZES and _counts((node.args, node.kwargs), (twin.args, twin.kwargs), scale)


def _counts(argument: Any, twin: Any, scale: Scale) -> bool:
    match argument:
        case fx.Node():
            value = argument.meta.get("val")
            return not isinstance(value, Tensor | tuple | list) and scale.grows(argument, twin)
        case tuple() | list():
            return any(_counts(a, b, scale) for a, b in zip(argument, twin, strict=True))
        case dict():
            return any(_counts(item, twin[key], scale) for key, item in argument.items())
        case slice():
            ends = (argument.start, argument.stop, argument.step), (twin.start, twin.stop, twin.step)
            return _counts(*ends, scale)
        case int() | float():
            return bool(argument != twin)
    return False


def plain_name(node: fx.Node) -> str:
    """The name of a function without what marks in-place, reflected and special forms: add_, __radd__ -> radd."""
    name = name_of(node).removeprefix("__").removesuffix("__")
    if name.startswith("i") and name[1:] in ("add", "sub", "mul", "truediv", "floordiv", "and", "or", "xor"):
        return name[1:]
    return name.split(".")[0].rstrip("_") or name
