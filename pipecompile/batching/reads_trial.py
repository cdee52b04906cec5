"""Experiments on numbers that Python reads inside parts kept whole: ``if error.max().item() < 1e-3: break``.

Such a number is computed from several samples, so others may decide what a sample's result is, though none of the
random samples of a trial does: no error is small, or all are. So the numbers are watched and forced. All samples of a
batch are copies of one; a number that changes with each of two samples is that of several. It is then given other
values in a run of its own: any that other samples could give it, so larger ones only for a maximum, a norm or a sum of
what is not negative, and none for a share of samples (``done.float().mean()``). The results must stay those of before,
as they do where the number is only noted, or where finished samples are masked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from pipecompile.batching.rules.batch_types import SHARED, Batched, Kind
from pipecompile.batching.trial_samples import Samples, by_rows, same_rows
from pipecompile.ops.source_lines import user_line
from pipecompile.ops.torch_internals import TorchDispatchMode

SIZES = (100.0, 0.0)  # of a changed sample
MOST_IN_A_LINE = 2  # numbers that a line reads: an error and what it is relative to
FAR = 1e6  # a forced number
ANY = -FAR, 0.0, FAR
_aten = torch.ops.aten
_ASKS = {_aten._local_scalar_dense, _aten.lt, _aten.le, _aten.gt, _aten.ge}
_GROW = {_aten.max.default, _aten.amax.default, _aten.linalg_vector_norm.default}
_SHRINK = {_aten.min.default, _aten.amin.default}
_ADD = {_aten.sum, _aten.mean}
_COPY = {_aten.detach, _aten.clone, _aten.alias, _aten._to_copy, _aten.view, _aten.squeeze}
At = tuple[int, int]  # number of operations before, position of the argument


@dataclass(frozen=True)
class Asked:
    """A number that Python has read or compared, the line that did, and the values that other samples may give it."""

    line: str
    value: float
    others: tuple[float, ...]


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the numbers that a part kept whole reads; gives it another one at the place ``forced``."""

    def __init__(self, forced: At | None = None, value: float = 0.0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.forced, self.value = forced, value
        self.operations: list[Any] = []
        self.asked: dict[At, Asked] = {}
        self._others: dict[int, tuple[Tensor, tuple[float, ...]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations.append(func)
        if func.overloadpacket in _ASKS:
            args = tuple(self._seen((len(self.operations), i), value) for i, value in enumerate(args))
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and not out.ndim and out.is_floating_point():
            self._others[id(out)] = out, self._others_of(func, args[0] if args else None)
        return out

    def _others_of(self, func: Any, of: Any) -> tuple[float, ...]:
        """The values that other samples may give to a result of a function."""
        if func in _GROW or func in _SHRINK:
            return (FAR,) if func in _GROW else (-FAR,)
        if func.overloadpacket in _COPY and id(of) in self._others:
            return self._others[id(of)][1]
        if func.overloadpacket in _ADD and bool((of >= 0).all()):
            return () if bool(((of == 0) | (of == 1)).all()) else (FAR,)
        return ANY

    def _seen(self, at: At, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.ndim or not value.is_floating_point():
            return value
        if at == self.forced:
            return torch.full_like(value, self.value)
        _, others = self._others.get(id(value), (None, ANY))
        self.asked[at] = Asked(user_line(), float(value), others)
        return value


def decided_by_others(
    samples: Samples,
    sources: Sequence[fx.Node],
    outputs: Sequence[fx.Node],
    answers: Mapping[fx.Node, Kind | tuple[Kind, ...]],
    size: float = 1.0,
) -> bool:
    """Whether a number that is read from several samples decides what the result of one, of this size, is."""
    generator = torch.Generator().manual_seed(0)
    drawn = {n: samples.draw(n, generator, size) for n in dict.fromkeys(sources)}
    start = {n: samples.around(n, value, 0, None) for n, value in drawn.items()}
    plain = Watch()
    try:
        expected = samples.bench.run(outputs, start, watch=plain)
    except Exception:  # it runs, but not where it can be watched
        return False
    for at, value in _to_force(samples, outputs, start, plain, generator):
        try:
            seen = samples.bench.run(outputs, start, watch=Watch(at, value))
        except Exception:  # the unsplit model fails too, if the number is that
            continue
        if not all(same_rows(expected[n], seen[n], answers[n], 0, 0, samples.rows) for n in outputs):
            return True
    return False


def _to_force(
    samples: Samples,
    outputs: Sequence[fx.Node],
    start: Mapping[fx.Node, Any],
    plain: Watch,
    generator: torch.Generator,
) -> Iterator[tuple[At, float]]:
    """Where to force which value: the first and the last times that a line reads numbers of several samples."""
    if not plain.asked:
        return
    changed = [_changed_by(samples, outputs, start, plain, row, generator) for row in (0, samples.rows - 1)]
    lines = {plain.asked[at].line for at in changed[0] & changed[1]}
    for line in sorted(lines):
        places = [at for at, asked in plain.asked.items() if asked.line == line]
        for at in dict.fromkeys((*places[:MOST_IN_A_LINE], *places[-MOST_IN_A_LINE:])):
            for value in plain.asked[at].others:
                yield at, value


def _changed_by(
    samples: Samples,
    outputs: Sequence[fx.Node],
    start: Mapping[fx.Node, Any],
    plain: Watch,
    row: int,
    generator: torch.Generator,
) -> set[At]:
    """The places whose numbers change with a sample, as far as the same operations lead to them."""
    found: set[At] = set()
    for size in SIZES:
        watch = Watch()
        values = {n: _with_sample(samples, n, value, row, size, generator) for n, value in start.items()}
        samples.bench.run(outputs, values, watch=watch)
        pairs = zip(plain.operations, watch.operations, strict=False)
        same = next((i for i, (a, b) in enumerate(pairs) if a is not b), len(plain.operations))
        for at, asked in plain.asked.items():
            if at[0] <= same and at in watch.asked and watch.asked[at].value != asked.value:
                found.add(at)
    return found


def _with_sample(samples: Samples, node: fx.Node, value: Any, row: int, size: float, generator: torch.Generator) -> Any:
    """A value with one sample replaced by random numbers of this size."""
    kind = samples.kinds.get(node, SHARED)
    if not isinstance(kind, Batched) or not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    split = by_rows(value, kind, samples.rows).clone()
    sample = split.select(kind.dim + 1, row)
    sample.copy_(torch.randn(sample.shape, generator=generator, dtype=torch.float64) * size)
    return split.reshape(value.shape)
