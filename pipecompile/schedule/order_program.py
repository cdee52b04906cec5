"""From an order to a program on a plan, and back: F is a Forward, B a Backward, W a BackwardWeight; H, G are copies."""

from __future__ import annotations

from collections.abc import Sequence

from pipecompile.errors import ProgramError
from pipecompile.ir.instruction import (
    Backward,
    BackwardWeight,
    Compute,
    Copy,
    Fetch,
    Forward,
    Instruction,
    Offload,
    Recv,
    Send,
)
from pipecompile.ir.plan import Plan
from pipecompile.ir.program import Program
from pipecompile.schedule.arrange import closing
from pipecompile.schedule.offload import with_offloads
from pipecompile.schedule.order import B, F, G, H, Op, Order, W
from pipecompile.schedule.shape import refuse_replicas, shape_of

_KINDS: dict[int, type[Forward] | type[Backward] | type[BackwardWeight] | type[Copy]] = {
    F: Forward,
    B: Backward,
    W: BackwardWeight,
    H: Offload,
    G: Fetch,
}


def program_of(order: Order, plan: Plan, *, step: bool = False) -> Program:
    """The valid, bare program of an order, with Reduces of tied parameters, and with a Step of each stage if wanted.

    Ranks of the plan may have other numbers than those of the order. Its stage graph may be any in which the order
    runs: an order for a chain runs on every one.

    Raises:
        InputError: the plan has replicas.
        ProgramError: the order is for stages on other ranks than the plan's, or lacks a dependency of the plan, or its
            copies do not suit it (see ``Program``).
    """
    rows: list[list[Instruction]] = [[] for _ in range(plan.num_ranks)]
    refuse_replicas(plan)
    for row, rank in enumerate(_ranks(order.shape.rank_of, plan.rank_of)):
        rows[rank] += [_KINDS[op.kind](op.stage, op.microbatch) for op in order.ops(row)]
    for i in closing(plan, order.num_microbatches - 1, step):
        rows[plan.rank_of[i.stage]].append(i)
    program = Program(plan, tuple(map(tuple, rows)))
    program.validate()
    return with_offloads(program)


def _ranks(order: Sequence[int], plan: Sequence[int]) -> list[int]:
    """The rank of a plan for each rank of an order, from the ranks of their stages.

    Raises:
        ProgramError: stages that share a rank in one of them do not in the other.
    """
    pairs = set(zip(order, plan, strict=False))
    if len(order) != len(plan) or not len(pairs) == len(set(order)) == len(set(plan)):
        raise ProgramError(
            f"the order is for stages on the ranks {tuple(order)}, but the plan has ranks {tuple(plan)}; give both the "
            f"same stages on each rank"
        )
    return [rank for _, rank in sorted(pairs)]


def order_of(program: Program) -> Order:
    """The order of the Forwards, Backwards, BackwardWeights and copies of a program that carries nothing.

    Raises:
        InputError: its plan has replicas, or it runs no microbatch.
        ProgramError: it carries instructions, or has other microbatches than 0, 1, ...
    """
    if program.carried:
        raise ProgramError("the program carries instructions of earlier ones, so it is not an order of a whole step")
    kinds = (Forward, Backward, BackwardWeight, Offload, Fetch)
    codes: dict[type[Compute | Copy] | type[Send] | type[Recv], int] = {kind: code for code, kind in _KINDS.items()}
    rows = [[Op(codes[type(i)], i.stage, i.microbatch) for i in row if isinstance(i, kinds)] for row in program.ranks]
    return Order.of(shape_of(program.plan), len(program.microbatches), rows)
