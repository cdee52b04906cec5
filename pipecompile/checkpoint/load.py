"""``load`` continues a training from a checkpoint, on any number of stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from pipecompile.checkpoint import saving
from pipecompile.checkpoint.files import described, read_metadata, read_plain, read_tensors
from pipecompile.checkpoint.named_state import GRADIENT, MODEL, OPTIMIZER, class_of
from pipecompile.checkpoint.optimizer_state import refuse_other_parameters, refuse_split_groups, set_optimizer
from pipecompile.checkpoint.random_state import set_random_state
from pipecompile.checkpoint.subject import Subject
from pipecompile.errors import InputError

Described = Mapping[str, TensorStorageMetadata]


def load(
    directory: str | Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    scheduler: Any = None,
) -> dict[str, Any]:
    """Loads a checkpoint into a model, in place.

    In several processes, all of them call it. Each reads what it has of the model.

    Args:
        directory: a checkpoint, written by ``save``; see ``latest``.
        model: a pipe with any number of stages, or a model that is not split, with the same parameters and buffers.
        optimizer: gets its state and hyperparameters. Given one, training is to continue: unused gradients and the
            states of the random generators are restored too. With ``schedule="pipedream"``, they are if the checkpoint
            has an optimizer.
        scheduler: gets its state.

    Returns:
        What ``save`` was given as ``extra``.

    Raises:
        InputError: it is not a checkpoint, one of another model or optimizer, or of a newer format. Nothing has been
            changed.
        CheckpointError: it is damaged. The model may have been loaded in part.
    """
    subject, folder = Subject.of(model), Path(directory)
    subject.agree(f"load {str(folder)!r}")
    company = subject.company
    company.do(lambda: saving.finish(subject))

    def examine() -> tuple[dict[str, Any], Metadata]:
        subject.refuse_in_flight("loaded")
        plain, metadata = read_plain(folder), read_metadata(folder)
        _refuse_other_model(subject, described(metadata))
        optimizers = subject.optimizers(optimizer)
        if _goes_on(subject, optimizer, plain):
            _refuse_other_optimizer(subject, plain["optimizer"], optimizers)
        if scheduler is not None:
            _refuse_other_scheduler(plain["scheduler"], scheduler)
        return plain, metadata

    plain, metadata = company.do(examine)
    goes_on = _goes_on(subject, optimizer, plain)
    company.do(lambda: _read(subject, folder, metadata, plain, subject.optimizers(optimizer) if goes_on else ()))
    if scheduler is not None:
        scheduler.load_state_dict(plain["scheduler"])
    if goes_on:
        set_random_state(plain["random"])
    extra: dict[str, Any] = plain["extra"]
    return extra


def _goes_on(subject: Subject, optimizer: object, plain: Mapping[str, Any]) -> bool:
    """Whether the training is to continue, rather than to begin with these weights."""
    return optimizer is not None or (subject.steps_inside and plain["optimizer"] is not None)


def _read(
    subject: Subject,
    folder: Path,
    metadata: Metadata,
    plain: Mapping[str, Any],
    optimizers: Sequence[torch.optim.Optimizer],
) -> None:
    kept, known = plain["optimizer"]["parameters"] if optimizers else {}, described(metadata)
    names = {id(tensor): name for name, tensor in subject.present.items()}
    targets = {f"{MODEL}{name}": tensor.detach() for name, tensor in subject.present.items()}
    trained = {names[id(p)]: p for o in optimizers for g in o.param_groups for p in g["params"] if id(p) in names}
    own = {f"{GRADIENT}{name}": name for name in trained if f"{GRADIENT}{name}" in known}
    own |= {f"{OPTIMIZER}{name}.{key}": name for name in trained if name in kept for key in kept[name]["tensors"]}
    targets |= {key: _memory(known[key], trained[name]) for key, name in own.items()}
    read_tensors(folder, metadata, targets)
    for optimizer in optimizers:
        set_optimizer(optimizer, names, kept, targets)
    for name, parameter in trained.items():
        gradient = targets.get(f"{GRADIENT}{name}")
        parameter.grad = None if gradient is None else gradient.to(parameter.device)


def _memory(described: TensorStorageMetadata, parameter: Tensor) -> Tensor:
    """For a tensor that belongs to a parameter; divided as that is, if it has its shape."""
    if described.size == parameter.shape:
        return torch.empty_like(parameter.detach(), dtype=described.properties.dtype, device="cpu")
    return torch.empty(described.size, dtype=described.properties.dtype)


def _refuse_other_model(subject: Subject, known: Described) -> None:
    """Raises ``InputError`` if the model has other tensors than the checkpoint; names the first, and their number."""
    saved = {key.removeprefix(MODEL): each for key, each in known.items() if key.startswith(MODEL)}
    own: Mapping[str, Tensor] = subject.tensors
    missing, unexpected = [name for name in own if name not in saved], [name for name in saved if name not in own]
    for names, said in ((missing, "in the model and not in the checkpoint"), (unexpected, "in the checkpoint alone")):
        if names:
            raise InputError(
                f"{names[0]!r}{_others(names)} {'is' if len(names) == 1 else 'are'} {said}; the model has {len(own)} "
                f"tensors, and must be the one that was saved, with the same ties between parameters"
            )
    for what, of_saved, of_own in (
        ("shape", lambda each: list(each.size), lambda tensor: list(tensor.shape)),
        ("type", lambda each: each.properties.dtype, lambda tensor: tensor.dtype),
    ):
        odd = [name for name, tensor in own.items() if of_saved(saved[name]) != of_own(tensor)]
        if odd:
            raise InputError(
                f"{odd[0]!r}{_others(odd)} had another {what} when saved: {of_saved(saved[odd[0]])}, not "
                f"{of_own(own[odd[0]])}; build the model as it was saved, and change it after load()"
            )


def _others(names: Sequence[str]) -> str:
    more = len(names) - 1
    return f" and {more} other{'s' if more > 1 else ''}" if more else ""


def _refuse_other_optimizer(
    subject: Subject, kept: Mapping[str, Any] | None, optimizers: Sequence[torch.optim.Optimizer]
) -> None:
    if kept is None:
        raise InputError("the checkpoint was saved without an optimizer; leave out optimizer=, or load another one")
    if optimizers and class_of(optimizers) != kept["class"]:
        raise InputError(
            f"the checkpoint has the state of {kept['class']}, which {class_of(optimizers)} cannot continue; make the "
            f"same optimizer, or leave out optimizer= to load the weights alone"
        )
    parameters = kept["parameters"]
    refuse_other_parameters(subject.written, optimizers, parameters)
    refuse_split_groups({id(tensor): name for name, tensor in subject.tensors.items()}, optimizers, parameters)


def _refuse_other_scheduler(state: Mapping[str, Any] | None, scheduler: Any) -> None:
    if state is None:
        raise InputError("the checkpoint was saved without a scheduler; leave out scheduler=, or load another one")
    saved, own = state.get("base_lrs"), getattr(scheduler, "base_lrs", None)
    if saved is not None and own is not None and len(saved) != len(own):
        raise InputError(
            f"the scheduler was saved for {len(saved)} groups of parameters, but the optimizer has {len(own)}; make "
            f"the same groups, if necessary empty ones"
        )
