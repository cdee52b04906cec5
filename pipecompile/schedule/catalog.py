"""All schedules by name, as orders for equal ranks: the shape, what makes the order, and whether it is improved.

Some schedules are orders by definition. ZB-V, V-Half and V-Min are a rule for memory and a way to fill it: they start
from their order for equal times, and keep the memory that it needs. ``searched`` is for a memory cap of one's own: on a
chain it is what the paper calls ZB-1p or ZB-2p, by the cap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain as chain_of

from pipecompile.errors import InputError
from pipecompile.schedule import policy
from pipecompile.schedule.extend import extended, shorter
from pipecompile.schedule.improve import candidates, improve
from pipecompile.schedule.job import job_of
from pipecompile.schedule.order import Order, Rows
from pipecompile.schedule.periodic import periodic, v_half, v_min
from pipecompile.schedule.phases import dualpipe_v, in_phases, zb_v
from pipecompile.schedule.placements import Placements
from pipecompile.schedule.policy import Policy, merge
from pipecompile.schedule.replay import peaks, replay
from pipecompile.schedule.shape import Shape, chain, looped, v_shape
from pipecompile.schedule.stage_costs import StageCosts

FILLED = 3  # microbatches per rank that have a steady state between both ends
SHORT = 0.4  # the part of the effort that is for an order of fewer microbatches
LONG = 5_000  # computations from which there is one


@dataclass(frozen=True)
class Recipe:
    """How to make a schedule.

    Args:
        shape: from a number of ranks.
        order: from the numbers of ranks and microbatches: its order for equal times.
        memory: whether the order is a start only, and what defines the schedule is the memory that this order needs.
    """

    shape: Callable[[int], Shape]
    order: Callable[[int, int], Order]
    memory: bool = False


def _merged(shape_of: Callable[[int], Shape], make: Callable[[Shape, int], Policy]) -> Recipe:
    def order(num_ranks: int, num_microbatches: int) -> Order:
        shape = shape_of(num_ranks)
        return merge(make(shape, num_microbatches), shape, num_microbatches)

    return Recipe(shape_of, order)


RECIPES: Mapping[str, Recipe] = {
    "gpipe": _merged(chain, policy.gpipe),
    "1f1b": _merged(chain, policy.one_f_one_b),
    "interleaved-1f1b": _merged(partial(looped, chunks=2), policy.interleaved),
    "interleaved-1f1b-3": _merged(partial(looped, chunks=3), policy.interleaved),
    "interleaved-1f1b-4": _merged(partial(looped, chunks=4), policy.interleaved),
    "bfs": _merged(partial(looped, chunks=2), policy.breadth_first),
    "zb-h1": _merged(chain, policy.zb_h1),
    "zb-h2": _merged(chain, policy.zb_h2),
    "interleaved-zb": _merged(partial(looped, chunks=2), policy.interleaved_zb),
    "zb-v": Recipe(v_shape, partial(in_phases, zb_v), memory=True),
    "v-half": Recipe(v_shape, partial(periodic, v_half), memory=True),
    "v-min": Recipe(v_shape, partial(periodic, v_min), memory=True),
    "dualpipe-v": Recipe(v_shape, partial(in_phases, dualpipe_v)),
}


def made(
    name: str, num_ranks: int, num_microbatches: int, costs: StageCosts, cap: float, passes: float
) -> Order | None:
    """The order of a schedule for these costs, or None if it does not fit under the memory cap of a rank.

    Args:
        costs: of the stages of ``RECIPES[name].shape(num_ranks)``.
        passes: the effort, where times decide.

    Raises:
        InputError: no schedule has this name.
    """
    if name not in RECIPES:
        raise InputError(f"no schedule has the name {name!r}; it must be one of {', '.join(RECIPES)}")
    recipe = RECIPES[name]
    order = recipe.order(num_ranks, num_microbatches)
    if recipe.memory:
        caps = tuple(min(cap, own) for own in _own_memory(order, costs))
        job = job_of(order.shape, num_microbatches, costs, caps)
        improved = improve(Placements(job, [order.rows]), passes=passes)
        if improved is not None:
            return improved
    return order if fits(order, costs, cap) else None


def searched(
    shape: Shape, num_microbatches: int, costs: StageCosts, cap: float, passes: float, by_span: bool = True
) -> Order | None:
    """The best order found on a shape under the memory cap of a rank, from all candidates, or None if none fits.

    Of many microbatches, part of the effort is for an order of fewer, whose steady state is repeated: what a search
    finds at one place in a short order, it would have to find in each period of a long one.
    """
    return searches(shape, num_microbatches, costs, cap, {by_span: passes})[by_span]


def searches(
    shape: Shape, num_microbatches: int, costs: StageCosts, cap: float, passes: Mapping[bool, float]
) -> dict[bool, Order | None]:
    """As ``searched``, by span (True) and by makespan (False), each with its effort, from the same candidates."""
    caps, n = (cap,) * shape.num_ranks, num_microbatches
    short: dict[bool, Order | None] = {}
    few = shorter(n, FILLED * shape.num_ranks) if 3 * shape.num_stages * n >= LONG else None
    if few is not None:
        short = searches(shape, few, costs, cap, {by_span: SHORT * each * n / few for by_span, each in passes.items()})
    longer = (_extended(order, costs, n, with_weights=False) for order in short.values() if order is not None)
    starts = chain_of(*longer, _starts(shape, n), candidates(shape, n, costs, caps))
    placements = Placements(job_of(shape, n, costs, caps), starts)
    found = {}
    for by_span, effort in passes.items():
        whole: Iterable[Rows] = ()
        if (order := short.get(by_span)) is not None:
            effort, whole = (1 - SHORT) * effort, _extended(order, costs, n)
        found[by_span] = improve(placements, whole=whole, passes=effort, by_span=by_span)
    return found


def _extended(order: Order, costs: StageCosts, num_microbatches: int, with_weights: bool = True) -> Iterator[Rows]:
    """Rows of more microbatches; without W, whose places repeat less often than those of F and B."""
    starts, most = replay(order, costs).start, 2 * order.shape.num_stages * order.num_microbatches
    if not with_weights:
        order = replace(order, rows=tuple(tuple(code for code in row if code < most) for row in order.rows))
    return extended(order, starts, num_microbatches)


def fits(order: Order, costs: StageCosts, cap: float) -> bool:
    """Whether no rank needs more memory than the cap, but for the rounding of sums."""
    return max(peaks(order, costs)) <= cap + 1e-9 * abs(cap)


def best(orders: Iterable[Order], costs_of: Callable[[Order], StageCosts], by_span: bool = True) -> Order:
    """The order with the smallest span, then makespan; or the other way around."""

    def score(order: Order) -> tuple[float, float]:
        run = replay(order, costs_of(order))
        return (run.span, run.makespan) if by_span else (run.makespan, run.span)

    return min(orders, key=score)


def _starts(shape: Shape, num_microbatches: int) -> Iterator[Rows]:
    for recipe in RECIPES.values():
        if recipe.shape(shape.num_ranks) == shape:
            yield recipe.order(shape.num_ranks, num_microbatches).rows


def _own_memory(order: Order, costs: StageCosts) -> tuple[float, ...]:
    """What an order needs of each rank, if W free all that F take; more where these costs need more."""
    kept = replace(costs, mem_b=(0.0,) * len(costs.f), mem_w=tuple(-amount for amount in costs.mem_f))
    most = max(peaks(order, kept))
    return tuple(max(most, own) for own in peaks(order, costs))
