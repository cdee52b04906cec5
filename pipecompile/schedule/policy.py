"""Policies: schedules as data, and the one function that makes an order of them.

On each rank there are three queues: Forwards, Backwards, and gradients of weights (W), which enter theirs when their
Backward has run. ``merge`` takes from them, without any times:

    more W wait than are held back          ->  W, the oldest
    fewer Forwards in flight than the limit ->  F, by the key of Forwards
    Backwards left                          ->  B, by the key of Backwards
    nothing else left                       ->  W

    policy            in flight (F without B), at most  W held back  key of F           key of B
    GPipe             all                               W is in B    k                  k
    1F1B              depth                             W is in B    k                  k
    looped BFS        all                               W is in B    chunk, k           -chunk, -k
    interleaved 1F1B  (v-1)g + 2(p-1-r) + 1             W is in B    k div g, chunk, k  k div g, -chunk, k
    ZB-H1             depth                             D - depth    k                  k
    ZB-H2             2 depth - 1                       2(D - depth) k                  k
    interleaved ZB    (v-1)g + p - r                    r            k div g, chunk, k  k div g, -chunk, k

k is the microbatch, r the rank of p, v the chunks per rank, D the largest depth, g the microbatches of a round: n div
max(1, n div p). The depth of a stage is the longest path to a sink, that of a rank is the sum over its stages. So the
policies hold for any stage graph, and parallel branches shorten the warm-up. Where keys are equal, earlier stages are
first in Forwards and last in Backwards.

Sources: GPipe (Huang et al., 2019), DAPPLE (Fan et al., 2021), breadth-first (Lamy-Poirier, 2023), interleaved
(Narayanan et al., 2021), Zero Bubble (Qi et al., 2024); depth for a stage number: GraphPipe (Jeon et al., 2025).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

from pipecompile.errors import DeadlockError
from pipecompile.schedule.order import Order, check_microbatches
from pipecompile.schedule.replay import replay
from pipecompile.schedule.shape import Shape
from pipecompile.schedule.stage_costs import StageCosts

Key = tuple[int, ...]


@dataclass(frozen=True)
class Policy:
    """What ``merge`` needs for one shape and number of microbatches.

    Args:
        forward_key, backward_key: from microbatch and chunk to a place in the queue; the smallest is first.
        limit: for each rank, the most Forwards without their Backward.
        hold: for each rank, the W that may wait; None: every Backward computes the gradients of weights itself.
    """

    forward_key: Callable[[int, int], Key]
    backward_key: Callable[[int, int], Key]
    limit: tuple[int, ...]
    hold: tuple[int, ...] | None = None


def merge(policy: Policy, shape: Shape, num_microbatches: int) -> Order:
    """The order of a policy.

    If no rank could continue, as with a last round that is not full, more Forwards are in flight: the limits grow by
    one until the order can run, which it can when all Forwards are first.

    Raises:
        InputError: there is no microbatch.
    """
    check_microbatches(num_microbatches)
    while True:
        rows = [_row(policy, shape, rank, num_microbatches) for rank in range(shape.num_ranks)]
        order = Order(shape, num_microbatches, tuple(rows))
        order.validate()
        try:
            replay(order, _units(shape))
        except DeadlockError:
            if min(policy.limit) >= num_microbatches * max(map(len, shape.stages_of)):
                raise
            policy = replace(policy, limit=tuple(limit + 1 for limit in policy.limit))
            continue
        return order


def _row(policy: Policy, shape: Shape, rank: int, n: int) -> tuple[int, ...]:
    cells = shape.num_stages * n
    here = [(k, chunk, stage) for chunk, stage in enumerate(shape.stages_of[rank]) for k in range(n)]
    here.sort(key=lambda cell: policy.forward_key(cell[0], cell[1]))
    forwards = deque(stage * n + k for k, _, stage in here)
    here.sort(key=lambda cell: (policy.backward_key(cell[0], cell[1]), -cell[2]))
    backwards = deque(cells + stage * n + k for k, _, stage in here)
    weights: deque[int] = deque()
    limit = policy.limit[rank]
    hold = None if policy.hold is None else policy.hold[rank]
    row: list[int] = []
    in_flight = 0
    while backwards or weights:
        if weights and (not backwards or (hold is not None and len(weights) > hold)):
            row.append(weights.popleft())
        elif forwards and in_flight < limit:
            row.append(forwards.popleft())
            in_flight += 1
        else:
            row.append(backwards.popleft())
            in_flight -= 1
            if hold is not None:
                weights.append(row[-1] + cells)
    return tuple(row)


def _units(shape: Shape) -> StageCosts:
    ones = (1.0,) * shape.num_stages
    return StageCosts(ones, ones, ones)


# The policies, by name. Each is a function from a shape and a number of microbatches.


def gpipe(shape: Shape, n: int) -> Policy:
    """All Forwards, then all Backwards."""
    return Policy(_by_microbatch, _by_microbatch, _all(shape, n))


def breadth_first(shape: Shape, n: int) -> Policy:
    """All microbatches through one chunk before the next; Backwards in the opposite order."""
    return Policy(lambda k, chunk: (chunk, k), lambda k, chunk: (-chunk, -k), _all(shape, n))


def one_f_one_b(shape: Shape, n: int) -> Policy:
    """As many microbatches in flight as there are stages below."""
    return Policy(_by_microbatch, _by_microbatch, rank_depths(shape))


def zb_h1(shape: Shape, n: int) -> Policy:
    """1F1B in flight; the gradients of weights wait for the time in which the pipeline empties."""
    depth = rank_depths(shape)
    return Policy(_by_microbatch, _by_microbatch, depth, tuple(max(depth) - d for d in depth))


def zb_h2(shape: Shape, n: int) -> Policy:
    """Twice as many in flight, which fill the time until the first Backward."""
    depth = rank_depths(shape)
    return Policy(
        _by_microbatch, _by_microbatch, tuple(2 * d - 1 for d in depth), tuple(2 * (max(depth) - d) for d in depth)
    )


def interleaved(shape: Shape, n: int) -> Policy:
    """Rounds of microbatches go through one chunk after the other."""
    group, ahead = _round(shape, n)
    limit = tuple(ahead + 2 * (shape.num_ranks - 1 - rank) + 1 for rank in range(shape.num_ranks))
    return Policy(lambda k, chunk: (k // group, chunk, k), lambda k, chunk: (k // group, -chunk, k), limit)


def interleaved_zb(shape: Shape, n: int) -> Policy:
    """Interleaved with half the warm-up; rank r holds back r gradients of weights."""
    ranks, (_, ahead) = range(shape.num_ranks), _round(shape, n)
    limit = tuple(ahead + shape.num_ranks - rank for rank in ranks)
    return replace(interleaved(shape, n), limit=limit, hold=tuple(ranks))


def last_round(num_ranks: int, num_microbatches: int) -> tuple[int, int]:
    """The microbatches of a round of an interleaved schedule, and those of the last one."""
    group = num_microbatches // max(1, num_microbatches // num_ranks)
    return group, num_microbatches % group or group


def rank_depths(shape: Shape) -> tuple[int, ...]:
    """The depths of the stages of each rank, added up."""
    return tuple(sum(shape.depth[stage] for stage in stages) for stages in shape.stages_of)


def _by_microbatch(k: int, chunk: int) -> Key:
    return (k,)


def _all(shape: Shape, n: int) -> tuple[int, ...]:
    return tuple(n * len(stages) for stages in shape.stages_of)


def _round(shape: Shape, n: int) -> tuple[int, int]:
    """The microbatches of a round, and the Forwards that precede those of the last chunk."""
    group, _ = last_round(shape.num_ranks, n)
    return group, (max(map(len, shape.stages_of)) - 1) * group
