"""The optimizer state per byte of parameters, from one step of an optimizer on a small parameter."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from pipecompile.capture.state.restore import generators_kept
from pipecompile.partition import ADAM

SIDE = 64  # of the parameter: large enough that a step counter does not matter


def optimizer_state(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> float:
    """Bytes of optimizer state per byte of float32 parameters: SGD 0, with momentum 1, Adam 2.

    If the optimizer cannot step on such a parameter, the state of Adam is assumed, with a warning.
    """
    parameter = nn.Parameter(torch.ones(SIDE, SIDE))
    parameter.grad = torch.ones_like(parameter)
    try:
        with generators_kept():
            optimizer = make([parameter])
            optimizer.step()
    except Exception as error:  # a user's optimizer can raise anything
        warnings.warn(
            f"optimizer= cannot step on a single parameter of shape {tuple(parameter.shape)} "
            f"({type(error).__name__}: {error}); plans assume the state of Adam; use optimizer_state= to change it",
            stacklevel=2,
        )
        return ADAM
    tensors = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
    return sum(t.nbytes for t in tensors if t.numel() > 1) / parameter.nbytes
