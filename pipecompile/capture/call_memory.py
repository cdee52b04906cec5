"""Calls like an earlier one are read like it: only their tensors are other ones.

Most calls of a training loop are alike, and to bind, flatten and name their arguments takes longer than what else is
done before a small step. Arguments that are tensors, or numbers and strings, are compared by what a call is read from;
any other argument may hold what is not seen, so such a call is read anew.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from pipecompile.capture.batch_dims import Dims, Settled
from pipecompile.capture.call import Call, read_call

MOST = 64  # kinds of calls that are remembered
SIMPLE = (type(None), bool, int, str)
TENSORS = (Tensor, nn.Parameter)


@dataclass(frozen=True)
class CallMemory:
    """How calls were read.

    Attributes:
        known: by kind, the call without its tensors, and the place of each tensor among the arguments.
    """

    known: dict[Any, tuple[Call, Mapping[str, int]]] = field(default_factory=dict)

    def read(
        self,
        forward: Callable[..., Any],
        signature: Callable[[], Callable[..., Any]],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        settled: Settled,
        in_dims: Dims | None,
    ) -> Call:
        """Reads a call as ``read_call`` does.

        Args:
            forward: What decides the signature.
            signature: Returns a callable that has it.
            settled: Only grows.
            in_dims: The same in all calls.
        """
        values = [*args, *kwargs.values()]
        kind = _kind(forward, values, len(args), tuple(kwargs), len(settled))
        if kind in self.known:
            call, places = self.known[kind]
            return replace(call, tensors={name: values[place] for name, place in places.items()})
        call = read_call(signature(), args, kwargs, settled, in_dims)
        if kind is not None and not (call.dims or call.cached or call.has_cache):
            if len(self.known) >= MOST:
                self.known.clear()
            place_of = {id(value): place for place, value in enumerate(values)}
            places = {name: place_of[id(tensor)] for name, tensor in call.tensors.items()}
            self.known[kind] = replace(call, tensors={}), places
        return call


def _kind(
    forward: Callable[..., Any], values: Sequence[Any], count: int, names: tuple[str, ...], settled: int
) -> Any | None:
    """What a call is read from; None if that is more than can be compared, or has one tensor twice."""
    function = getattr(forward, "__func__", forward)
    if type(function) is not FunctionType:
        return None
    described: list[Any] = []
    tensors: set[int] = set()
    for value in values:
        kind = type(value)
        if kind in TENSORS and value.layout == torch.strided and value.is_contiguous() and id(value) not in tensors:
            tensors.add(id(value))
            described.append((kind, value.dtype, value.shape, value.requires_grad))
        elif kind in SIMPLE:
            described.append((kind, value))
        else:
            return None
    return function, function.__code__, tuple(described), count, names, settled
