"""One model of the zoo against its pipelines: what has been found is said as it is found.

A pipeline of 2 and of 4 stages, over 2 microbatches, takes steps of several sizes, one after the other. Each must
give the unsplit model's loss, gradients and buffers, by name. The unsplit model runs the whole batch; with batch
normalisation in training it runs the same microbatches in order, and buffers are left aside.
"""

from __future__ import annotations

import importlib.util
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from oracle import Inputs, Loss, Run, preserved, split
from torch import Tensor, nn

import pipecompile
from pipecompile.batching import Rows
from pipecompile.capture import Call, Captured, read_call, summarize
from pipecompile.capture.captured import SymbolicSizes
from pipecompile.capture.state.reachable import Reach
from pipecompile.compiler import compile_call, plan_call
from pipecompile.errors import ExecutionError, PipecompileError
from pipecompile.ir.graph import Graph
from zoo.entry import ROWS, Entry

STAGES = (2, 4)
TOLERANCE = {
    torch.float64: 1e-5,
    torch.float32: 1e-4,
}  # of a tensor's largest entry; many models round to float32 inside
FLOOR = 1e-2  # the same, of the model's largest gradient, in units of the tolerance
EXACT = "exact"


@dataclass(frozen=True)
class Size:
    batch: int
    length: int


def sizes(entry: Entry) -> list[Size]:
    """Two batch sizes and two lengths, each step other than the one before in one of them, and the first again."""
    first, other = Size(ROWS[0], entry.lengths[0]), Size(ROWS[1], entry.lengths[0])
    longer = [Size(ROWS[1], entry.lengths[1])] if len(entry.lengths) > 1 else []
    return [first, other, *longer, first]


def missing(entry: Entry) -> str:
    """The module that a model's loss needs and that is not installed."""
    return entry.needs if entry.needs and importlib.util.find_spec(entry.needs) is None else ""


def examine(entry: Entry) -> Iterator[dict[str, Any]]:
    """Facts about a model, in the order in which they are found; a later fact never takes back an earlier one."""
    model = entry.build()
    references = _references(entry, model)
    references(sizes(entry)[0], 1)
    with one_capture_for_many_plans():
        yield from _traced(entry, model)
        for stages in STAGES:
            yield {f"stages {stages}": "hang"}
            verdict, captures = _train(entry, model, stages, references)
            yield {f"stages {stages}": verdict, f"captures {stages}": captures}


def capture_sample(entry: Entry, model: nn.Module, **options: Any) -> Captured:
    """The capture that a pipeline over two microbatches needs first."""
    args, kwargs = entry.inputs(ROWS[0], entry.lengths[0])
    call = read_call(model.forward, args, kwargs, {})
    return compile_call.capture(model, call, Rows.of(call.batch, 1 if entry.whole else 2).counts, None, **options)


def _traced(entry: Entry, model: nn.Module) -> Iterator[dict[str, Any]]:
    start = time.process_time()
    try:
        captured = capture_sample(entry, model)
        nodes = len(summarize(captured).nodes)
        seconds = time.process_time() - start
        static = _static_seconds(entry, model)
    except Exception:
        return  # the pipelines will meet it too, and say so
    found = {"nodes": nodes, "seconds": seconds, "static seconds": static}
    yield {**found, "leaves": len(captured.leaves), "notes": captured.notes}


def _static_seconds(entry: Entry, model: nn.Module) -> float:
    """What a capture takes that leaves no size open."""
    start = time.process_time()
    summarize(capture_sample(entry, model, symbolic=(SymbolicSizes.NONE,)))
    return time.process_time() - start


def _train(entry: Entry, model: nn.Module, stages: int, references: Callable[..., Run]) -> tuple[str, int]:
    """The verdict over all microbatches and sizes: the first that is not ``EXACT``; and the captures needed."""
    captures = 0
    for microbatches in (1,) if entry.whole else (2,):
        pipe = pipecompile.compile(
            model, devices=["cpu"] * stages, schedule="1f1b", microbatches=microbatches, costs="count"
        )
        for size in sizes(entry):
            verdict = _step(entry, pipe, size, microbatches, references)
            captures = max(captures, pipe.pipeline.captures)
            if verdict != EXACT:
                return f"{verdict} [{microbatches} microbatches of {size.batch} rows, length {size.length}]", captures
    return EXACT, captures


def _step(entry: Entry, pipe: Any, size: Size, microbatches: int, references: Callable[..., Run]) -> str:
    expected = references(size, microbatches)
    try:
        actual = run(entry.loss, pipe, pipe.pipeline.model, entry.inputs(size.batch, size.length))
    except ExecutionError as error:
        return f"foreign: {first_line(error)}"
    except PipecompileError as error:
        return f"ours: {first_line(error)}"
    except Exception as error:
        return f"foreign: {first_line(error)}"
    return difference(actual, expected, TOLERANCE[entry.dtype], buffers=not entry.mixes) or EXACT


def _references(entry: Entry, model: nn.Module) -> Callable[[Size, int], Run]:
    @cache
    def reference(size: Size, microbatches: int) -> Run:
        inputs = entry.inputs(size.batch, size.length)
        return run(entry.loss, model, model, inputs, microbatches if entry.mixes else 1)

    return reference


def run(loss: Loss, call: Callable[..., Any], model: nn.Module, inputs: Inputs, microbatches: int = 1) -> Run:
    """One step of the model, or of a pipeline of it, over microbatches one after the other.

    Every loss of the zoo is a mean over the rows, so that of the batch is the parts' by their shares.
    """
    with preserved(model):
        losses = []
        for args, kwargs in split(inputs, microbatches):
            losses.append(loss(call(*args, **kwargs)) / microbatches)
            losses[-1].backward()
        gradients = {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
        total = torch.stack([loss.detach() for loss in losses]).sum()
        return Run(total, None, gradients, {n: b.clone() for n, b in model.named_buffers()})


def difference(actual: Run, expected: Run, tolerance: float, buffers: bool = False) -> str:
    """Where two runs differ, the loss first; empty if they do not."""
    if not close(actual.loss, expected.loss, tolerance, 0.0):
        return f"wrong: loss {actual.loss.item():.9g} instead of {expected.loss.item():.9g}"
    largest = max(
        (g.abs().max().item() for g in expected.gradients.values() if g is not None and g.numel()), default=0.0
    )
    if not largest:
        return "wrong: there is no gradient to compare"
    for name, gradient in expected.gradients.items():
        found = actual.gradients[name]
        if gradient is None or found is None:
            if gradient is not found:
                return f"wrong: gradient of {name} is {_size(found)} instead of {_size(gradient)}"
        elif not close(found, gradient, tolerance, tolerance * FLOOR * largest):
            return f"wrong: gradient of {name} is off by {_off(found, gradient):.1e} of its largest entry"
    if buffers and not expected.buffers.keys() <= actual.buffers.keys():
        return f"wrong: there is no buffer {min(expected.buffers.keys() - actual.buffers.keys())}"
    for name, buffer in expected.buffers.items() if buffers else ():
        if not close(actual.buffers[name], buffer, tolerance, 1e-12):
            return f"wrong: buffer {name} differs"
    return ""


def close(actual: Tensor, expected: Tensor, relative: float, absolute: float) -> bool:
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return False
    if expected.is_complex():
        actual, expected = torch.view_as_real(actual), torch.view_as_real(expected)
    if not expected.is_floating_point() or not expected.numel():
        return torch.equal(actual, expected)
    finite = expected.isfinite()
    if not torch.equal(actual.isfinite(), finite) or not _same_limits(actual[~finite], expected[~finite]):
        return False
    actual, expected = actual[finite], expected[finite]
    return not expected.numel() or bool(((actual - expected).abs() <= relative * expected.abs().max() + absolute).all())


def _same_limits(actual: Tensor, expected: Tensor) -> bool:
    """Whether two tensors have infinities of the same signs, and NaN, in the same places."""
    return bool(((actual == expected) | (actual.isnan() & expected.isnan())).all())


def _off(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


def _size(gradient: Tensor | None) -> str:
    return "none" if gradient is None else f"at most {gradient.abs().max().item():.1e}"


def first_line(error: BaseException) -> str:
    """What an error says first; places in packages begin with the package, wherever that is installed."""
    message = re.sub(r"[^\s(]*/site-packages/", "", next(iter(str(error).splitlines()), ""))
    return f"{type(error).__name__}: {message}"[:400]


@contextmanager
def one_capture_for_many_plans() -> Iterator[None]:
    """Lets pipelines of one model share captures and profiles: stages come after both, which would be the same.

    A capture is made again where a step has since changed an attribute of the model that it depends on.
    """
    verbs, known = {"capture": (compile_call, compile_call.capture), "profile": (plan_call, plan_call.profile)}, {}

    def remembered(verb: str, subject: Any, *rest: Any, **options: Any) -> Any:
        key = (verb, id(subject), *filter(None, map(_key, rest)), *options.items())
        if key not in known or (verb == "capture" and known[key][1].attributes.changed()):
            known[key] = subject, verbs[verb][1](subject, *rest, **options)
        return known[key][1]

    try:
        for verb, (module, _) in verbs.items():
            setattr(module, verb, partial(remembered, verb))
        yield
    finally:
        for verb, (module, original) in verbs.items():
            setattr(module, verb, original)


def _key(argument: Any) -> Any:
    if isinstance(argument, Call):  # by its values too, which a model may read
        return argument.key, tuple((name, str(t.tolist())) for name, t in argument.tensors.items())
    return None if isinstance(argument, Graph | Reach) else argument  # each call makes an equal one
