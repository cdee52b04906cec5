"""Parameters whose memory is in another process.

A parameter that is *away* keeps its identity, shape and type, and has the memory of one number, which all of its
entries share. The number is NaN, so that a value that should not have been read shows.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from contextlib import suppress

import torch
from torch import Tensor, nn

MARK = "_pipecompile_away"  # attribute of such a parameter


def send_away(parameters: Iterable[nn.Parameter]) -> None:
    """Frees the memory of parameters and of their gradients."""
    for parameter in parameters:
        value = float("nan") if parameter.is_floating_point() or parameter.is_complex() else 0
        one = torch.full((), value, dtype=parameter.dtype, device=parameter.device)
        parameter.data = one.expand(parameter.shape)
        setattr(parameter, MARK, True)
        parameter.grad = None
    with suppress(AttributeError, OSError):  # glibc keeps what is freed, until it is told not to
        ctypes.CDLL(None).malloc_trim(0)


def is_away(tensor: Tensor) -> bool:
    """Whether a tensor is a parameter that has been sent away."""
    return hasattr(tensor, MARK)
