"""``save`` writes a training state that continues on any number of stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipecompile.checkpoint import saving, staged
from pipecompile.checkpoint.company import Company
from pipecompile.checkpoint.files import packed, refuse_not_plain, write_plain, write_tensors
from pipecompile.checkpoint.named_state import NamedState, named_state, refuse_strangers
from pipecompile.checkpoint.random_state import random_state
from pipecompile.checkpoint.saving import Saving
from pipecompile.checkpoint.subject import Subject
from pipecompile.errors import InputError


def save(
    directory: str | Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    scheduler: Any = None,
    *,
    extra: Mapping[str, Any] | None = None,
    keep: int | None = None,
    asynchronous: bool = False,
) -> Saving:
    """Writes a checkpoint: complete or, whatever happens meanwhile, absent.

    In several processes, all of them call it, on a directory that all of them see.

    Args:
        directory: the checkpoint, which must not exist. ``latest`` finds those whose names end in a number
            (``runs/step_100``).
        model: a pipe, or a model that is not split. Saved are its parameters and persistent buffers under their names,
            tied ones once, and the states of the random generators.
        optimizer: its state and hyperparameters are saved by the names of parameters, with gradients that it has not
            used (``zero_grad()`` before makes the checkpoint smaller). The optimizers inside a pipeline with
            ``schedule="pipedream"`` are saved without being given.
        scheduler: of the learning rate; anything with ``state_dict()``.
        extra: what else the script needs to continue, such as the step: numbers, strings, tensors, and lists, tuples
            and dicts of them. Of several processes, that of the first one is saved.
        keep: the number of checkpoints that are kept of those with the same name up to the number. Older ones are
            removed once this one is complete.
        asynchronous: copy the state, and write it while training goes on.

    Returns:
        The checkpoint that is being written; without ``asynchronous``, it is complete. The next ``save`` of the model,
        and ``close`` of its pipeline, wait for it and raise its error.

    Raises:
        InputError: arguments are not valid, the directory exists, the model has not been split over its processes yet,
            or it has a state that checkpoints do not keep.
        CheckpointError: the checkpoint, or the last one, could not be written.
        RankError: a process has failed.
    """
    subject, folder = Subject.of(model), Path(directory).absolute()  # the script may change its directory meanwhile
    subject.agree(f"save to {str(folder)!r}{' in the background' if asynchronous else ''}")
    company = subject.company
    company.do(lambda: saving.finish(subject))
    state, plain = company.do(lambda: _state(subject, folder, optimizer, scheduler, extra, keep))
    kept = company.gathered(({name: asdict(each) for name, each in state.kept.items()}, state.optimizer))
    parts = {name: each for part, _ in kept for name, each in part.items()}
    kinds = sorted({kind for _, kind in kept if kind})
    company.do(lambda: _refuse_kinds(kinds))
    plain["optimizer"] = {"class": kinds[0], "parameters": parts} if kinds else None
    # what is written must be in the host's memory: another thread would not wait for this thread's streams
    tensors = {key: tensor.to("cpu", copy=asynchronous) for key, tensor in state.tensors.items()}
    writing = company.do_first(lambda: staged.begin(folder))
    job = partial(_write, subject.company_beside, tensors, packed(plain), writing, folder, keep)
    found = saving.start(subject, folder, job)
    if subject.pipeline is not None:
        subject.pipeline.before_close[:] = [partial(saving.finish, subject)]
    if not asynchronous:
        saving.finish(subject)
    return found


def _state(
    subject: Subject, folder: Path, optimizer: Any, scheduler: Any, extra: Any, keep: int | None
) -> tuple[NamedState, dict[str, Any]]:
    """What this process writes, and the plain values, of which those of the first one are written."""
    if keep is not None and (keep < 1 or not staged.NUMBERED.fullmatch(folder.name)):
        raise InputError(
            f"keep={keep} for {folder.name!r}: older checkpoints are found by the number at the end of their names; "
            f"use a name such as 'step_100', and keep 1 or more"
        )
    subject.refuse_in_flight("saved")
    optimizers = subject.optimizers(optimizer)
    refuse_strangers(subject.tensors, optimizers)
    plain = {
        "random": random_state(),
        "scheduler": None if scheduler is None else scheduler.state_dict(),
        "extra": dict(extra or {}),
    }
    state = named_state(subject.written, optimizers)
    refuse_not_plain({**plain, "the optimizer": [asdict(each) for each in state.kept.values()]})
    return state, plain


def _refuse_kinds(kinds: Sequence[str]) -> None:
    if len(kinds) > 1:
        raise InputError(
            f"the optimizers of the processes, or of the stages, are {' and '.join(kinds)}; use the same class in all"
        )


def _refuse_unseen(writing: Path) -> None:
    if not writing.is_dir():
        raise InputError(
            f"{str(writing.parent)!r} is not the same folder in all processes; choose one on a file system that all "
            f"hosts share"
        )


def _write(
    company: Company,
    tensors: Mapping[str, Tensor],
    plain: bytes,
    writing: Path,
    folder: Path,
    keep: int | None,
) -> None:
    """Writes what is given, then gives the folder its name."""

    def commit() -> None:
        write_plain(writing, plain)
        staged.commit(writing, folder)
        if keep is not None:
            staged.prune(folder, keep)

    try:
        company.do(lambda: _refuse_unseen(writing))
        write_tensors(writing, tensors, company)
        company.do_first(commit)
    except Exception:
        if company.rank == 0:
            staged.drop(writing)
        raise
