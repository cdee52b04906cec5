"""Optimizers that would compute with the parameters of one process only, seen at their first step.

Any code may make an optimizer of the parameters, so torch's hook of all optimizers is the only place that sees each. It
is there while a pipeline of several processes is open.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any, Protocol
from weakref import WeakSet

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from pipecompile.distributed.grad_scaler import GradScaler
from pipecompile.errors import InputError

DEPTH = 6  # frames between a step and the scaler that calls it
_STEPS = {f.__code__ for f in (torch.amp.GradScaler._maybe_opt_step, torch.amp.GradScaler.step)}


class Split(Protocol):
    """What has parameters of which other processes have more."""

    def stepped(self) -> Iterator[Tensor]:
        """What an optimizer may step."""

    def divides_own(self, tensor: Tensor) -> bool:
        """Whether a tensor is one of a model that gets no gradients, because its rows do."""

    def is_stepped(self, parameters: Iterable[Tensor]) -> None:
        """Takes note that an optimizer of these parameters is about to step."""


_seen: WeakSet[Split] = WeakSet()
_hooks: list[RemovableHandle] = []


def watch_optimizers(split: Split) -> None:
    """Refuses, from now on, steps of parameters that would differ from those of the whole model.

    Those of LBFGS, which follow from all gradients at once; those that torch's own ``GradScaler`` makes, which would
    skip the step of one process only; and those of parameters whose rows are trained instead.
    """
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_look))
    _seen.add(split)


def leave_optimizers(split: Split) -> None:
    """Refuses steps no more. torch's hook of all optimizers goes with the last one that is watched."""
    _seen.discard(split)
    while _hooks and not _seen:
        _hooks.pop().remove()


def _look(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Before each step of any optimizer.

    Raises:
        InputError: it is one of parameters of a model that several processes have, and would differ from theirs.
    """
    _refuse_own(optimizer)
    if isinstance(optimizer, torch.optim.LBFGS) and _is_split(optimizer):
        raise InputError(
            "LBFGS computes its step from all parameters at once, but this process has a part of them only; use an "
            "optimizer that treats each parameter by itself, such as AdamW, or devices= instead of mesh="
        )
    scaler = _scaler()
    if isinstance(scaler, torch.amp.GradScaler) and scaler.is_enabled() and _is_split(optimizer):
        raise InputError(
            "torch's GradScaler sees infinite gradients of this process only, so processes would skip different "
            "steps; use scaler = pipe.pipeline.grad_scaler(), which sees those of all"
        )
    for split in _seen:
        split.is_stepped(parameter for group in optimizer.param_groups for parameter in group["params"])


def _refuse_own(optimizer: torch.optim.Optimizer) -> None:
    """Refuses the model's own parameters where their rows are trained: they would get no gradients."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if any(split.divides_own(parameter) for split in _seen):
                raise InputError(
                    f"the optimizer has a parameter of shape {list(parameter.shape)} whose rows are divided over "
                    f"processes (fully_shard=True), so it would not be trained; make the optimizer from "
                    f"pipe.parameters() or pipe.named_parameters(), not from those of a module inside"
                )


def _is_split(optimizer: torch.optim.Optimizer) -> bool:
    own = {id(tensor) for group in optimizer.param_groups for tensor in group["params"]}
    return any(id(tensor) in own for split in _seen for tensor in split.stepped())


def _scaler() -> object:
    """The scaler of torch's own that makes the step, if one does."""
    frame: FrameType | None = sys._getframe(1)
    for _ in range(DEPTH):
        if frame is not None and frame.f_code in _STEPS:
            scaler = frame.f_locals.get("self")
            return None if isinstance(scaler, GradScaler) else scaler
        frame = frame and frame.f_back
    return None
