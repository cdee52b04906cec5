"""How a value of one microbatch relates to that of the whole batch.

    Shared     equal in every microbatch and in the whole batch
    Batched    the whole batch's is the microbatches' side by side, along one dimension
    Partial    the whole batch's is the sum of the microbatches'
    Local      numbers of rows, counted from the microbatch's first: good for picking rows and for nothing else
    Mixed      none of these: samples mix, and only the whole batch gives the value

A value is typed from the values that it is computed from, function by function (see ``rules``). What is true of a
microbatch must be true for any number of microbatches, of any sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Shared:
    """Equal everywhere: computed from parameters, from inputs without a batch, or from numbers."""


@dataclass(frozen=True, slots=True)
class Batched:
    """Side by side along ``dim``, whose size is ``outer * rows * inner``: a sample's entries are ``outer`` blocks of
    ``inner`` neighbours, as flattening leaves them.

    ``ragged``: the number of entries of a sample is known from values only (what a boolean mask picks).
    """

    dim: int
    outer: int = 1
    inner: int = 1
    ragged: bool = False

    def at(self, dim: int) -> Batched:
        """The same, along another dimension."""
        return Batched(dim, self.outer, self.inner, self.ragged)


@dataclass(frozen=True, slots=True)
class Partial:
    """Adds up over the microbatches.

    ``mean``: it does once each part is multiplied by its microbatch's share of the batch's rows.
    """

    mean: bool = False


@dataclass(frozen=True, slots=True)
class Local:
    """Row numbers within a microbatch, along ``dim``."""

    dim: int


@dataclass(frozen=True, slots=True)
class Mixed:
    """Samples mix; ``why`` says what does it.

    ``certain``: by what the function is, so that nobody need try it out by itself.
    """

    why: str
    certain: bool = False


Kind = Shared | Batched | Partial | Local | Mixed
SHARED = Shared()
PARTIAL = Partial()


def is_mixed(kind: Kind | tuple[Kind, ...]) -> bool:
    """Whether a value, or an item of a tuple, is mixed."""
    return any(isinstance(k, Mixed) for k in (kind if isinstance(kind, tuple) else (kind,)))


def common(kinds: Sequence[Kind]) -> Kind | None:
    """The kind that several values agree on; None if they do not."""
    first = kinds[0] if kinds else SHARED
    return first if all(kind == first for kind in kinds) else None
