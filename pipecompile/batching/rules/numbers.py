"""Finds arguments of a call that count samples."""

from __future__ import annotations

from typing import Any

import torch.fx as fx
from torch import Tensor

from pipecompile.batching.rules.size_pair import Scale
from pipecompile.ops.functional import setitem
from pipecompile.ops.operators import function_of, named

# Functions whose numbers may be sizes of the result; the sizes of the result are checked instead.
TAKES_SIZES = named("""
    view reshape expand repeat tile broadcast_to unflatten flatten zeros ones empty full new_zeros new_ones new_empty
    new_full rand randn randint empty_strided arange getitem setitem split narrow slice
    _unsafe_view _reshape_alias repeat_interleave slice_backward select_backward
""") | {setitem: "setitem"}


def counts_samples(node: fx.Node, scale: Scale) -> bool:
    """Whether a call computes with a number that depends on the batch, which an experiment at one size cannot show."""
    twin = scale.twin[node]
    return function_of(node.target) not in TAKES_SIZES and _counts(
        (node.args, node.kwargs), (twin.args, twin.kwargs), scale
    )


def _counts(argument: Any, twin: Any, scale: Scale) -> bool:
    match argument:
        case fx.Node():
            value = argument.meta.get("val")
            return not isinstance(value, Tensor | tuple | list) and scale.grows(argument, twin)
        case tuple() | list():
            other = len(argument) != len(twin)  # its length depends on the batch
            return other or any(_counts(a, b, scale) for a, b in zip(argument, twin, strict=True))
        case dict():
            return any(_counts(item, twin[key], scale) for key, item in argument.items())
        case slice():
            ends = (argument.start, argument.stop, argument.step), (twin.start, twin.stop, twin.step)
            return _counts(*ends, scale)
        case int() | float():
            return bool(argument != twin)
    return False
