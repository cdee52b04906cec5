"""Kinds: how the value of a microbatch relates to the value of the whole batch.

    Shared     equal in every microbatch and in the whole batch
    Batched    the whole batch's value concatenates the microbatches' values along one dimension
    Partial    the whole batch's value is the sum of the microbatches' values
    Local      row numbers, counted from the first row of the microbatch: only for indexing rows
    Mixed      none of these: samples mix, and only the whole batch gives the value

The kind of a value follows from the kinds of its operands, function by function (see ``rules``). It must hold for any
number of microbatches of any sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Shared:
    """Equal in every microbatch: computed from parameters, from inputs without a batch, or from numbers."""


@dataclass(frozen=True, slots=True)
class Batched:
    """Concatenated along ``dim``, whose size is ``outer * rows * inner``.

    A sample has ``outer`` blocks of ``inner`` neighboring entries, as after flattening. If ``ragged``, the number of
    entries of a sample depends on values, as after indexing by a boolean mask.
    """

    dim: int
    outer: int = 1
    inner: int = 1
    ragged: bool = False

    def at(self, dim: int) -> Batched:
        """The same kind along another dimension."""
        return Batched(dim, self.outer, self.inner, self.ragged)


@dataclass(frozen=True, slots=True)
class Partial:
    """A part of a sum over the microbatches.

    If ``mean``, each part is first multiplied by its microbatch's share of the batch's rows.
    """

    mean: bool = False


@dataclass(frozen=True, slots=True)
class Local:
    """Row numbers within a microbatch, along ``dim``."""

    dim: int


@dataclass(frozen=True, slots=True)
class Mixed:
    """Samples mix; ``why`` says what mixes them.

    If ``certain``, the function itself mixes samples, so that an experiment on it alone is not needed.
    If samples may stay apart and something else is in the way, ``why`` says that, and ``instead`` what to do.
    """

    why: str
    certain: bool = False
    instead: str = ""


Kind = Shared | Batched | Partial | Local | Mixed
SHARED = Shared()
PARTIAL = Partial()


def is_mixed(kind: Kind | tuple[Kind, ...]) -> bool:
    """Whether a kind, or any kind of a tuple, is mixed."""
    return any(isinstance(k, Mixed) for k in (kind if isinstance(kind, tuple) else (kind,)))


def common(kinds: Sequence[Kind]) -> Kind | None:
    """The kind that all values have; None if they differ."""
    first = kinds[0] if kinds else SHARED
    return first if all(kind == first for kind in kinds) else None
