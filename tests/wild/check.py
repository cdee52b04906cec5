"""One model of another library against its pipelines: 2 stages with one microbatch, 3 stages with two.

A pipeline has a model of its own, built as the unsplit one beside it is. It takes steps of several sizes, each of which
must give the unsplit model's loss, outputs, gradients and buffers, by name.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from losses import microbatches_of
from oracle import Run, leaves, microbatched, rows_of, split, step
from torch import Tensor
from torch.nn import functional as F
from zoo.check import EXACT, TOLERANCE, Size, close, difference

import pipecompile
from pipecompile.errors import ExecutionError, PipecompileError
from wild.entry import Wild, settled

MICROBATCHES = {2: 1, 3: 2}  # by stages
ROWS = (4, 6, 5)
LEAST = 1e-12  # of the largest gradient, in a model that tells something
MOVED = ("running_mean", "running_var")  # by each microbatch in turn, however often a forward uses the norm
COUNTER = "num_batches_tracked"  # a pipeline counts batches, the unsplit model would count microbatches
Reference = Callable[[Size, int], Run]


def sizes(entry: Wild) -> list[Size]:
    """Three batch sizes, the last of them at another length if the model takes one."""
    return [Size(rows, length) for rows, length in zip(ROWS, (entry.lengths[0],) * 2 + entry.lengths[-1:], strict=True)]


def examine(entry: Wild) -> Iterator[dict[str, Any]]:
    """Facts about a model, in the order in which they are found."""
    entry = settled(entry)
    reference = _references(entry)
    yield {"dtype": str(entry.dtype).removeprefix("torch."), "mixes": entry.mixes}
    _refuse_random(reference(sizes(entry)[0], 1), _references(entry, seed=1)(sizes(entry)[0], 1))
    for stages, microbatches in MICROBATCHES.items():
        yield {f"stages {stages}": "hang"}
        start = time.process_time()
        yield _train(entry, stages, 1 if entry.whole else microbatches, reference)
        yield {f"seconds {stages}": round(time.process_time() - start, 1)}


def _train(entry: Wild, stages: int, microbatches: int, reference: Reference) -> dict[str, Any]:
    """The verdict over all sizes: the first that is not ``EXACT``; with captures and notes."""
    pipe = pipecompile.compile(
        entry.build(), devices=["cpu"] * stages, schedule="1f1b", microbatches=microbatches, costs="count"
    )
    verdict = EXACT
    for size in sizes(entry):
        verdict = _step(entry, pipe, size, reference)
        if verdict != EXACT:
            verdict += f" [{microbatches} microbatches of {size.batch} rows, length {size.length}]"
            break
    found = {f"stages {stages}": verdict, f"captures {stages}": pipe.pipeline.captures}
    notes = pipe.pipeline.report.notes if pipe.pipeline.captures else ()
    return {**found, f"notes {stages}": [str(note)[:200] for note in notes]}


def _step(entry: Wild, pipe: Any, size: Size, reference: Reference) -> str:
    reference(size, 1)  # what the unsplit model does not take is no fault of the pipeline's
    try:
        actual = step(pipe, pipe.pipeline.model, entry.loss, entry.inputs(size.batch, size.length))
    except ExecutionError as error:
        return f"foreign: {said(error)}"
    except PipecompileError as error:
        return f"ours: {said(error)}"
    except Exception as error:
        return f"foreign: {said(error)}"
    expected = reference(size, microbatches_of(pipe))  # a batch that cannot be cut as asked is cut into fewer
    return (
        difference(actual, expected, TOLERANCE[entry.dtype], buffers=True)
        or _outputs(actual, expected, TOLERANCE[entry.dtype])
        or EXACT
    )


def _outputs(actual: Run, expected: Run, tolerance: float) -> str:
    """Where two outputs differ: in their types, or in their tensors."""
    found, wanted = [list(leaves(run.output)) for run in (actual, expected)]
    if [path for path, _ in found] != [path for path, _ in wanted]:
        return f"wrong: output has {[p for p, _ in found]} instead of {[p for p, _ in wanted]}"
    for (path, a), (_, b) in zip(found, wanted, strict=True):
        if isinstance(b, torch.Tensor):
            if not isinstance(a, torch.Tensor) or not close(a, b, tolerance, 1e-9):
                return f"wrong: output{path} differs"
        elif type(a) is not type(b):
            return f"wrong: output{path} is a {type(a).__name__} instead of a {type(b).__name__}"
    return ""


def _references(entry: Wild, seed: int = 0) -> Reference:
    model = entry.build()

    @cache
    def once(size: Size) -> Run:  # a second run may count on in the model's Python
        torch.manual_seed(seed)
        return step(model, model, entry.loss, entry.inputs(size.batch, size.length))

    @cache
    def reference(size: Size, microbatches: int) -> Run:
        if not entry.mixes or microbatches == 1:
            return once(size)
        torch.manual_seed(seed)
        inputs = entry.inputs(size.batch, size.length)
        moved = microbatched(model, entry.loss, inputs, microbatches, entry.inside).buffers
        with statistics_of([rows_of(part) for part in split(inputs, microbatches)]):
            found = step(model, model, entry.loss, inputs)
        buffers = {n: moved[n] if n.split(".")[-1] in MOVED else b for n, b in found.buffers.items()}
        return replace(found, buffers={n: b for n, b in buffers.items() if n.split(".")[-1] != COUNTER})

    return reference


@contextmanager
def statistics_of(counts: Sequence[int]) -> Iterator[None]:
    """In which batch norm takes the statistics of microbatches, and all else sees the whole batch, as in a pipeline."""
    original, rows = F.batch_norm, sum(counts)

    def by_parts(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        assert x.shape[0] % rows == 0, "each sample has as many rows of a norm"
        parts = x.split([count * (x.shape[0] // rows) for count in counts])
        return torch.cat([original(part, *args, **kwargs) for part in parts])

    F.batch_norm = by_parts
    try:
        yield
    finally:
        F.batch_norm = original


def _refuse_random(first: Run, second: Run) -> None:
    """A model whose numbers are others from another seed has no reference."""
    largest = max((float(g.abs().max()) for g in first.gradients.values() if g is not None and g.numel()), default=0.0)
    if largest < LEAST:
        raise ValueError(f"gradients of at most {largest:.0e} are rounding: another loss tells more")
    different = difference(second, first, TOLERANCE[torch.float32])
    if different:
        raise ValueError(f"the unsplit model draws random numbers, or its numbers are of no use: {different}")


def said(error: BaseException) -> str:
    """A whole message on one line; places begin with the package, or the folder here, wherever that is."""
    message = re.sub(r"[^\s(]*/site-packages/", "", " ".join(str(error).split())).replace(f"{Path.cwd()}/", "")
    return f"{type(error).__name__}: {message}"[:600]
