"""Experiments on backwards that no rule covers: custom functions and operators, hooks, modules kept whole as leaves.

Such a backward may do anything: divide by the norm of all gradients, clip their sum, or count rows. Three properties
are checked: a sample's gradient does not change when other samples and their incoming gradients change; a part of a
whole batch gives the batch's gradients for that part; and two parts' gradients of a weight add up to the gradient of
both.
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

LEAST = 1e-2  # the least magnitude that a gradient's rounding is measured by
SCALE = 100.0  # of incoming gradients: large enough to be clipped
Gradients = dict[fx.Node, Tensor]
Incoming = Callable[[int, Tensor], Tensor]


class Backward:
    """Experiments on the backward of a region: gradients of its sources, from gradients of its outputs."""

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
        """Whether a sample's gradient depends on that sample alone, and gradients of shared values add up."""
        rows = (0, self.samples.rows - 1)
        return all(map(self._stays, rows)) and self.adds_up() and self._is_the_wholes_part()

    def adds_up(self) -> bool:
        """Whether gradients of shared values are linear in the incoming gradients."""
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

    def writes(self) -> bool:
        """Whether the backward writes into the incoming gradients."""
        drawn: list[tuple[Tensor, int]] = []

        def incoming(_: int, value: Tensor) -> Tensor:
            gradient = self._drawn(value)
            drawn.append((gradient, gradient._version))
            return gradient

        self._gradients(self.samples.bench, self.start, incoming)
        return any(gradient._version != version for gradient, version in drawn)

    def _stays(self, row: int) -> bool:
        """Whether a row's gradient stays the same when the other rows and their incoming gradients change."""
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
        """Whether a whole batch with incoming gradients in its last part only gives that part's own gradients."""
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
    """A value with zeros in the rows before ``first``; a third of a value without rows."""
    if not isinstance(kind, Batched):
        return value / 3
    split = by_rows(value, kind, rows).clone()
    split.narrow(kind.dim + 1, 0, first).zero_()
    return split.reshape(value.shape)
