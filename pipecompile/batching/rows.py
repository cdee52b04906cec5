"""Divides a batch into microbatches.

Batched tensors are divided along their first dimension into parts as equal as possible. All other arguments, and values
of the whole batch, go to every microbatch unchanged. Each microbatch also gets its share of the rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipecompile.batching.division import Before
from pipecompile.capture import Call
from pipecompile.capture.call import SHARE


@dataclass(frozen=True, slots=True)
class Rows:
    """The number of rows of each microbatch; they add up to the batch.

    Attributes:
        parts: the number of microbatches of each part of the batch that another pipeline runs; one part by default.
    """

    counts: tuple[int, ...]
    parts: tuple[int, ...] = ()

    @staticmethod
    def of(batch: int | None, microbatches: int) -> Rows:
        """Rows as equal as possible, larger microbatches first; no more microbatches than rows."""
        if batch is None:
            return Rows((1,))
        parts = min(batch, microbatches)
        return Rows(tuple(batch // parts + (i < batch % parts) for i in range(parts)))

    @staticmethod
    def of_parts(sizes: Sequence[int], microbatches: int) -> Rows:
        """The rows of a batch of several parts, each divided by itself."""
        each = [Rows.of(size, microbatches) for size in sizes]
        return Rows(tuple(count for rows in each for count in rows.counts), tuple(map(len, each)))

    @property
    def weights(self) -> tuple[float, ...]:
        """Each microbatch's share of the batch."""
        return tuple(count / sum(self.counts) for count in self.counts)

    def microbatches_of(self, part: int) -> slice:
        """The microbatches of a part."""
        parts = self.parts or (len(self),)
        return slice(sum(parts[:part]), sum(parts[: part + 1]))

    @property
    def by_part(self) -> Rows:
        """The rows of whole parts, as if each were a microbatch."""
        return Rows(tuple(sum(self.counts[self.microbatches_of(part)]) for part in range(len(self.parts) or 1)))

    def equal(self) -> Rows:
        """The most microbatches of equal size, in each part at most as many as these."""
        parts, sizes = self.parts or (len(self),), self.by_part.counts
        greatest, least = math.gcd(*sizes), max(-(-rows // most) for rows, most in zip(sizes, parts, strict=True))
        size = next((size for size in range(least, greatest + 1) if greatest % size == 0), greatest)
        return Rows((size,) * (sum(sizes) // size), tuple(rows // size for rows in sizes) if self.parts else ())

    def __len__(self) -> int:
        return len(self.counts)


def scatter(
    call: Call, rows: Rows, whole: Mapping[str, Tensor] | None = None, before: Sequence[Before] = ()
) -> list[dict[str, Tensor]]:
    """The contiguous input tensors of each microbatch, and the values of the whole batch that it reads."""
    parts: list[dict[str, Tensor]] = [dict(whole or {}) for _ in rows.counts]
    for each in before:
        if each.rows is not None and whole is not None:
            sizes = [count * each.rows.inner for count in rows.counts]
            for part, piece in zip(parts, torch.split(whole[each.name], sizes, each.rows.dim), strict=True):
                part[each.name] = piece.contiguous()
    for part, tensors in zip(parts, call.split(rows.counts) if call.batch else [call.tensors], strict=True):
        part.update({name: tensor.contiguous() for name, tensor in tensors.items()})
    for part, weight in zip(parts, rows.weights, strict=True):
        part[SHARE] = torch.tensor(weight, dtype=torch.float64)
    return parts
