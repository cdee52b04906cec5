"""The seconds of an optimizer's step, from steps on small and on large parameters."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median

import torch
from torch import nn

from pipecompile.planning.updates import UpdateCost

MANY, SMALL, LARGE = 8, 64, 1 << 20  # parameters of one step; their numbers
WARM_UP, STEPS = 2, 5


def update_cost(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> UpdateCost | None:
    """The seconds of a step on the CPU, as a line over bytes; None if the optimizer cannot step on such parameters."""
    try:
        small = _seconds(make, [SMALL] * MANY) / MANY
        large = _seconds(make, [LARGE])
    except Exception:  # a user's optimizer can raise anything; ``optimizer_state`` warns of it
        return None
    per_byte = max(0.0, large - small) / (4 * (LARGE - SMALL))
    return UpdateCost(per_parameter=max(0.0, small - per_byte * 4 * SMALL), per_byte=per_byte)


def _seconds(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer], sizes: Sequence[int]) -> float:
    """The median seconds of a step."""
    parameters = [nn.Parameter(torch.ones(size)) for size in sizes]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer = make(parameters)
    times = []
    for _ in range(WARM_UP + STEPS):
        began = time.perf_counter()
        optimizer.step()
        times.append(time.perf_counter() - began)
    return median(times[WARM_UP:])
