"""Tries out the backward of what no rule covers: custom functions and operators, hooks, modules kept whole.

A backward is whatever its author wrote: it may divide by the norm of all gradients, clip a sum of them, or
count rows. So a sample's gradient must stay as the others change, with what comes into them; a part of a whole batch
must give what the batch gives there; and two parts' gradients of a weight must add up to those of both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from pipecompile.batching.region_runner import Bench
from pipecompile.batching.rules.batch_types import SHARED, Batched, Kind
from pipecompile.batching.trial_samples import Samples, around, by_rows, same_entries, same_rows

LEAST = 1e-2  # what counts as the largest entry of a gradient that is next to nothing
SCALE = 100.0  # of the gradients that come in: beyond what clips them
Gradients = dict[fx.Node, Tensor]
Incoming = Callable[[int, Tensor], Tensor]


class Backward:
    """Experiments on the backward of a region: what it hands to its sources, for gradients of its outputs."""

    def __init__(
        self,
        samples: Samples,
        sources: Sequence[fx.Node],
        outputs: Sequence[fx.Node],
        answers: Mapping[fx.Node, Kind | tuple[Kind, ...]],
    ) -> None:
        self.samples = samples
        self.sources = tuple(dict.fromkeys(sources))
        self.outputs = outputs
        kinds = [answers[n] for n in outputs]
        self.kinds = [k for kind in kinds for k in (kind if isinstance(kind, tuple) else (kind,))]
        self.generator = torch.Generator().manual_seed(0)
        self.start = {n: samples.draw(n, self.generator) for n in self.sources}

    def keeps_apart(self) -> bool:
        """Whether gradients of samples depend on nothing but these samples, and those of what they share add up."""
        rows = (0, self.samples.rows - 1)
        return all(map(self._stays, rows)) and self.adds_up() and self._is_the_wholes_part()

    def adds_up(self) -> bool:
        """Whether the gradients of what is shared are, for a sum of incoming gradients, the sum of those for each."""
        drawn: dict[int, Tensor] = {}

        def both(i: int, value: Tensor) -> Tensor:
            return drawn.setdefault(i, self._drawn(value))

        def one(i: int, value: Tensor) -> Tensor:
            return _rows_from(both(i, value), self.kinds[i], self.samples.rows, 1)

        total = self._gradients(self.samples.bench, self.start, both)
        left = self._gradients(self.samples.bench, self.start, one)
        right = self._gradients(self.samples.bench, self.start, lambda i, value: both(i, value) - one(i, value))
        shared = [n for n in total if not isinstance(self._kind(n), Batched)]
        return all(same_entries(total[n], left[n] + right[n], LEAST) for n in shared)

    def _stays(self, row: int) -> bool:
        """Whether a row's gradient stays when the other rows change, with what comes into them."""
        drawn: dict[int, Tensor] = {}
        rows = self.samples.rows

        def incoming(i: int, value: Tensor) -> Tensor:
            return drawn.setdefault(i, self._drawn(value))

        expected = self._gradients(self.samples.bench, self.start, incoming)
        changed = {n: self.samples.around(n, value, row, self.generator) for n, value in self.start.items()}
        seen = self._gradients(
            self.samples.bench,
            changed,
            lambda i, value: around(incoming(i, value), self.kinds[i], row, rows, self.generator),
        )
        return all(same_rows(expected[n], seen[n], self._kind(n), row, row, rows, least=LEAST) for n in expected)

    def _is_the_wholes_part(self) -> bool:
        """Whether a whole batch, into whose last part alone gradients come, gives what that part gives by itself."""
        samples, rows, most = self.samples, self.samples.rows, self.samples.whole.rows
        drawn: dict[int, Tensor] = {}

        def into_the_part(i: int, value: Tensor) -> Tensor:
            return drawn.setdefault(i, self._drawn(value))

        def into_the_whole(i: int, value: Tensor) -> Tensor:
            kind = self.kinds[i]
            if not isinstance(kind, Batched):
                return drawn[i]
            filled = by_rows(torch.zeros_like(value), kind, most)
            filled.narrow(kind.dim + 1, most - rows, rows).copy_(by_rows(drawn[i], kind, rows))
            return filled.reshape(value.shape)

        start = {n: samples.of_the_whole(n, self.generator) for n in self.sources}
        part = {n: samples.part(n, value, most - rows) for n, value in start.items()}
        found = self._gradients(samples.bench, part, into_the_part)
        twin = samples.scale.twin
        large = {twin[n]: value for n, value in start.items()}
        expected = samples.whole.gradients([twin[n] for n in self.outputs], large, into_the_whole)
        for n, gradient in found.items():
            whole = expected[twin[n]]
            whole = samples.part(n, whole, most - rows) if isinstance(self._kind(n), Batched) else whole
            if not same_entries(whole, gradient, LEAST):
                return False
        return True

    def _gradients(self, bench: Bench, values: Mapping[fx.Node, Any], incoming: Incoming) -> Gradients:
        return bench.gradients(self.outputs, values, incoming)

    def _kind(self, node: fx.Node) -> Kind:
        kind = self.samples.kinds.get(node, SHARED)
        return kind if not isinstance(kind, tuple) else SHARED

    def _drawn(self, value: Tensor) -> Tensor:
        drawn = torch.randn(value.shape, generator=self.generator, dtype=torch.float64)
        return (drawn * SCALE).to(value)


def _rows_from(value: Tensor, kind: Kind, rows: int, first: int) -> Tensor:
    """A value with zeros in the rows before one; a third of what has no rows."""
    if not isinstance(kind, Batched):
        return value / 3
    split = by_rows(value, kind, rows).clone()
    split.narrow(kind.dim + 1, 0, first).zero_()
    return split.reshape(value.shape)
