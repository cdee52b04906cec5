"""The check that a capture passes before it trains: one step beside the unsplit model's own, on a slice of the batch.

The slice has as few rows as leave every microbatch two, and the first one three, so that a microbatch that is lost, or
weighed as if all were equal, shows. Both models draw the same random numbers. Nothing of the check is left behind.

What differs by more than ``comparison.allowed`` is judged once more by how well the unsplit model knows its own
numbers (``rounding``). Where that noise is as large as what a lost microbatch would do, nothing is proven, and that is
said.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn

from pipecompile.batching import Rows
from pipecompile.capture.state.quiet_torch import not_collecting
from pipecompile.capture.state.reachable import reach_of
from pipecompile.errors import ExactnessError, PipecompileError
from pipecompile.ops.randomness import alike, undrawn
from pipecompile.runtime import steps
from pipecompile.verify.blame import first_that_differs
from pipecompile.verify.comparison import coarsest_type, differences
from pipecompile.verify.results import Difference, Proof
from pipecompile.verify.rounding import with_noise
from pipecompile.verify.side_by_side import Trial, apart, copied, incomparable, split_step, unsplit_step

LISTED = 5  # differences that an error lists


def prove(trial: Trial) -> Proof:
    """Compares one step of a split model with the unsplit model's.

    Args:
        trial: the user's call; a slice of it is run, or all of it where the model does not take a slice.

    Raises:
        ExactnessError: they differ; says what, and in which module it begins.
        Exception: what the unsplit model itself raises on the call.
    """
    start = time.perf_counter()
    functions = [] if trial.loss_fn is None else [trial.loss_fn]
    trial = replace(trial, reach=reach_of(trial.model, functions))
    with _nothing_left(trial):
        for candidate in (sliced := _slice(trial), trial):
            if candidate is None:
                continue
            if why := incomparable(candidate):
                return _unproven(trial, why)
            try:
                proof = _compare(candidate)
            except ExactnessError:
                raise
            except torch.OutOfMemoryError:
                return _unproven(trial, "it does not fit into memory")
            except Exception as error:
                if candidate is sliced:  # the model may not take fewer rows than the batch has
                    continue
                if not isinstance(error, PipecompileError):
                    error.add_note("raised by the unsplit model, which pipecompile compares a first call with")
                raise
            return replace(proof, of=_rows(trial), seconds=time.perf_counter() - start)
    raise AssertionError("the whole call is always tried")


def _rows(trial: Trial) -> int:
    return trial.batch.call.batch or 1


def _slice(trial: Trial) -> Trial | None:
    """The trial on as few rows as tell microbatches apart; None if the batch has no more, or the capture needs all."""
    batch = trial.batch
    count = 2 * len(batch.rows) + 1
    if batch.call.batch is None or batch.call.batch <= count:
        return None
    rows = Rows((3, *(2,) * (len(batch.rows) - 1)))
    call = copied(batch.call, count)
    try:
        if batch.compiled.broken(call, rows):
            return None
    except Exception:  # what the model reads from its inputs cannot be computed from fewer rows
        return None
    return replace(trial, batch=replace(batch, call=call, rows=rows))


def _compare(trial: Trial) -> Proof:
    """One comparison; of a model that cannot be compared on microbatches, on one of them all."""
    note = ""
    why = apart(trial)
    if why and trial.batch.sees_the_whole:
        whole = Rows((_rows(trial),))
        if trial.batch.compiled.broken(trial.batch.call, whole):
            return _unproven(trial, f"{why}, and its loss is of the whole batch")
        note = f"compared as one microbatch, since {why} while its loss is one of the whole batch"
        trial, why = replace(trial, batch=replace(trial.batch, rows=whole)), ""
    if why:
        note = f"compared over the same microbatches, since {why}"
    try:
        split, seeds = split_step(trial.fresh(), left_too=not why)
    except Exception:
        if raised := _unsplit_raises(trial):  # gradients of an output that nobody may ask for
            return Proof(0, (), note=f"not compared: the unsplit model raises {raised}")
        raise
    parts = trial.rows if why else Rows((_rows(trial),))
    try:
        whole_run = unsplit_step(trial.fresh(), parts, seeds)
    except torch.OutOfMemoryError:
        whole_run = unsplit_step(trial.fresh(), parts, seeds, torch.device("cpu"))
        note = "; ".join(filter(None, [note, "the unsplit model ran on the CPU"]))
    coarsest = coarsest_type(node.meta.get("val") for node in trial.captured.graph.nodes)
    found = differences(split, whole_run, coarsest)
    found = tuple(it for it in found if not (_moved_otherwise(trial, it) or (why and _written_once(trial, it))))
    if any(map(_is_state, found)):  # of the model it shows again; other threads, as a progress bar's, set variables too
        once_more, given = split_step(trial.fresh(), left_too=not why)
        whole_again = unsplit_step(trial.fresh(), parts, given)
        shows = {it.name for it in differences(once_more, whole_again, coarsest) if _is_state(it)}
        by_itself = {it.name for it in differences(whole_run, whole_again, coarsest) if _is_state(it)}
        if by_itself & shows:
            said = (
                f"not compared, since the unsplit model sets them otherwise in each run: {', '.join(sorted(by_itself))}"
            )
            note = "; ".join(filter(None, [note, said]))
        shows -= by_itself
        found = tuple(it for it in found if not _is_state(it) or it.name in shows)
    wrong = [it for it in found if it.verdict == "different"]
    if wrong:
        found = with_noise(found, trial, parts, seeds, whole_run)
        if any(it.verdict == "different" for it in found):
            raise ExactnessError(_message(trial, [it for it in found if it.verdict == "different"]))
        note = "; ".join(filter(None, [note, _noise_note(trial, wrong)]))
    return Proof(_rows(trial), trial.rows.counts, found, note=note)


def _is_state(it: Difference) -> bool:
    return it.kind == "attribute" and it.verdict == "different"


def _noise_note(trial: Trial, rounded: Sequence[Difference]) -> str:
    most = max(it.relative for it in rounded)
    if math.isfinite(most) and most > 1 / (2 * len(trial.rows)):
        return f"rounding alone moves the unsplit model's numbers by {most:.0%}: a lost microbatch might not show"
    return f"{len(rounded)} numbers differ by no more than the unsplit model's own rounding"


def _unsplit_raises(trial: Trial) -> str:
    """What the unsplit model raises on a call, in its forward or from gradients of its outputs; empty if nothing."""
    try:
        unsplit_step(trial.fresh(), Rows((_rows(trial),)), None)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _moved_otherwise(trial: Trial, it: Difference) -> bool:
    """Whether these are statistics that a checkpoint, run again, moves twice, and a pipeline that defers them once."""
    return trial.batching.batch_norm == "deferred" and it.kind == "buffer" and bool(trial.captured.recomputed)


def _written_once(trial: Trial, it: Difference) -> bool:
    """Whether a pipeline writes this once a batch, where the unsplit model does for each microbatch."""
    tail = trial.batch.division.tail
    return it.kind == "attribute" or (tail is not None and it.name in tail.writes)


def _unproven(trial: Trial, why: str) -> Proof:
    note = f"not compared with the unsplit model: {why}"
    warnings.warn(f"{note}; verify='never' to pipecompile.compile says that you know", stacklevel=5)
    return Proof(0, (), note=note)


# What is said


def _message(trial: Trial, wrong: Sequence[Difference]) -> str:
    listed = [f"  {it}" for it in wrong[:LISTED]]
    more = [f"  and {len(wrong) - LISTED} more"] if len(wrong) > LISTED else []
    try:
        where = first_that_differs(trial, wrong)
    except Exception as error:  # what differs may also fail when it is run by itself
        where = f"which module it begins in could not be found ({type(error).__name__}: {error})"
    rows = f"{_rows(trial)} rows in {len(trial.rows)} microbatches" if len(trial.rows) > 1 else f"{_rows(trial)} rows"
    return "\n".join(
        [
            f"the split model does not compute what the unsplit model does, on {rows} of this call:",
            *listed,
            *more,
            f"{where}.",
            "Keep that module whole with leaf_modules=[...], or use microbatches=1; model and gradients are as they "
            "were. Please report it: pipecompile should have refused the model, or been exact.",
        ]
    )


# Leaving no mark


@contextmanager
def _nothing_left(trial: Trial) -> Iterator[None]:
    """Generators, modes and hooks on parameters are as before at the end; what a step changes it undoes itself."""
    with (
        not_collecting(),
        undrawn(trial.devices),
        torch.inference_mode(False),
        torch.set_grad_enabled(trial.trains),
        alike(trial.generators),
        _without_hooks(trial.model),
    ):
        yield


@contextmanager
def _without_hooks(model: nn.Module) -> Iterator[None]:
    """Hooks on the gradients of parameters, which are for real steps, are not called.

    Autograd calls what stands in a parameter's tables, whoever has taken these from the parameter; so they are emptied.
    """
    tables = [t for p in model.parameters() for t in (p._backward_hooks, p._post_accumulate_grad_hooks) if t]
    held = [(table, dict(table)) for table in tables]
    for table in tables:
        table.clear()
    try:
        yield
    finally:
        for table, hooks in held:
            table.update(hooks)


def due(verify: str | int, calls: int, proven: bool) -> bool:
    """Whether a call is to be compared with the unsplit model.

    Args:
        verify: "first", "never", "every", or a number n: the first and each nth call.
        calls: that have been made before.
        proven: whether a call on the same capture, of the same kind, has been compared.
    """
    if verify == "never":
        return False
    if verify == "every":
        return True
    return not proven or (isinstance(verify, int) and calls % verify == 0)


def first_microbatch(batch: steps.Batch) -> steps.Batch:
    """The first microbatch of a call as a batch of its own."""
    count = batch.rows.counts[0]
    if batch.call.batch is None:
        return batch
    return replace(batch, call=copied(batch.call, count), rows=Rows((count,)))
