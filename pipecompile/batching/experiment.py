"""Tries out what no rule covers: does each sample's result depend on that sample alone?

A module (a mixture of experts sorts the tokens of all samples and puts them back), or a function without a rule, is run
on random samples, then with all samples but one replaced. If that one's results stay, for the first sample and for the
last, with copies of it and with strangers around it, and as samples change places, the module keeps samples apart.
And a whole batch's results must be its parts' side by side: what deals out a number of places (the capacity of an
expert) may keep the few samples of a part apart, and not the many of a batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.fx as fx
import torch.utils._pytree as pytree
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from pipecompile.batching.bench import Bench
from pipecompile.batching.kinds import SHARED, Batched, Kind, Mixed, Shared
from pipecompile.batching.rules.numbers import counts_samples
from pipecompile.batching.scale import UNKNOWN, Scale
from pipecompile.capture import Captured
from pipecompile.capture.origin import origin_of

STRANGERS = 3  # times that the other rows are drawn
TOLERANCE = 1e3  # roundings of the result's largest entry that another order of additions may leave


class Experiment:
    """Experiments on a trace at a microbatch's rows, and on its twin at the whole batch's."""

    def __init__(
        self, small: Captured, large: Captured, scale: Scale, kinds: Mapping[fx.Node, Kind | tuple[Kind, ...]]
    ) -> None:
        self.captured = small
        self.scale = scale
        self.kinds = kinds
        self.rows = scale.fewer if (small.call.batch or 1) >= scale.fewer else small.microbatch
        self.bench = Bench(small, self.rows)
        self.whole = Bench(large, scale.whole)

    def by_growth(self, node: fx.Node) -> Kind | tuple[Kind, ...]:
        """The kind of a result by its shape alone."""
        items = [self._by_growth(node, i) for i in self._items(node)]
        return tuple(items) if items else self._by_growth(node, None)

    def kinds_of(self, region: Sequence[fx.Node]) -> dict[fx.Node, Kind | tuple[Kind, ...]] | None:
        """The kinds of what a region gives to the rest of the graph; None if it mixes samples, or cannot be tried."""
        members = set(region)
        sources = [n for node in region for n in node.all_input_nodes if n not in members]
        outputs = [n for n in region if any(user not in members for user in n.users)]
        answers = {n: self.by_growth(n) for n in outputs}
        flat = [k for kind in answers.values() for k in (kind if isinstance(kind, tuple) else (kind,))]
        if not flat or any(isinstance(kind, Mixed) for kind in flat):
            return None
        if any(not isinstance(self.kinds.get(n, SHARED), Batched | Shared) for n in sources):
            return None
        if any(t.is_meta for t in self.captured.tensors.values()):
            return answers  # nothing will run
        if self.rows < 2:
            return None
        if any(origin_of(n).writes and n.op != "call_module" for n in region):
            return None
        if any(counts_samples(n, self.scale) for n in region if not self._is_size(n)):
            return None  # at the rows of the experiment nobody would see it
        try:
            apart = all(self._apart(sources, outputs, answers, row) for row in (0, self.rows - 1))
            apart = apart and self._side_by_side(sources, outputs, answers)
        except Exception:  # the region cannot be run by itself
            return None
        return answers if apart else None

    def _is_size(self, node: fx.Node) -> bool:
        value = node.meta.get("val")
        return not isinstance(value, Tensor | tuple | list)

    def _apart(
        self,
        sources: Sequence[fx.Node],
        outputs: Sequence[fx.Node],
        answers: Mapping[fx.Node, Kind | tuple[Kind, ...]],
        row: int,
    ) -> bool:
        """Whether a row's results stay when the other rows change."""
        generator = torch.Generator().manual_seed(row)
        start = {n: self._sample(n, generator) for n in dict.fromkeys(sources)}
        expected = self.bench.run(outputs, start)
        draws = [None, *[generator] * STRANGERS]
        others = [{n: self._around(n, value, row, draw) for n, value in start.items()} for draw in draws]
        for changed in others:
            seen = self.bench.run(outputs, changed)
            if not all(_same_rows(expected[n], seen[n], answers[n], row, row, self.rows) for n in outputs):
                return False
        if not all(
            torch.equal(*pair) for n in outputs for pair in _pairs(expected[n], self.bench.run([n], start, 1)[n])
        ):
            return True  # it draws random numbers, by place
        moved = self.bench.run(outputs, {n: self._moved(n, value) for n, value in start.items()})
        to = (row + 1) % self.rows
        return all(_same_rows(expected[n], moved[n], answers[n], row, to, self.rows) for n in outputs)

    def _side_by_side(
        self,
        sources: Sequence[fx.Node],
        outputs: Sequence[fx.Node],
        answers: Mapping[fx.Node, Kind | tuple[Kind, ...]],
    ) -> bool:
        """Whether the first and the last part of a whole batch give what the batch gives there."""
        twin, rows, most = self.scale.twin, self.rows, self.whole.rows
        generator = torch.Generator().manual_seed(most)
        start = {n: self._of_the_whole(n, generator) for n in dict.fromkeys(sources)}
        large = {twin[n]: value for n, value in start.items()}
        twins = [twin[n] for n in outputs]
        expected, again = self.whole.run(twins, large), self.whole.run(twins, large, 1)
        if not all(torch.equal(*pair) for n in twins for pair in _pairs(expected[n], again[n])):
            return True  # it draws random numbers, by place
        for first in (0, most - rows):
            found = self.bench.run(outputs, {n: self._part(n, value, first) for n, value in start.items()})
            for n in outputs:
                seen = expected[twin[n]], found[n]
                if not all(_same_rows(*seen, answers[n], first + row, row, most, rows) for row in range(rows)):
                    return False
        return True

    def _of_the_whole(self, node: fx.Node, generator: torch.Generator) -> Any:
        """A value of the whole batch for an input of a region, as ``_sample`` gives one of a part."""
        twin = self.scale.twin[node]
        value = twin.meta.get("val")
        if isinstance(value, Tensor) and self._is_drawn(node, value):
            shape = self.scale.whole_shape(value)
            shape = self.whole.value(twin).shape if UNKNOWN in shape else shape
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(value.dtype)
        return self.whole.value(twin)

    def _part(self, node: fx.Node, value: Any, first: int) -> Any:
        """What a part of a whole batch has of one of its values: its rows, or what is alike, or its own sizes."""
        kind = self.kinds.get(node, SHARED)
        if not isinstance(value, Tensor):
            return self.bench.value(node)
        if not isinstance(kind, Batched):
            return value
        part = _by_rows(value, kind, self.whole.rows).narrow(kind.dim + 1, first, self.rows)
        return part.reshape(*value.shape[: kind.dim], -1, *value.shape[kind.dim + 1 :])

    def _is_drawn(self, node: fx.Node, value: Tensor) -> bool:
        """Whether a value is an activation, for which any numbers will do."""
        return value.is_floating_point() and isinstance(self.kinds.get(node, SHARED), Batched)

    def _sample(self, node: fx.Node, generator: torch.Generator) -> Any:
        """A value for an input of a region: random numbers for activations, the true value for all else."""
        value = node.meta.get("val")
        if isinstance(value, Tensor) and self._is_drawn(node, value):
            shape = self.scale.sizes(value, False)
            if UNKNOWN not in shape and self.rows == self.scale.fewer:
                return torch.randn(shape, generator=generator, dtype=torch.float64).to(value.dtype)
            real = self.bench.value(node)
            return torch.randn(real.shape, generator=generator, dtype=torch.float64).to(value.dtype)
        return self.bench.value(node)

    def _around(self, node: fx.Node, value: Any, row: int, generator: torch.Generator | None) -> Any:
        """A value with all rows but one changed: to copies of that one, or to random or other samples."""
        kind = self.kinds.get(node, SHARED)
        if not isinstance(kind, Batched) or not isinstance(value, Tensor):
            return value
        split = _by_rows(value, kind, self.rows).clone()
        keep = split.select(kind.dim + 1, row).clone()
        if generator is None:
            split.copy_(keep.unsqueeze(kind.dim + 1).expand_as(split))
        elif value.is_floating_point():
            split.copy_(torch.randn(split.shape, generator=generator, dtype=torch.float64).to(value.dtype))
            split.select(kind.dim + 1, row).copy_(keep)
        else:
            drawn = torch.randint(self.rows, (self.rows,), generator=generator)
            split.copy_(split.index_select(kind.dim + 1, drawn))
            split.select(kind.dim + 1, row).copy_(keep)
        return split.reshape(value.shape)

    def _moved(self, node: fx.Node, value: Any) -> Any:
        """A value with each row in the next one's place: a sample's result must not depend on where it stands."""
        kind = self.kinds.get(node, SHARED)
        if not isinstance(kind, Batched) or not isinstance(value, Tensor):
            return value
        return _by_rows(value, kind, self.rows).roll(1, kind.dim + 1).reshape(value.shape)

    def _items(self, node: fx.Node) -> range:
        value = node.meta.get("val")
        return range(len(value)) if isinstance(value, tuple | list) else range(0)

    def _by_growth(self, node: fx.Node, item: int | None) -> Kind:
        growing = self.scale.growing(node, item)
        if not growing:
            value = node.meta.get("val")
            value = value[item] if isinstance(value, tuple | list) and item is not None else value
            return Mixed(f"{node.name} has no batch dimension") if isinstance(value, Tensor) else SHARED
        shape = self.scale.shapes(node)[item or 0]
        if len(growing) > 1 or shape is None or shape[growing[0]] % self.scale.rows:
            return Mixed(f"{node.name} has samples in several dimensions")
        return Batched(growing[0], 1, shape[growing[0]] // self.scale.rows)


def _pairs(one: Any, other: Any) -> list[tuple[Tensor, Tensor]]:
    pairs = zip(pytree.tree_leaves(one), pytree.tree_leaves(other), strict=True)
    return [(a, b) for a, b in pairs if isinstance(a, Tensor)]


def _by_rows(value: Tensor, kind: Batched, rows: int) -> Tensor:
    """A tensor with its batch dimension taken apart into outer, rows, inner."""
    shape = value.shape
    return value.reshape(*shape[: kind.dim], kind.outer, rows, kind.inner, *shape[kind.dim + 1 :])


def _same_rows(
    expected: Any, seen: Any, kind: Kind | tuple[Kind, ...], row: int, other: int, rows: int, others: int | None = None
) -> bool:
    """Whether a row of one result equals another row of another, which may have another number of rows."""
    if isinstance(kind, tuple):
        pairs = zip(pytree.tree_leaves(expected), pytree.tree_leaves(seen), kind, strict=True)
        return all(_same_rows(a, b, k, row, other, rows, others) for a, b, k in pairs)
    if not isinstance(kind, Batched) or not isinstance(expected, Tensor):
        return True
    with torch._C.DisableTorchFunction(), _disable_current_modes():
        a = _by_rows(expected, kind, rows).select(kind.dim + 1, row)
        b = _by_rows(seen, kind, others or rows).select(kind.dim + 1, other)
        if not expected.is_floating_point():
            return bool((a == b).all())
        scale = max(float(a.abs().max()), 1e-6) if a.numel() else 1.0
        return bool(((a - b).abs() <= TOLERANCE * torch.finfo(a.dtype).eps * scale).all())
