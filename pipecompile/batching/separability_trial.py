"""Experiments on what no rule covers: does each sample's result depend on that sample alone?

A module or a function without a rule runs on random samples, then with all samples but one replaced. (A mixture of
experts, for example, sorts the tokens of all samples and puts them back.) It keeps samples apart if the result of that
one sample stays the same: for the first and the last sample, among copies of it and among random samples, and after
samples change places. Code that branches on data (``if x.abs().max() > 2: break``) also runs on small samples among
large ones, and on samples among zeros, so that a branch taken for other samples shows (and see ``reads_trial.py``).
The results of a whole batch must also be those of its parts, concatenated: an expert of limited capacity may keep the
few samples of a part apart, but not the many samples of a batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from pipecompile.batching.backward_trial import Backward
from pipecompile.batching.reads_trial import decided_by_others
from pipecompile.batching.rules.batch_types import SHARED, Batched, Kind, Mixed, Shared
from pipecompile.batching.rules.numbers import counts_samples
from pipecompile.batching.trial_samples import Samples, same_rows
from pipecompile.capture.origin import origin_of
from pipecompile.ops.torch_internals import pytree

STRANGERS = 3  # number of draws of the other rows
SMALL = 0.01  # size of a sample, for code that branches on data
AROUND = (0.0, 1.0, 100.0)  # sizes of the samples around it


class Experiment:
    """Experiments on the trace of a microbatch and on its twin, the trace of the whole batch."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def kinds_of(self, region: Sequence[fx.Node]) -> dict[fx.Node, Kind | tuple[Kind, ...]] | None:
        """The kinds of a region's outputs; None if the region mixes samples, or cannot be run by itself."""
        members = set(region)
        sources = [n for node in region for n in node.all_input_nodes if n not in members]
        outputs = [n for n in region if any(user not in members for user in n.users)]
        answers = {n: self.samples.by_growth(n) for n in outputs}
        flat = [k for kind in answers.values() for k in (kind if isinstance(kind, tuple) else (kind,))]
        if not flat or any(isinstance(kind, Mixed) for kind in flat):
            return None
        if any(not isinstance(self.samples.kinds.get(n, SHARED), Batched | Shared) for n in sources):
            return None
        if any(t.is_meta for t in self.samples.captured.tensors.values()):
            return answers  # nothing will run
        if self.samples.rows < 2:
            return None
        if any(origin_of(n).writes and n.op != "call_module" for n in region):
            return None
        if any(counts_samples(n, self.samples.scale) for n in region if not _is_size(n)):
            return None  # an experiment at one size cannot show it
        try:
            apart = all(self._apart(sources, outputs, answers, row) for row in (0, self.samples.rows - 1))
            if any(self._asks(node) for node in region):
                apart = apart and self._apart(sources, outputs, answers, 0, 1.0, AROUND)
                apart = apart and self._apart(sources, outputs, answers, 0, SMALL, AROUND)
                decided = (decided_by_others(self.samples, sources, outputs, answers, size) for size in (1.0, SMALL))
                apart = apart and not any(decided)
            apart = apart and self._side_by_side(sources, outputs, answers)
            apart = apart and Backward(self.samples, sources, outputs, answers).keeps_apart()
        except Exception:  # the region cannot be run by itself
            return None
        return answers if apart else None

    def adds_up(self, node: fx.Node) -> bool:
        """Whether a function of shared values has gradients that add up over microbatches."""
        if any(t.is_meta for t in self.samples.captured.tensors.values()):
            return True  # nothing will run
        try:
            return Backward(self.samples, node.all_input_nodes, [node], {node: SHARED}).adds_up()
        except Exception:  # it cannot be run by itself
            return False

    def writes_gradients(self, node: fx.Node) -> bool:
        """Whether the backward of a function writes into the gradients that come into it."""
        try:
            return Backward(self.samples, node.all_input_nodes, [node], {node: self.samples.by_growth(node)}).writes()
        except Exception:  # it cannot be run by itself
            return False

    def _asks(self, node: fx.Node) -> bool:
        """Whether a node runs an opaque call on real tensors, whose Python may branch on values."""
        call = self.samples.captured.leaf_call(node)
        return call is not None and call.shapes is not None

    def _apart(
        self,
        sources: Sequence[fx.Node],
        outputs: Sequence[fx.Node],
        answers: Mapping[fx.Node, Kind | tuple[Kind, ...]],
        row: int,
        size: float = 1.0,
        sizes: Sequence[float] = (1.0,) * STRANGERS,
    ) -> bool:
        """Whether a row's results stay the same when the other rows change to samples of the given sizes."""
        generator = torch.Generator().manual_seed(row)
        start = {n: self.samples.draw(n, generator, size) for n in dict.fromkeys(sources)}
        expected = self.samples.bench.run(outputs, start)
        draws = [(None, 1.0), *((generator, other) for other in sizes)]
        others = [{n: self.samples.around(n, value, row, *draw) for n, value in start.items()} for draw in draws]
        for changed in others:
            seen = self.samples.bench.run(outputs, changed)
            if not all(same_rows(expected[n], seen[n], answers[n], row, row, self.samples.rows) for n in outputs):
                return False
        if not all(
            torch.equal(*pair)
            for n in outputs
            for pair in _pairs(expected[n], self.samples.bench.run([n], start, 1)[n])
        ):
            return True  # it draws random numbers by position
        moved = self.samples.bench.run(outputs, {n: self.samples.moved(n, value) for n, value in start.items()})
        to = (row + 1) % self.samples.rows
        return all(same_rows(expected[n], moved[n], answers[n], row, to, self.samples.rows) for n in outputs)

    def _side_by_side(
        self,
        sources: Sequence[fx.Node],
        outputs: Sequence[fx.Node],
        answers: Mapping[fx.Node, Kind | tuple[Kind, ...]],
    ) -> bool:
        """Whether the first and the last part of a whole batch give the batch's results for their rows."""
        twin, rows, most = self.samples.scale.twin, self.samples.rows, self.samples.whole.rows
        generator = torch.Generator().manual_seed(most)
        start = {n: self.samples.of_the_whole(n, generator) for n in dict.fromkeys(sources)}
        large = {twin[n]: value for n, value in start.items()}
        twins = [twin[n] for n in outputs]
        expected, again = self.samples.whole.run(twins, large), self.samples.whole.run(twins, large, 1)
        if not all(torch.equal(*pair) for n in twins for pair in _pairs(expected[n], again[n])):
            return True  # it draws random numbers by position
        for first in (0, most - rows):
            found = self.samples.bench.run(
                outputs, {n: self.samples.part(n, value, first) for n, value in start.items()}
            )
            for n in outputs:
                seen = expected[twin[n]], found[n]
                if not all(same_rows(*seen, answers[n], first + row, row, most, rows) for row in range(rows)):
                    return False
        return True


def _pairs(one: Any, other: Any) -> list[tuple[Tensor, Tensor]]:
    pairs = zip(pytree.tree_leaves(one), pytree.tree_leaves(other), strict=True)
    return [(a, b) for a, b in pairs if isinstance(a, Tensor)]


def _is_size(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return not isinstance(value, Tensor | tuple | list)
