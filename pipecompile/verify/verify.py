"""Compares a split model with the unsplit model over several steps, and reports every difference.

Each check is one step of both models on the same inputs (``side_by_side``): the given inputs, fresh inputs of the same
shape, fresh inputs of another shape; in training and evaluation; in the pipeline's microbatches and in one. ``prove``
is the one quick check that every capture passes before it trains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from pipecompile.batching import Batching, Rows, norms
from pipecompile.capture.pytrees import flatten
from pipecompile.capture.state.caches import caches_in
from pipecompile.capture.state.model_state import without_caches
from pipecompile.capture.state.reachable import reach_of
from pipecompile.capture.state.restore import left_as_before
from pipecompile.compiler.report import describe
from pipecompile.errors import PipecompileError
from pipecompile.ops.device_args import threads_each, threads_of
from pipecompile.ops.randomness import alike, undrawn
from pipecompile.ops.torch_internals import pytree
from pipecompile.runtime.batch import Batch
from pipecompile.schedule import MakeProgram
from pipecompile.verify.comparison import differences
from pipecompile.verify.fresh_inputs import like, other_shapes, same_shapes
from pipecompile.verify.one_device import on_one_device
from pipecompile.verify.results import Check, Verification
from pipecompile.verify.rounding import with_noise
from pipecompile.verify.side_by_side import SEED, Trial, apart, only_together, split_step, unsplit_step

Mode = Literal["train", "eval"]
MODES: tuple[Mode, ...] = ("train", "eval")


@dataclass(frozen=True)
class Subject:
    """The split model to verify, with the options that it was compiled with."""

    model: nn.Module
    loss_fn: Callable[..., Any] | None
    batch: Callable[[Sequence[Any], Mapping[str, Any], int], Batch]  # args, kwargs, number of microbatches
    schedule: MakeProgram
    microbatches: int
    loss: str | None
    devices: tuple[torch.device, ...]
    batching: Batching

    def trial(self, batch: Batch, mode: Mode) -> Trial:
        """The trial of a batch in a mode."""
        trains = mode == "train" and any(output.requires_grad for output in batch.outputs)
        return Trial(
            model=self.model,
            batch=batch,
            schedule=self.schedule,
            devices=self.devices,
            loss_fn=self.loss_fn,
            loss=self.loss,
            trains=trains,
            batching=self.batching,
            reach=reach_of(self.model, [] if self.loss_fn is None else [self.loss_fn]),
        )

    def run_unsplit(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Runs the unsplit model, to see whether it raises."""
        forward: Callable[..., Any] = self.model
        if self.loss_fn is not None:
            loss_fn = self.loss_fn
            forward = lambda *args, target, **kwargs: loss_fn(self.model(*args, **kwargs), target)  # noqa: E731
        given = bool(caches_in((args, kwargs)))
        with (
            left_as_before(self.model),
            without_caches(self.model, given),
            on_one_device(self.model) as near,
            torch.no_grad(),
        ):
            leaves, tree = flatten((tuple(args), dict(kwargs)), counted=True)  # a copy of a cache is filled
            near_args, near_kwargs = pytree.tree_unflatten(near([leaf for _, leaf in leaves]), tree)
            forward(*near_args, **near_kwargs)


def verify(subject: Subject, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Verification:
    """Compares a split model with the unsplit model on a call and on fresh calls like it.

    Raises:
        CaptureError, PlanError, InputError: the given call cannot be split; the pipeline itself would raise too.
    """
    notes: dict[str, dict[str, None]] = {}
    checks: list[Check] = []
    with _preserved(subject.model, subject.devices), threads_of(threads_each(subject.devices)):
        given = subject.batch(args, kwargs, subject.microbatches)
        for mode in MODES:
            subject.model.train(mode == "train")
            for what, call in _calls(given):
                check, parts = _check(subject, mode, what, call, subject.microbatches, notes)
                checks.append(check)
                if parts > 1 and mode == "train":
                    checks.append(_check(subject, mode, what, call, 1, notes)[0])
    return Verification(tuple(checks), {topic: tuple(lines) for topic, lines in notes.items()})


def _calls(given: Batch) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """The calls to check, each with a label."""
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
    """One check, and its number of microbatches."""
    args, kwargs = call
    try:
        subject.run_unsplit(args, kwargs)
    except Exception as error:  # the model may raise anything on values or sizes that it does not support
        return Check(mode, what, 0, "", left_out=f"the unsplit model itself raises {type(error).__name__}: {error}"), 0
    inputs = what
    try:
        batch = subject.batch(args, kwargs, microbatches)
        inputs = f"{what}: {_described(batch)}"
        trial = subject.trial(batch, mode)
        with alike(trial.generators):
            split, seeds = split_step(trial)
    except PipecompileError as error:
        return Check(mode, inputs, 0, "", failure=f"{type(error).__name__}: {error}"), 0
    for topic, lines in describe(batch.compiled).topics.items():
        notes.setdefault(topic, {}).update(dict.fromkeys(lines))
    if batch.compiled.is_random:
        notes.setdefault("microbatches", {})["compared with the same random numbers for every row, in both models"] = (
            None
        )
    why = apart(trial)
    if why and (together := only_together(trial)):
        left_out = f"{why}, and {together}: no run of the unsplit model does both"
        return Check(mode, inputs, len(batch.rows), "", left_out=left_out), len(batch.rows)
    if why:
        line = f"compared with the unsplit model on the same microbatches, since {why}"
        notes.setdefault("microbatches", {})[line] = None
    elif len(batch.rows) > 1 and norms(batch.division.body):
        line = "the unsplit model also normalizes by the statistics of each microbatch"
        notes.setdefault("microbatches", {})[line] = None
    parts = batch.rows if why else Rows((sum(batch.rows.counts),))
    with alike(trial.generators):
        whole = unsplit_step(trial, parts, seeds)
        found = [it for it in differences(split, whole) if not (why and it.name in _written_once(batch))]
        if any(it.verdict == "different" for it in found):
            found = [*with_noise(found, trial, parts, seeds, whole)]
    on = "the same microbatches" if why else "the whole batch"
    return Check(mode=mode, inputs=inputs, microbatches=len(batch.rows), against=on, differences=tuple(found)), len(
        batch.rows
    )


def _written_once(batch: Batch) -> tuple[str, ...]:
    """The buffers that a pipeline writes once per batch, but the unsplit model once per microbatch."""
    return batch.division.tail.writes if batch.division.tail is not None else ()


def _described(batch: Batch) -> str:
    shapes = [f"{name} {list(tensor.shape)}" for name, tensor in batch.call.tensors.items()]
    return ", ".join(shapes[:3]) + (f" +{len(shapes) - 3}" if len(shapes) > 3 else "")


# Restoring state


@contextmanager
def _preserved(model: nn.Module, devices: Sequence[torch.device]) -> Iterator[None]:
    """Restores training modes, generators and autograd modes at exit; each check undoes its other changes."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        with undrawn(devices), torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
