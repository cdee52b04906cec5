"""From an order to a program on a plan, and back: F is a Forward, B a Backward, W a BackwardWeight."""

from __future__ import annotations

from pipecompile.errors import ProgramError
from pipecompile.ir.plan import Plan
from pipecompile.ir.program import Backward, BackwardWeight, Compute, Forward, Instruction, Program, Recv, Send
from pipecompile.schedule.arrange import closing
from pipecompile.schedule.order import B, F, Op, Order, W
from pipecompile.schedule.shape import shape_of

_KINDS: dict[int, type[Forward] | type[Backward] | type[BackwardWeight]] = {
    F: Forward,
    B: Backward,
    W: BackwardWeight,
}


def program_of(order: Order, plan: Plan, *, step: bool = False) -> Program:
    """The valid, bare program of an order, with Reduces of tied parameters, and with a Step of each stage if wanted.

    Raises:
        InputError: the plan has replicas.
        ProgramError: the order is for other stages or ranks than the plan's.
    """
    shape = shape_of(plan)
    if (shape.rank_of, sorted(shape.edges)) != (order.shape.rank_of, sorted(order.shape.edges)):
        raise ProgramError(
            f"the order is for stages on the ranks {order.shape.rank_of} with edges {order.shape.edges}, but the plan "
            f"has ranks {shape.rank_of} and edges {shape.edges}; make an order for shape_of(plan)"
        )
    rows: list[list[Instruction]] = [
        [_KINDS[op.kind](op.stage, op.microbatch) for op in order.ops(rank)] for rank in range(len(order.rows))
    ]
    for i in closing(plan, order.num_microbatches - 1, step):
        rows[plan.rank_of[i.stage]].append(i)
    program = Program(plan, tuple(map(tuple, rows)))
    program.validate()
    return program


def order_of(program: Program) -> Order:
    """The order of the Forwards, Backwards and BackwardWeights of a program that carries nothing.

    Raises:
        InputError: its plan has replicas, or it runs no microbatch.
        ProgramError: it carries instructions, or has other microbatches than 0, 1, ...
    """
    if program.carried:
        raise ProgramError("the program carries instructions of earlier ones, so it is not an order of a whole step")
    codes: dict[type[Compute] | type[Send] | type[Recv], int] = {kind: code for code, kind in _KINDS.items()}
    rows = [
        [Op(codes[type(i)], i.stage, i.microbatch) for i in row if isinstance(i, Forward | Backward | BackwardWeight)]
        for row in program.ranks
    ]
    return Order.of(shape_of(program.plan), len(program.microbatches), rows)
