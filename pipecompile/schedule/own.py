"""A schedule of the user's own, as ``compile`` takes it: a text grid, an order, or a function that returns one of them.

    compile(model, ["cpu"] * 2, schedule='''
        0: 0F0 0F1 .   .   0B0 0B1
        1: .   1F0 1F1 1B0 1B1
    ''')

A grid or an order is for one number of microbatches. A batch that has another number, because it has few rows, runs as
1F1B on the same stages. A function gets the numbers of ranks and of microbatches.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from pipecompile.errors import InputError, ProgramError
from pipecompile.ir.plan import Plan
from pipecompile.ir.program import Program
from pipecompile.schedule.grid import read_grid
from pipecompile.schedule.one_f_one_b import one_f_one_b
from pipecompile.schedule.order import Order
from pipecompile.schedule.order_program import program_of
from pipecompile.schedule.placement import Placement
from pipecompile.schedule.registry import Schedule
from pipecompile.schedule.replay import replay
from pipecompile.schedule.stage_costs import StageCosts

Drawn = str | Order
MakeOrder = Callable[[int, int], Drawn]  # from the numbers of ranks and microbatches


@dataclass(frozen=True)
class Own:
    """A schedule of the user's own.

    Args:
        order: for the number of microbatches that a batch has.
        function: makes the order for another number; None if there is none.
    """

    order: Order
    function: MakeOrder | None = None

    @property
    def schedule(self) -> Schedule:
        """What the registry has of other schedules."""
        shape = self.order.shape
        most = max(map(len, shape.stages_of))
        placement = Placement(most, given=shape.rank_of)
        return Schedule(self, placement=placement, per_rank=(most, most), takes_replicas=False)

    def fits(self, num_microbatches: int) -> bool:
        """Whether it has an order for a number of microbatches."""
        return self.function is not None or num_microbatches == self.order.num_microbatches

    def __call__(self, plan: Plan, num_microbatches: int, *, step: bool = False) -> Program:
        """The program of a step.

        Raises:
            ProgramError: the order is not valid for this plan; the message has the computation.
        """
        if not self.fits(num_microbatches):
            return one_f_one_b(plan, num_microbatches, step=step)
        order = self.order
        if self.function is not None and num_microbatches != order.num_microbatches:
            order = _drawn(self.function, order.shape.num_ranks, num_microbatches)
        return program_of(order, plan, step=step)

    def __str__(self) -> str:
        if self.function is None:
            return f"an order of your own for {self.order.num_microbatches} microbatches"
        return getattr(self.function, "__qualname__", type(self.function).__name__)


def is_grid(text: str) -> bool:
    """Whether a text is a grid, and not the name of a schedule."""
    return re.search(r"[\s:]", text.strip()) is not None


def own(given: Drawn | MakeOrder, num_ranks: int, num_microbatches: int) -> Own:
    """The schedule that a user has given.

    Args:
        num_microbatches: of a batch; a grid or an order has its own number.

    Raises:
        InputError: it is for another number of ranks, or a function returns something else.
        ProgramError: it is not an order of a step; the message has the word or the computation, and its rank.
        DeadlockError: no rank could continue.
    """
    if isinstance(given, str | Order):
        found = Own(_read(given))
    else:
        found = Own(_drawn(given, num_ranks, num_microbatches), given)
    ranks = found.order.shape.num_ranks
    if ranks != num_ranks:
        raise InputError(
            f"the schedule is for {ranks} ranks, but there are {num_ranks} devices; write a line for each of them"
        )
    return found


def _drawn(function: MakeOrder, num_ranks: int, num_microbatches: int) -> Order:
    given = function(num_ranks, num_microbatches)
    if not isinstance(given, str | Order):
        raise InputError(
            f"the function schedule= returned {given!r:.80} for {num_ranks} ranks and {num_microbatches} microbatches; "
            f"it must return a grid as text, or an Order"
        )
    order = _read(given)
    if order.num_microbatches != num_microbatches:
        raise ProgramError(
            f"the function schedule= was asked for {num_microbatches} microbatches, but its order has "
            f"{order.num_microbatches}; return an order for the numbers that it is given"
        )
    return order


def _read(given: Drawn) -> Order:
    if isinstance(given, str):
        return read_grid(given)
    given.validate()
    units = (1.0,) * given.shape.num_stages
    replay(given, StageCosts(units, units, units))
    return given
