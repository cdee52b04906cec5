"""Simulates a program on a cluster: a max-plus replay.

A rank runs one computation at a time, in the order of its row. A computation starts when the rank is free and all its
inputs have arrived.

A link from one rank to another carries one transfer at a time, in the order in which results are ready. The opposite
direction is a separate link. Transfers overlap with computation, and with transfers over other links. Resources that
links share, such as a host's adapter, are not modeled.

    rank 0   0F0 0F1 0F2
    0 to 1       0F0>1   0F1>1   0F2>1             results that are ready while the link is busy wait for it
    rank 1               1F0     1F1     1F2

The results of a rank are ready in the order of its row, and ``lower`` inserts its Sends in the same order. So a bare
program, with implicit transfers, gives the same times as the lowered one. Carried results of earlier programs have
arrived before the program starts.

Copies of activations to the host and back have two more clocks of each rank, one for each direction. A copy begins when
the computations before it have ended, and those before it in its direction. A Backward waits for its Fetch, and
computations and Fetches for the Offloads that end before them (``Program.ended_before``).

    rank 0   F0 F1 F2 F3 .  B0
    to host     H0 H1 H2
    back                 G0

Memory does not depend on times: it follows from the order of each row.
"""

from __future__ import annotations

from collections.abc import Sequence

from pipecompile.errors import InputError
from pipecompile.ir.cluster import Cluster
from pipecompile.ir.graph import Cost
from pipecompile.ir.halves import Halves
from pipecompile.ir.instruction import (
    Backward,
    BackwardWeight,
    Compute,
    Fetch,
    Forward,
    Instruction,
    Offload,
    Recv,
    Reduce,
    Refresh,
    Send,
    Share,
    Step,
    Update,
)
from pipecompile.ir.program import Program, dependencies, linearize, rank_of, sends, target_of
from pipecompile.ir.timeline import Span, Timeline
from pipecompile.ir.weight_versions import Away, Stash, stash_at_start, walk


def simulate(
    program: Program,
    costs: Sequence[Cost],
    cluster: Cluster | None = None,
    step_seconds: float | Sequence[float] = 0.0,
    weight_part: float = 0.5,
    halves: Sequence[Halves] | None = None,
) -> Timeline:
    """The timeline of a bare or a lowered program.

        >>> from pipecompile.ir.plan import Plan
        >>> program = Program.parse("0: 0F0 0B0\\n1: 1F0 1B0", Plan.chain(2))
        >>> timeline = simulate(program, [Cost(1.0, 2.0), Cost(1.0, 2.0)])
        >>> timeline.makespan, timeline.bubble
        (6.0, 0.5)

    Args:
        program: the program.
        costs: the cost of each stage per microbatch, on a device of speed 1.
        cluster: a device for each rank; by default equal devices, and transfers that take no time.
        step_seconds: seconds of one Step or Update, on a device of speed 1; a number, or one for each stage.
        weight_part: the part of a backward's seconds that a BackwardWeight takes from its Backward; none where stages
            recompute, whose backwards are whole.
        halves: in its place, the seconds of each stage where its backward is split (``stage_halves``).

    Raises:
        InputError: the number of costs, halves, devices or seconds of steps does not fit the plan.
        DeadlockError: the program cannot finish.
    """
    steps = step_seconds if isinstance(step_seconds, Sequence) else [step_seconds] * program.plan.num_stages
    if halves is None:
        parts = [0.0 if stage in program.plan.recomputed else weight_part for stage in range(len(costs))]
        halves = tuple(map(Halves.of, costs, parts))
    _check(program, costs, halves, cluster, steps)
    clock = _Clock(program, costs, halves, cluster, steps)
    spans = []
    for rank, i in linearize(program):
        clock.do(rank, i)
        spans.append(Span(rank, i, *clock.times[i]))
    spans.sort(key=lambda span: (span.rank, span.start))
    return Timeline(tuple(spans), len(program.ranks), peak_bytes(program, costs))


def peak_bytes(program: Program, costs: Sequence[Cost]) -> tuple[int, ...]:
    """The peak bytes of each rank: each live version of its parameters, and the activations in flight.

    What a Forward saves is held until its Backward, or until its BackwardWeight, and not while it is on the host.
    Gradients, optimizer state and transfer buffers are not included.
    """
    on, stashes, away = program.plan.rank_of, stash_at_start(program), Away(program)
    counts = enumerate(zip(stashes, costs, strict=True))
    held = [_held(stash, cost, away.count(stage)) for stage, (stash, cost) in counts]
    now = [sum(nbytes for s, nbytes in enumerate(held) if on[s] == rank) for rank in range(len(program.ranks))]
    peak = list(now)
    for i, _ in walk(program, stashes):
        for stage in {i.stage, *away.reach(i)}:
            nbytes, rank = _held(stashes[stage], costs[stage], away.count(stage)), on[stage]
            now[rank] += nbytes - held[stage]
            held[stage] = nbytes
        peak[on[i.stage]] = max(peak[on[i.stage]], now[on[i.stage]])
    return tuple(peak)


def _held(stash: Stash, cost: Cost, away: int) -> int:
    return stash.live * cost.parameter_bytes + (len(stash.in_flight) + len(stash.held) - away) * cost.saved_bytes


class _Clock:
    """The start and end of each instruction. Each rank, and each link (a pair of ranks), is used by one at a time."""

    def __init__(
        self,
        program: Program,
        costs: Sequence[Cost],
        halves: Sequence[Halves],
        cluster: Cluster | None,
        step_seconds: Sequence[float],
    ) -> None:
        self.program, self.plan = program, program.plan
        self.costs, self.halves, self.cluster, self.step_seconds = costs, halves, cluster, step_seconds
        self.times: dict[Instruction, tuple[float, float]] = {}
        self.free: dict[object, float] = {}

    def do(self, rank: int, i: Instruction) -> None:
        match i:
            case Send():
                self._transfer(i)
            case Recv():
                self.times[i] = self.times[Send(i.result, i.target)]
            case Offload() | Fetch():
                awaited = [*dependencies(i, self.plan), *self.program.ended_before.get(i, ())]
                ready = max(self.free.get(rank, 0.0), *map(self._end, awaited))
                self.times[i] = self._occupied((type(i), rank), ready, self._copy_seconds(rank, i))
            case _:
                awaited = [*dependencies(i, self.plan), *self.program.ended_before.get(i, ())]
                if isinstance(i, Backward):
                    awaited.append(Fetch(i.stage, i.microbatch))  # at once, if there is none
                ready = max(map(self._end, awaited), default=0.0)
                speed = 1.0 if self.cluster is None else self.cluster.devices[rank].speed
                self.times[i] = self._occupied(rank, ready, self._seconds(i) / speed)
                if not self.program.lowered and not isinstance(i, Step | Update | BackwardWeight):
                    for send in sends(i, self.plan):
                        self._transfer(send)

    def _transfer(self, send: Send) -> None:
        link = rank_of(send, self.plan), target_of(send, self.plan)
        seconds = _transfer_seconds(send, self.program, self.cluster)
        self.times[send] = self._occupied(link, self._end(send.result), seconds)

    def _copy_seconds(self, rank: int, i: Offload | Fetch) -> float:
        return 0.0 if self.cluster is None else self.cluster.copy_seconds(rank, self.costs[i.stage].saved_bytes)

    def _occupied(self, what: object, ready: float, seconds: float) -> tuple[float, float]:
        start = max(ready, self.free.get(what, 0.0))
        self.free[what] = start + seconds
        return start, self.free[what]

    def _end(self, needed: Instruction) -> float:
        """When a result is available: at the start for carried results and their transfers."""
        done = Send(needed.result, needed.target) if isinstance(needed, Recv) else needed
        return self.times[done][1] if done in self.times else 0.0

    def _seconds(self, i: Compute) -> float:
        match i:
            case Forward():
                is_split = Backward(i.stage, i.microbatch) in self.program.split
                return self.halves[i.stage].forward if is_split else self.costs[i.stage].forward
            case Backward():
                return self.halves[i.stage].backward if i in self.program.split else self.costs[i.stage].backward
            case BackwardWeight():
                return self.halves[i.stage].weights
            case Step() if i in self.program.updated:
                return 0.0
            case Step() | Update():
                return self.step_seconds[i.stage]
            case _:
                return 0.0  # a Reduce, Refresh or Share takes negligible time compared with a Backward


def _transfer_seconds(send: Send, program: Program, cluster: Cluster | None) -> float:
    if cluster is None:
        return 0.0
    plan, source, target = program.plan, send.stage, send.target
    first, last = min(source, target), max(source, target)  # a gradient has as many bytes as its value
    if isinstance(send.result, Share):
        nbytes = plan.shared_bytes(plan.rank_of[source], len(program.microbatches))
    elif isinstance(send.result, Reduce | Refresh):
        nbytes = sum(tied.nbytes for tied in plan.tied if tied.owner == first and last in tied.followers)
    else:
        nbytes = sum(channel.nbytes for channel in plan.outgoing[first] if channel.target == last)
    return cluster.transfer_seconds(rank_of(send, plan), target_of(send, plan), nbytes)


def _check(
    program: Program,
    costs: Sequence[Cost],
    halves: Sequence[Halves],
    cluster: Cluster | None,
    steps: Sequence[float],
) -> None:
    plan, ranks = program.plan, max(len(program.ranks), program.plan.num_ranks)
    if len(costs) != plan.num_stages:
        raise InputError(f"got {len(costs)} costs for {plan.num_stages} stages; give one per stage")
    if len(halves) != plan.num_stages:
        raise InputError(f"got {len(halves)} halves for {plan.num_stages} stages; give one per stage")
    if len(steps) != plan.num_stages:
        raise InputError(f"got {len(steps)} step_seconds for {plan.num_stages} stages; give one per stage")
    if cluster is not None and len(cluster) < ranks:
        raise InputError(
            f"the cluster has {len(cluster)} devices, but the plan has {ranks} ranks; use one device per rank"
        )
