"""Optimizer state follows parameters that have moved to another device.

A pipeline does not know the optimizers of its parameters. So a hook of torch, which runs before the step of every
optimizer, moves what one has for a parameter that has moved. When each of them has been met, the hook is gone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary


class OptimizersFollow:
    """The parameters that have moved, and that no optimizer has stepped since."""

    def __init__(self) -> None:
        self._moved: Any = WeakTensorKeyDictionary()  # parameter -> the device that it was on
        self._hook: RemovableHandle | None = None

    @contextmanager
    def moving(self, model: nn.Module) -> Iterator[None]:
        """A context in which parameters of a model move. Their gradients move too."""
        before = {parameter: parameter.device for parameter in model.parameters()}
        yield
        for parameter, device in before.items():
            if parameter.device != device:
                self._moved[parameter] = device
                if parameter.grad is not None:
                    parameter.grad = parameter.grad.to(parameter.device)
        if len(self._moved) and self._hook is None:
            self._hook = register_optimizer_step_pre_hook(self._before_step)

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            if parameter in self._moved:
                device = self._moved.pop(parameter)
                state = optimizer.state.get(parameter, {})
                for name, value in state.items():
                    state[name] = _moved(value, parameter, device)
        if not len(self._moved) and self._hook is not None:
            self._hook.remove()
            self._hook = None


def _moved(value: Any, parameter: Tensor, old: torch.device) -> Any:
    """A value of the state on the parameter's device; a counter on the CPU stays there."""
    if not isinstance(value, Tensor) or value.device != old or (old.type == "cpu" and value.shape != parameter.shape):
        return value
    return value.to(parameter.device)
