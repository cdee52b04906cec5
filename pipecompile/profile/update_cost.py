"""The seconds of an optimizer's step, from steps on small and on large parameters."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median

import torch
from torch import nn

from pipecompile.capture.state.restore import generators_kept
from pipecompile.ops.device_args import threads_of
from pipecompile.planning.updates import UpdateCost

MANY, SMALL, LARGE = 8, 8, 1 << 10  # parameters of one step; sides of the matrices, which all optimizers can step on
WARM_UP, STEPS = 2, 5
ENOUGH = 0.5  # seconds after which no further step is made


def update_cost(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer], threads: int) -> UpdateCost | None:
    """The seconds of a step on the CPU, as a line over bytes; None if the optimizer cannot step on such parameters.

    Steps may draw random numbers: generators are as they were before.

    Args:
        make: the optimizer, from parameters.
        threads: intra-op threads of a device.
    """
    try:
        with generators_kept(), threads_of(threads):
            small = _seconds(make, [SMALL] * MANY) / MANY
            large = _seconds(make, [LARGE])
    except Exception:  # a user's optimizer can raise anything; ``optimizer_state`` warns of it
        return None
    per_byte = max(0.0, large - small) / (4 * (LARGE**2 - SMALL**2))
    return UpdateCost(per_parameter=max(0.0, small - per_byte * 4 * SMALL**2), per_byte=per_byte)


def _seconds(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer], sides: Sequence[int]) -> float:
    """The median seconds of a step."""
    parameters = [nn.Parameter(torch.ones(side, side, dtype=torch.float32)) for side in sides]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer = make(parameters)
    times: list[float] = []
    while len(times) < WARM_UP + STEPS and sum(times) < ENOUGH:
        began = time.perf_counter()
        optimizer.step()
        times.append(time.perf_counter() - began)
    return median(times[WARM_UP:] or times[-1:])
