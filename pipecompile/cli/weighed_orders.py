"""``pipecompile schedule auto``: all schedules of equal or given ranks, simulated under a memory cap, best first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pipecompile.errors import InfeasibleError
from pipecompile.schedule.catalog import RECIPES, made, searched
from pipecompile.schedule.order import Order
from pipecompile.schedule.replay import replay
from pipecompile.schedule.shape import Shape, chain, v_shape
from pipecompile.schedule.stage_costs import StageCosts

PASSES = 100  # the effort of a search


@dataclass(frozen=True)
class RankCosts:
    """Seconds of one microbatch on each rank, over all its stages, and of a transfer; memory is 1 on each rank."""

    forward: Sequence[float]
    backward: Sequence[float]
    weight_part: float  # of backwards that are split
    transfer: float

    def of(self, shape: Shape) -> StageCosts:
        """The costs of stages that divide those of their rank equally."""
        ranks = [(rank, len(shape.stages_of[rank])) for rank in shape.rank_of]
        return StageCosts(
            f=tuple(self.forward[rank] / parts for rank, parts in ranks),
            b=tuple(self.backward[rank] * (1 - self.weight_part) / parts for rank, parts in ranks),
            w=tuple(self.backward[rank] * self.weight_part / parts for rank, parts in ranks),
            transfer=(self.transfer,) * len(shape.edges),
            mem_f=tuple(1 / parts for _, parts in ranks),
            mem_b=(0.0,) * len(ranks),
            mem_w=tuple(-1 / parts for _, parts in ranks),
        )


@dataclass(frozen=True)
class WeighedOrder:
    """An order that was weighed.

    Attributes:
        name: of the schedule; of an order that was searched, the shape.
        makespan: seconds of a step.
        rate: the part of it in which the busiest rank is idle.
        peak: microbatches of a rank's whole share.
    """

    name: str
    order: Order
    makespan: float
    rate: float
    peak: float

    def __str__(self) -> str:
        return f"{self.name:<22} step {self.makespan:g} s, bubble {self.rate:.1%}, peak {self.peak:g} microbatches"


def weighed_orders(costs: RankCosts, microbatches: int, cap: float) -> tuple[WeighedOrder, ...]:
    """All orders that fit, by step and then by memory.

    Args:
        cap: the memory of a rank, in microbatches of its whole share.

    Raises:
        InfeasibleError: none fits.
    """
    found = []
    for name, order in _orders(costs, microbatches, cap):
        if order is not None:
            run = replay(order, costs.of(order.shape))
            found.append(
                WeighedOrder(name=name, order=order, makespan=run.makespan, rate=run.makespan_rate, peak=run.peak)
            )
    if not found:
        raise InfeasibleError(
            f"no schedule runs with memory for {cap:g} microbatches on each rank; --memory must be at least 1"
        )
    return tuple(sorted(found, key=lambda it: (round(it.makespan, 9), it.peak)))


def _orders(costs: RankCosts, microbatches: int, cap: float) -> Iterator[tuple[str, Order | None]]:
    ranks = len(costs.forward)
    for name, recipe in RECIPES.items():
        yield name, made(name, ranks, microbatches, costs.of(recipe.shape(ranks)), cap, PASSES)
    for name, shape in (("searched", chain(ranks)), ("searched, V", v_shape(ranks))):
        yield name, searched(shape, microbatches, costs.of(shape), cap, PASSES, by_span=False)
