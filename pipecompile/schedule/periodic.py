"""V-Half and V-Min: a block of six units that repeats, for half and a third of the memory of 1F1B.

On a V shape, each microbatch has two F, two B and two W per rank. A *block* says at which unit of time each F and B of
microbatch 0 runs on each rank; microbatch k runs 6k units later. No two of them may be equal modulo 6, and W take the
units that are left. What a rank holds is the sum of the times from each F to its W, divided by 6.

             F0      F1            B1                 B0
    V-Half   2r      3p - 2 - r    3p - 1 + i + 2r    6p - 2 + i - r     i: 3 if p is even, else 0
    V-Min    r       2p - 1 - r    2p + i + r         4p - 1 + i - r     i: 2 if 3 divides p, else 0

Only the order of F and B follows from a block: ``improve`` places W and makes room where blocks do not fill a rank.

Source: Pipeline Parallelism with Controllable Memory (Qi et al., NeurIPS 2024), section 3 and appendix.
"""

from __future__ import annotations

from collections.abc import Callable

from pipecompile.schedule.order import B, F, Op, Order, W, check_microbatches
from pipecompile.schedule.shape import v_shape

PERIOD = 6
Block = Callable[[int, int], tuple[int, int, int, int]]  # from a rank and the number of ranks


def v_half(rank: int, p: int) -> tuple[int, int, int, int]:
    """The units of F0, F1, B1 and B0."""
    shift = 0 if p % 2 else 3
    return 2 * rank, 3 * p - 2 - rank, 3 * p - 1 + shift + 2 * rank, 6 * p - 2 + shift - rank


def v_min(rank: int, p: int) -> tuple[int, int, int, int]:
    """The units of F0, F1, B1 and B0."""
    shift = 0 if p % 3 else 2
    return rank, 2 * p - 1 - rank, 2 * p + shift + rank, 4 * p - 1 + shift - rank


def periodic(block: Block, num_ranks: int, num_microbatches: int) -> Order:
    """The order of a block that repeats on a V shape, with each W in the first unit that is left.

    Raises:
        InputError: there is no rank or no microbatch.
    """
    check_microbatches(num_microbatches)
    shape = v_shape(num_ranks)
    rows = []
    for rank, (down, up) in enumerate(shape.stages_of):
        units: dict[int, Op] = {}
        for k in range(num_microbatches):
            for unit, kind, stage in zip(block(rank, num_ranks), (F, F, B, B), (down, up, up, down), strict=True):
                units[unit + PERIOD * k] = Op(kind, stage, k)
        for unit, op in sorted(units.items()):
            if op.kind == B:
                free = next(later for later in range(unit + 1, unit + 2 + len(units)) if later not in units)
                units[free] = Op(W, op.stage, op.microbatch)
        rows.append([op for _, op in sorted(units.items())])
    return Order.of(shape, num_microbatches, rows)
