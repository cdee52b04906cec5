"""Runs a split model beside the unsplit one and compares every number.

Each check is one step of both on the same inputs: the given ones, fresh ones of the same shape, fresh ones of another
shape; training and evaluation; in the pipeline's microbatches and in one. The unsplit model is the model's own forward
on its own parameters, run on the whole batch. What a model does differently on parts of a batch by its nature
(batch statistics, counters, random draws) is compared with the unsplit model run on the same parts.

Random functions draw alike in both (``randomness.alike``). Gradients come from ``torch.autograd.grad``, so that no
``.grad`` changes, and the model is put back as it was: buffers, modes, attributes, the generators.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from pipecompile import steps
from pipecompile.batching import Batched, Rows, by_shape, gather, scatter, uses_batch_statistics
from pipecompile.capture import Captured, Output
from pipecompile.capture.origin import origin_of
from pipecompile.capture.purity import is_random
from pipecompile.capture.state import named_tensors, unchanged, without_caches
from pipecompile.capture.trees import flatten
from pipecompile.compiled import find_loss
from pipecompile.errors import PipecompileError
from pipecompile.plan import Plan
from pipecompile.program import Program
from pipecompile.randomness import alike, is_dropout, undrawn, without_dropout
from pipecompile.report import describe
from pipecompile.retarget import threads_each, threads_of
from pipecompile.session import Session
from pipecompile.variations import like, other_shapes, same_shapes
from pipecompile.verification import Check, Difference, Kind, Verification

Mode = Literal["train", "eval"]
MODES: tuple[Mode, ...] = ("train", "eval")
ULPS = 64  # of the largest gradient, that rounding may leave in any other
SEED = 0  # of the fresh inputs and of the gradients that outputs are given


@dataclass(frozen=True)
class Subject:
    """A split model as it is to be verified."""

    model: nn.Module
    forward: Callable[..., Any]  # the model, or the model and a loss function
    batch: Callable[[Sequence[Any], Mapping[str, Any], int], steps.Batch]  # of so many microbatches
    schedule: Callable[[Plan, int], Program]
    microbatches: int
    loss: str | None
    devices: tuple[torch.device, ...]


@dataclass(frozen=True)
class Run:
    """The numbers of one step, by name."""

    outputs: dict[str, Any]
    gradients: dict[str, Tensor | None]
    input_gradients: dict[str, Tensor | None]
    buffers: dict[str, Tensor]

    def parts(self) -> Iterator[tuple[Kind, Mapping[str, Any]]]:
        yield "output", self.outputs
        yield "gradient", self.gradients
        yield "input gradient", self.input_gradients
        yield "buffer", self.buffers


def verify(subject: Subject, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Verification:
    """Compares a split model with the unsplit one on a call and on fresh ones like it.

    Raises:
        CaptureError, PlanError, InputError: the given call cannot be split, as the pipeline itself would raise.
    """
    notes: dict[str, dict[str, None]] = {}
    checks: list[Check] = []
    with _preserved(subject.model, subject.devices), alike(), threads_of(threads_each(subject.devices)):
        given = subject.batch(args, kwargs, subject.microbatches)
        for mode in MODES:
            subject.model.train(mode == "train")
            for what, call in _calls(given):
                check, parts = _check(subject, mode, what, call, subject.microbatches, notes)
                checks.append(check)
                if parts > 1 and mode == "train":
                    checks.append(_check(subject, mode, what, call, 1, notes)[0])
    return Verification(tuple(checks), {topic: tuple(lines) for topic, lines in notes.items()})


def _calls(given: steps.Batch) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """The calls to make, with a word for each."""
    call, captured = given.call, given.compiled.captured
    generator = torch.Generator().manual_seed(SEED)
    yield "given", call.rebuild(call.tensors)
    yield "fresh", call.rebuild(like(call, same_shapes(call), generator))
    other = other_shapes(captured, call)
    if other is not None:
        yield "fresh", call.rebuild(like(call, other, generator))


def _check(
    subject: Subject, mode: Mode, what: str, call: tuple[Any, Any], microbatches: int, notes: dict[str, dict[str, None]]
) -> tuple[Check, int]:
    """One check, and the number of microbatches that it took."""
    args, kwargs = call
    try:
        with unchanged(subject.model), without_caches(subject.model), torch.no_grad():
            _whole(subject)(*args, **kwargs)
    except Exception as error:  # whatever the model raises on values or sizes that it was not made for
        return Check(mode, what, 0, "", left_out=f"the unsplit model itself raises {type(error).__name__}: {error}"), 0
    inputs = what
    try:
        batch = subject.batch(args, kwargs, microbatches)
        inputs = f"{what}: {_described(batch)}"
        quiet = without_dropout if len(batch.rows) > 1 else nullcontext
        with unchanged(subject.model), quiet():
            split, seeds = _split(subject, batch, mode)
    except PipecompileError as error:
        return Check(mode, inputs, 0, "", failure=f"{type(error).__name__}: {error}"), 0
    for topic, lines in describe(batch.compiled).items():
        notes.setdefault(topic, {}).update(dict.fromkeys(lines))
    if batch.compiled.is_random:
        how = "without dropout" if len(batch.rows) > 1 else "with random numbers from one seed"
        notes.setdefault("microbatches", {})[f"{_several(len(batch.rows))} compared {how} in both models"] = None
    apart = _apart(batch, mode) if len(batch.rows) > 1 else ""
    rows = batch.rows if apart else Rows((sum(batch.rows.counts),))
    tail = batch.division.tail
    if apart and (batch.division.before or (tail is not None and tail.why)):
        why = f"{apart}, and its loss is one of the whole batch: no run of the unsplit model does both"
        return Check(mode, inputs, len(batch.rows), "", left_out=why), len(batch.rows)
    with unchanged(subject.model), without_caches(subject.model), quiet():
        whole = _unsplit(subject, batch, rows, seeds)
    if apart:
        why = f"compared with the unsplit model over the same microbatches, since {apart}"
        notes.setdefault("microbatches", {})[why] = None
    on = "the same microbatches" if apart else "the whole batch"
    found = [it for it in _differences(split, whole) if not (apart and it.name in _written_once(batch))]
    return Check(mode, inputs, len(batch.rows), on, tuple(found)), len(batch.rows)


def _written_once(batch: steps.Batch) -> tuple[str, ...]:
    """The buffers that a pipeline writes once a batch, where the unsplit model does for each microbatch."""
    return batch.division.tail.writes if batch.division.tail is not None else ()


def _described(batch: steps.Batch) -> str:
    shapes = [f"{name} {list(tensor.shape)}" for name, tensor in batch.call.tensors.items()]
    return ", ".join(shapes[:3]) + (f" +{len(shapes) - 3}" if len(shapes) > 3 else "")


def _apart(batch: steps.Batch, mode: Mode) -> str:
    """What of a model comes out otherwise on microbatches by its nature; empty if nothing does."""
    nodes = list(batch.division.body.graph.nodes)
    if any(is_random(node) and not is_dropout(node.target) for node in nodes):
        return "it draws random numbers"
    if any(map(uses_batch_statistics, nodes)):
        return "its batch normalisation uses each microbatch's statistics"
    written = sorted({name for node in nodes for name in origin_of(node).writes})
    if written:
        return f"it writes buffer {written[0]!r}"
    leaves = batch.compiled.captured.leaves
    return f"module {next(iter(leaves))!r} is kept whole" if leaves and mode == "train" else ""


def _split(subject: Subject, batch: steps.Batch, mode: Mode) -> tuple[Run, dict[int, Tensor]]:
    """The pipeline's step, on a session of its own, and the gradients that its outputs were given, by position."""
    session = Session(subject.devices, None)
    captured = batch.compiled.captured
    trains = mode == "train" and any(output.requires_grad for output in captured.outputs)
    loss = find_loss(captured, subject.loss) if trains else None
    with torch.set_grad_enabled(trains):
        if not trains:
            out = steps.evaluate(session, batch)
        elif loss is None or not batch.ends_in_body(loss):
            out = steps.defer(session, batch)
        else:
            out = steps.train(session, batch, loss, subject.schedule)
        leaves = _leaves(out)
        seeds = _seeds(captured, leaves, loss) if trains else {}
        found = _gradients(leaves, seeds, batch)
    return _run(subject.model, batch, leaves, found), seeds


def _unsplit(subject: Subject, batch: steps.Batch, rows: Rows, seeds: Mapping[int, Tensor]) -> Run:
    """The model's own forward on the parts of a batch, one after the other, from the same gradients of the outputs."""
    forward, outputs = _whole(subject), batch.compiled.captured.outputs
    starts = {i: _spread(outputs[i], seed, rows) for i, seed in seeds.items()}
    leaves: list[list[Any]] = []
    found: list[Tensor | None] = [None] * len(batch.model_tensors)
    with torch.set_grad_enabled(bool(seeds)):
        for k, part in enumerate(scatter(batch.call, rows)):
            args, kwargs = batch.call.rebuild(part if len(rows) > 1 else batch.call.tensors)
            out = _leaves(forward(*args, **kwargs))
            new = _gradients(out, {i: parts[k] for i, parts in starts.items()}, batch)
            found = [a if b is None else b if a is None else a + b for a, b in zip(found, new, strict=True)]
            leaves.append([leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in out])
    joined = [_joined(output, parts, rows) for output, parts in zip(outputs, zip(*leaves, strict=True), strict=True)]
    return _run(subject.model, batch, joined, found)


def _whole(subject: Subject) -> Callable[..., Any]:
    """The unsplit model; one whose parameters are on several devices is run on the first of these."""
    tensors = dict(named_tensors(subject.model))
    device = next(iter(tensors.values())).device if tensors else torch.device("cpu")
    moved = {f"model.{name}": t.to(device) for name, t in tensors.items() if t.device != device}
    whole = _Whole(subject.model, subject.forward)
    return lambda *args, **kwargs: functional_call(whole, moved, args, kwargs) if moved else whole(*args, **kwargs)


class _Whole(nn.Module):
    """A model, and what is called to run it."""

    def __init__(self, model: nn.Module, run: Callable[..., Any]) -> None:
        super().__init__()
        self.model = model
        self.run = run

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(*args, **kwargs)


def _leaves(out: Any) -> list[Any]:
    return [leaf for _, leaf in flatten(out)[0]]


def _joined(output: Output, parts: Sequence[Any], rows: Rows) -> Any:
    return gather(by_shape(output), parts, rows) if isinstance(parts[0], Tensor) else parts[0]


def _spread(output: Output, gradient: Tensor, rows: Rows) -> list[Tensor]:
    """Each microbatch's part of an output's gradient."""
    kind = by_shape(output)
    if not isinstance(kind, Batched) or len(rows) == 1:
        return [gradient * weight for weight in rows.weights]
    entries = gradient.shape[kind.dim] // sum(rows.counts)
    return list(torch.split(gradient, [count * entries for count in rows.counts], kind.dim))


def _several(count: int) -> str:
    return f"{count} microbatches" if count > 1 else "one microbatch"


def _seeds(captured: Captured, leaves: Sequence[Any], loss: int | None) -> dict[int, Tensor]:
    """The gradients to give to outputs, by position: one to the loss, else drawn ones to all that take any."""
    generator = torch.Generator().manual_seed(SEED)
    positions = [i for i, output in enumerate(captured.outputs) if output.node is not None]
    if loss is not None:
        return {positions[loss]: torch.ones_like(leaves[positions[loss]])}
    wanted = [i for i in positions if captured.outputs[i].requires_grad]
    return {i: torch.randn(leaves[i].shape, generator=generator).to(leaves[i]) for i in wanted}


def _gradients(leaves: Sequence[Any], seeds: Mapping[int, Tensor], batch: steps.Batch) -> list[Tensor | None]:
    """The gradient of each of the batch's ``model_tensors``."""
    tensors = batch.model_tensors
    if not seeds or not tensors:
        return [None] * len(tensors)
    return list(torch.autograd.grad([leaves[i] for i in seeds], tensors, list(seeds.values()), allow_unused=True))


def _run(model: nn.Module, batch: steps.Batch, leaves: Sequence[Any], found: Sequence[Tensor | None]) -> Run:
    outputs = batch.compiled.captured.outputs
    names = (
        [output.name or "output" for output in outputs] if len(outputs) == len(leaves) else map(str, range(len(leaves)))
    )
    trained = {id(p): name for name, p in model.named_parameters()}
    count = len(batch.parameters)
    wanting = [name for name, tensor in batch.call.tensors.items() if tensor.requires_grad]
    return Run(
        {name: leaf.detach() if isinstance(leaf, Tensor) else leaf for name, leaf in zip(names, leaves, strict=True)},
        {trained[id(p)]: g for p, g in zip(batch.parameters, found[:count], strict=True)},
        dict(zip(wanting, found[count:], strict=True)),
        {name: buffer.detach().clone() for name, buffer in model.named_buffers()},
    )


# Comparing


def _differences(split: Run, whole: Run) -> Iterator[Difference]:
    gradients = [g for g in (*whole.gradients.values(), *whole.input_gradients.values()) if g is not None]
    for (kind, ours), (_, theirs) in zip(split.parts(), whole.parts(), strict=True):
        level = max(map(_magnitude, gradients), default=0.0) if "gradient" in kind else 0.0
        for name in dict.fromkeys((*theirs, *ours)):
            missing = object()
            difference = _difference(kind, name, ours.get(name, missing), theirs.get(name, missing), level)
            if difference is not None:
                yield difference


def _difference(kind: Kind, name: str, ours: Any, theirs: Any, level: float) -> Difference | None:
    """How far apart two values are; None where there is nothing to compare.

    Rounding may explain a part of a tensor's own largest value, and far less of ``level``: a gradient that is nothing
    but rounding of larger ones has no size of its own.
    """
    if ours is None and theirs is None:
        return None
    if not (isinstance(ours, Tensor) and isinstance(theirs, Tensor)):
        same = isinstance(ours, Tensor) == isinstance(theirs, Tensor) and bool(ours == theirs)
        return Difference(kind, name, 0.0 if same else math.inf, 0.0, 0.0)
    scale = _magnitude(theirs)
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return Difference(kind, name, math.inf, scale, 0.0)
    a, b = ours, theirs.to(ours.device)
    if torch.equal(a, b) or not a.numel():
        return Difference(kind, name, 0.0, scale, 0.0)
    exact = not (a.dtype.is_floating_point or a.dtype.is_complex)
    wide = torch.complex128 if a.dtype.is_complex else torch.float64
    gap = (a.to(wide) - b.to(wide)).abs()
    gap = torch.where((a == b) | (a.isnan() & b.isnan()), torch.zeros_like(gap), gap)
    largest = float(gap.max()) if bool(gap.isfinite().all()) else math.inf
    eps = 0.0 if exact else torch.finfo(a.dtype).eps
    return Difference(kind, name, largest, scale, math.sqrt(eps) * scale + ULPS * eps * level)


def _magnitude(tensor: Tensor) -> float:
    finite = tensor.detach()[tensor.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0


# Leaving no mark


@contextmanager
def _preserved(model: nn.Module, devices: Sequence[torch.device]) -> Iterator[None]:
    """Modes, generators and the caller's autograd modes are as before at the end; what a check changes it undoes."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        with undrawn(devices), torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
