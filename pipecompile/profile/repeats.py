"""Nodes like earlier ones, in the same surroundings, which a profile need not run again.

The layers of a model repeat the same functions on the same shapes. A node that does what ``TIMES`` earlier ones did,
after ``AROUND`` nodes that did the same, would only be timed once more. It is not run: its value is a copy of that of
the last one that ran, in memory laid out alike. What autograd would keep for it is known from there too, as positions
among its operands and outputs. Nodes in other surroundings run, even if equal ones have been timed: a stretch that is
timed is a whole part of a model, with the caches as a stage has them. Values are held from the ``TIMES``-th run on, so
what is held is about one layer, and nothing of a model without layers alike.

The copies have the values of another layer, so in a graph with sizes that depend on data, all nodes run. A node may
fail on such values (an index beyond a shorter table); then all nodes run (``profiler.py``).
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from pipecompile.capture.functionalize import storage_key
from pipecompile.capture.origin import origin_of
from pipecompile.ops.operators import is_opaque
from pipecompile.profile.call import map_tensors, tensors_of
from pipecompile.profile.storages import has_storage

TIMES = 3  # nodes alike that run
AROUND = 8  # nodes before one that must be alike too


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor's memory is.

    Attributes:
        of: "operand" or "output", whose memory it is, or "own".
        position: among the tensors of the operands, or of the outputs.
        offset: in elements, from the beginning of that tensor's elements.
        nbytes: of memory of its own.
    """

    of: str
    position: int = 0
    offset: int = 0
    nbytes: int = 0


@dataclass(frozen=True, slots=True)
class Repeat:
    """What one of several nodes alike leaves to the later ones.

    Attributes:
        value: its value.
        outputs: the place of each tensor in it.
        saved: the places of what autograd keeps.
    """

    value: Any
    outputs: tuple[Place, ...]
    saved: tuple[Place, ...]

    def again(self, operands: Sequence[Tensor]) -> tuple[Any, list[Tensor]]:
        """The value of a node alike, and the tensors that autograd would keep for it."""
        made: list[Tensor] = []
        for like, place in zip(tensors_of(self.value), self.outputs, strict=True):
            made.append(_copy(like) if place.of == "own" else _view(like, place, operands, made))
        each = iter(made)
        value = map_tensors(lambda tensor: next(each), self.value)
        return value, [_kept(place, operands, made) for place in self.saved]


class Repeats:
    """The nodes of one graph that have run, by what they do and what is around them.

    Args:
        off: whether all nodes are to run, as those of a graph with sizes that depend on data.

    Attributes:
        used: whether a node has not been run.
    """

    def __init__(self, off: bool) -> None:
        self.off = off
        self.used = False
        self.recent: deque[int] = deque(maxlen=AROUND + 1)
        self.ran: Counter[tuple[int, ...]] = Counter()
        self.found: dict[Any, Repeat | None] = {}  # None: nodes alike run each time

    def of(self, key: Any, operands: Sequence[Tensor]) -> Repeat | None:
        """What an earlier node leaves to this one; None if this one is to run.

        Args:
            key: what the node does, and on which shapes.
            operands: the tensors that it reads.
        """
        self.recent.append(hash(key))
        around = tuple(self.recent)
        if self.off or self.ran[around] < TIMES:
            self.ran[around] += 1
            return None
        found = self.found.get((key, _shared(operands)))
        self.used = self.used or found is not None
        return found

    def add(self, node: fx.Node, key: Any, operands: Sequence[Tensor], value: Any, saved: Sequence[Tensor]) -> None:
        """Notes a node that has run, after ``of``, if nodes alike need not run from now on.

        Args:
            node: what has run.
            key: what it does, and on which shapes.
            operands: the tensors that it has read.
            value: its value, without its autograd graph.
            saved: the tensors that autograd keeps for it.
        """
        full = key, _shared(operands)
        if not self.off and self.ran[tuple(self.recent)] >= TIMES and full not in self.found:
            self.found[full] = _repeat(node, operands, value, saved)


def _repeat(node: fx.Node, operands: Sequence[Tensor], value: Any, saved: Sequence[Tensor]) -> Repeat | None:
    """What the node leaves to others; None if a value alike cannot be made without running it."""
    outputs = tensors_of(value)
    plain = isinstance(value, Tensor) or (type(value) in (tuple, list) and all(isinstance(v, Tensor) for v in value))
    if not plain or node.op != "call_function" or origin_of(node).mutates or is_opaque(node.target):
        return None
    if not all(type(t) in (Tensor, torch.nn.Parameter) and has_storage(t) for t in (*operands, *outputs, *saved)):
        return None
    places = [_place(output, operands, outputs[:position]) for position, output in enumerate(outputs)]
    if not all(_is_view_like(output, place, operands, outputs) for output, place in zip(outputs, places, strict=True)):
        return None
    kept = {storage_key(tensor): _place(tensor, operands, outputs) for tensor in saved}
    return Repeat(value, tuple(places), tuple(kept.values()))


def _place(tensor: Tensor, operands: Sequence[Tensor], outputs: Sequence[Tensor]) -> Place:
    key = storage_key(tensor)
    for of, others in (("operand", operands), ("output", outputs)):
        for position, other in enumerate(others):
            if storage_key(other) == key:
                return Place(of, position, int(tensor.storage_offset() - other.storage_offset()))
    return Place("own", nbytes=tensor.untyped_storage().nbytes())


def _is_view_like(output: Tensor, place: Place, operands: Sequence[Tensor], outputs: Sequence[Tensor]) -> bool:
    """Whether sizes, strides and an offset are all that tells an output from the tensor whose memory it has."""
    if output.is_conj() or output.is_neg() or place.of == "own":
        return place.of == "own"
    return (operands if place.of == "operand" else outputs)[place.position].dtype == output.dtype


def _shared(operands: Sequence[Tensor]) -> tuple[int, ...]:
    """Which operands share memory: for each, the position of the first one in the same memory."""
    first: dict[int | None, int] = {}
    return tuple(first.setdefault(storage_key(tensor), position) for position, tensor in enumerate(operands))


def _copy(like: Tensor) -> Tensor:
    storage = like.untyped_storage().clone()  # type: ignore[no-untyped-call]
    return torch.empty(0, dtype=like.dtype).set_(storage, like.storage_offset(), like.size(), like.stride())


def _view(like: Tensor, place: Place, operands: Sequence[Tensor], outputs: Sequence[Tensor]) -> Tensor:
    base = (operands if place.of == "operand" else outputs)[place.position].detach()
    return base.as_strided(like.size(), like.stride(), base.storage_offset() + place.offset)


def _kept(place: Place, operands: Sequence[Tensor], outputs: Sequence[Tensor]) -> Tensor:
    if place.of == "own":
        return torch.empty(place.nbytes, dtype=torch.uint8)
    return (operands if place.of == "operand" else outputs)[place.position]
