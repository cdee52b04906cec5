"""How much an optimizer keeps for each byte of parameters: one is made for a small parameter, and steps."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from pipecompile.partition import ADAM

SIDE = 64  # of the parameter: large enough that a counter of steps does not matter


def optimizer_state(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> float:
    """Bytes of optimizer state for each byte of float32 parameters: SGD 0, with momentum 1, Adam 2.

    Of an optimizer that cannot step on such a parameter as much as Adam's is assumed, with a warning.
    """
    parameter = nn.Parameter(torch.ones(SIDE, SIDE))
    parameter.grad = torch.ones_like(parameter)
    try:
        optimizer = make([parameter])
        optimizer.step()
    except Exception as error:  # whatever the user's own optimizer raises
        warnings.warn(
            f"optimizer= cannot step on a single parameter of shape {tuple(parameter.shape)} "
            f"({type(error).__name__}: {error}); plans count as much state as Adam has (or optimizer_state=)",
            stacklevel=2,
        )
        return ADAM
    tensors = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
    return sum(t.nbytes for t in tensors if t.numel() > 1) / parameter.nbytes
