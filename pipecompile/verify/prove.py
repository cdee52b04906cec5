"""The check of a capture before it trains: one step is compared with the unsplit model's, on a slice of the batch.

The slice has three microbatches (a first, a last and one between them) of three, two and two rows, so that a lost
microbatch, or one weighted as if all were equal, shows. If the schedule, the replicas or the model do not accept it, as
many microbatches as the call has are compared, of two rows and one more, or else all rows. Both models draw the same
random numbers. The check leaves no trace in the model.

A value that differs by more than ``comparison.allowed`` is compared again with a tolerance from the unsplit model's own
rounding (``rounding``). If that tolerance could hide a lost microbatch, the proof says so.
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
from pipecompile.runtime.batch import Batch
from pipecompile.verify.blame import first_that_differs
from pipecompile.verify.comparison import coarsest_type, differences
from pipecompile.verify.results import Difference, Proof
from pipecompile.verify.rounding import with_noise
from pipecompile.verify.side_by_side import Trial, apart, copied, incomparable, only_together, split_step, unsplit_step

LISTED = 5  # differences listed in an error
FEWEST = 3  # microbatches of a slice


def prove(trial: Trial) -> Proof:
    """Compares one step of a split model with the unsplit model's step.

    Args:
        trial: the user's call; a slice of it is run, or all of it if no slice is accepted.

    Raises:
        ExactnessError: they differ; the message lists the differences, and the module where they begin.
        Exception: the unsplit model itself raises on the call.
    """
    start = time.perf_counter()
    functions = [] if trial.loss_fn is None else [trial.loss_fn]
    trial = replace(trial, reach=reach_of(trial.model, functions, trial.reach))
    faults: list[str] = []
    with _nothing_left(trial):
        for candidate in (*_slices(trial), trial):
            if why := incomparable(candidate):
                return _unproven(trial, why)
            try:
                proof = _compare(candidate)
            except ExactnessError:
                raise
            except torch.OutOfMemoryError:
                return _unproven(trial, "the step does not fit into memory")
            except Exception as error:
                if candidate is not trial:  # fewer rows, or microbatches, may not be accepted
                    faults += _faults(candidate, error)
                    continue
                if not isinstance(error, PipecompileError):
                    error.add_note(
                        "raised by the unsplit model, which pipecompile runs to verify this call; see verify="
                    )
                raise
            note = _joined(proof.note, *faults)
            return replace(proof, of=_rows(trial), seconds=time.perf_counter() - start, note=note)
    raise AssertionError("the whole call is always tried")


def _faults(trial: Trial, error: Exception) -> list[str]:
    """What a slice raised, if the unsplit model accepts it."""
    if _unsplit_raises(trial, left_too=False):
        return []
    return [f"the pipeline raised {type(error).__name__} on {_rows(trial)} rows, the unsplit model did not: {error}"]


def _rows(trial: Trial) -> int:
    return trial.batch.call.batch or 1


def _slices(trial: Trial) -> Iterator[Trial]:
    """The trial on the fewest rows that tell microbatches apart: in three microbatches, then in as many as it has.

    Nothing for which the batch has too few rows.
    """
    batch = trial.batch
    given = len(batch.rows)
    replicated = len({*batch.compiled.plan.replica_of}) < len(batch.compiled.plan.replica_of)
    for microbatches in (given,) if replicated or given <= FEWEST else (FEWEST, given):
        rows = Rows((3, *(2,) * (microbatches - 1)))
        if batch.call.batch is None or batch.call.batch <= sum(rows.counts):
            return
        call = copied(batch.call, sum(rows.counts))
        try:
            broken = batch.compiled.broken(call, rows)
        except Exception:  # guards on input values cannot be computed from fewer rows
            continue
        if not broken:
            yield replace(trial, batch=replace(batch, call=call, rows=rows))


def _compare(trial: Trial, left_too: bool = True, note: str = "") -> Proof:
    """One comparison; on the whole batch as one microbatch if microbatches cannot be compared.

    Args:
        left_too: whether gradients of what the forward stores in the model are compared. They are left out where the
            unsplit model cannot compute them: what it stores need not have a legal backward.
        note: what the proof says besides.
    """
    why = apart(trial)
    if why and (together := only_together(trial)):
        whole = Rows((_rows(trial),))
        if trial.batch.compiled.broken(trial.batch.call, whole):
            return _unproven(trial, f"{why}, and {together}")
        note = _joined(note, f"compared as one microbatch, since {why} and {together}")
        trial, why = replace(trial, batch=replace(trial.batch, rows=whole)), ""
    if why:
        note = _joined(note, f"compared on the same microbatches, since {why}")
        left_too = False
    split = None
    parts = trial.rows if why else Rows((_rows(trial),))
    try:
        split, seeds = split_step(trial.fresh(), left_too)
        try:
            whole_run = unsplit_step(trial.fresh(), parts, seeds)
        except torch.OutOfMemoryError:
            whole_run = unsplit_step(trial.fresh(), parts, seeds, torch.device("cpu"))
            note = _joined(note, "the unsplit model ran on the CPU")
    except Exception:
        raised = _unsplit_raises(trial, left_too)
        if raised and left_too and not _unsplit_raises(trial, left_too=False):
            return _compare(trial, False, _joined(note, f"what the forward stores has no gradient: {raised}"))
        if raised and split is None:  # an output whose gradient cannot be computed
            return Proof(0, (), note=_joined(note, f"not compared: the unsplit model raises {raised}"))
        raise
    coarsest = coarsest_type(node.meta.get("val") for node in trial.captured.graph.nodes)
    found = differences(split, whole_run, coarsest)
    found = tuple(it for it in found if not (_moved_otherwise(trial, it) or (why and _written_once(trial, it))))
    if any(
        map(_is_state, found)
    ):  # a difference made by the model shows again; other threads (a progress bar) set attributes too
        once_more, given = split_step(trial.fresh(), left_too)
        whole_again = unsplit_step(trial.fresh(), parts, given)
        shows = {it.name for it in differences(once_more, whole_again, coarsest) if _is_state(it)}
        by_itself = {it.name for it in differences(whole_run, whole_again, coarsest) if _is_state(it)}
        if by_itself & shows:
            said = (
                f"not compared, since the unsplit model sets other values in each run: {', '.join(sorted(by_itself))}"
            )
            note = _joined(note, said)
        shows -= by_itself
        found = tuple(it for it in found if not _is_state(it) or it.name in shows)
    wrong = [it for it in found if it.verdict == "different"]
    if wrong:
        found = with_noise(found, trial, parts, seeds, whole_run)
        if any(it.verdict == "different" for it in found):
            raise ExactnessError(_message(trial, [it for it in found if it.verdict == "different"]))
        note = _joined(note, _noise_note(trial, wrong))
    return Proof(_rows(trial), trial.rows.counts, found, note=note)


def _is_state(it: Difference) -> bool:
    return it.kind == "attribute" and it.verdict == "different"


def _noise_note(trial: Trial, rounded: Sequence[Difference]) -> str:
    most = max(it.relative for it in rounded)
    if math.isfinite(most) and most > 1 / (2 * len(trial.rows)):
        return f"rounding alone changes the unsplit model's values by {most:.0%}, so a lost microbatch might not show"
    return f"{len(rounded)} tensors differ by no more than the unsplit model's own rounding"


def _joined(*notes: str) -> str:
    return "; ".join(filter(None, notes))


def _unsplit_raises(trial: Trial, left_too: bool) -> str:
    """What the unsplit model raises in the forward or backward of a call; empty if it does not raise."""
    try:
        unsplit_step(trial.fresh(), Rows((_rows(trial),)), None, left_too=left_too)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _moved_otherwise(trial: Trial, it: Difference) -> bool:
    """Whether this is a running statistic that a checkpoint updates twice, but a deferring pipeline once."""
    return trial.batching.batch_norm == "deferred" and it.kind == "buffer" and bool(trial.captured.recomputed)


def _written_once(trial: Trial, it: Difference) -> bool:
    """Whether a pipeline writes this once per batch, but the unsplit model once per microbatch."""
    tail = trial.batch.division.tail
    return it.kind == "attribute" or (tail is not None and it.name in tail.writes)


def _unproven(trial: Trial, why: str) -> Proof:
    note = f"not compared with the unsplit model: {why}"
    warnings.warn(f"{note}; pass verify='never' to pipecompile.compile() to skip the comparison", stacklevel=5)
    return Proof(0, (), note=note)


# The error message


def _message(trial: Trial, wrong: Sequence[Difference]) -> str:
    listed = [f"  {it}" for it in wrong[:LISTED]]
    more = [f"  and {len(wrong) - LISTED} more"] if len(wrong) > LISTED else []
    try:
        where = first_that_differs(trial, wrong)
    except Exception as error:  # modules may fail when run by themselves
        where = f"which module differs first could not be found ({type(error).__name__}: {error})"
    backend = trial.batch.compiled.stages[0].backend
    compiled = [f"The stages are compiled by {backend}; stage_compile=False tells whether it is the cause."]
    rows = f"{_rows(trial)} rows in {len(trial.rows)} microbatches" if len(trial.rows) > 1 else f"{_rows(trial)} rows"
    return "\n".join(
        [
            f"the split model does not compute what the unsplit model does, on {rows} of this call:",
            *listed,
            *more,
            f"{where}.",
            *(compiled if backend else []),
            _what_to_do(trial, wrong),
        ]
    )


def _what_to_do(trial: Trial, wrong: Sequence[Difference]) -> str:
    hooked = [path for path, it in trial.model.named_modules() if it._backward_hooks or it._backward_pre_hooks]
    if hooked and all(it.kind == "attribute" for it in wrong):
        return (
            f"The backward hook of module {hooked[0]!r} runs once per microbatch, and before the caller scales a loss "
            f"that the model computes, so it cannot store what it gets. Use a forward hook that stores the module's "
            f"output and calls retain_grad() on it; the model and its gradients are unchanged."
        )
    return (
        "Keep that module whole with leaf_modules=[...], or use microbatches=1; the model and its gradients are "
        "unchanged. Please report this: pipecompile should have refused the model, or been exact."
    )


# Restoring state


@contextmanager
def _nothing_left(trial: Trial) -> Iterator[None]:
    """Restores generators, modes and hooks on parameters at exit; a step undoes its other changes itself."""
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
    """Disables hooks on the gradients of parameters, which are for real steps.

    Autograd keeps references to a parameter's tables of hooks, so the tables are emptied in place.
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
    """Whether to compare a call with the unsplit model.

    Args:
        verify: "first", "never", "every", or a number n: the first and every nth call.
        calls: the number of earlier calls.
        proven: whether a call of the same kind on the same capture has been compared.
    """
    if verify == "never":
        return False
    if verify == "every":
        return True
    return not proven or (isinstance(verify, int) and calls % verify == 0)


def first_microbatch(batch: Batch) -> Batch:
    """The first microbatch of a call, as a batch."""
    count = batch.rows.counts[0]
    if batch.call.batch is None:
        return batch
    return replace(batch, call=copied(batch.call, count), rows=Rows((count,)))
