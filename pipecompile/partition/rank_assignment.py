"""Assigns stages to ranks, so that large transfers use fast links.

A stage keeps its number, its nodes and the speed and memory that it was planned for: only devices that are equal in
both are exchanged, each with all the stages that it runs. The seconds per microbatch of a rank are, over its stages,

    its nodes' seconds / its device's speed / its replicas
    + for each of its channels and tied parameters, the seconds on the link in both directions

where a channel between replicas is weighted by its share of the microbatches, and the gradient and new weights of a
tied parameter by one step's share of a microbatch. The objective is to minimize the bottleneck, then the total seconds
on all links. This is a quadratic assignment problem with a bottleneck. It is solved exactly for few devices, by branch
and bound, and otherwise by swaps, starting from the given order and from one of nearest neighbors.

Source: Koopmans, Beckmann, "Assignment Problems and the Location of Economic Activities" (Econometrica 1957); the
bound, which puts undecided pairs on the fastest link, is a weak form of Gilmore's and Lawler's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from math import lcm

from pipecompile.ir.cluster import Cluster
from pipecompile.ir.plan import Plan
from pipecompile.ir.plan_quality import SLACK

EXACT = 8  # devices


def assign(plan: Plan, seconds: Sequence[float], cluster: Cluster, microbatches: int = 1) -> Plan:
    """The plan with its stages on the ranks that suit its channels. It is never slower than the given plan."""
    return plan.on_ranks(suited(plan, seconds, cluster, microbatches))


def suited(plan: Plan, seconds: Sequence[float], cluster: Cluster, microbatches: int = 1) -> tuple[int, ...]:
    """Returns, for each rank of the plan, the device that should run it.

    Args:
        plan: the stages and channels.
        seconds: seconds per microbatch of each stage, on a device of speed 1.
        cluster: a device for each rank; further devices may be used instead.
        microbatches: the number per step; the gradients of tied parameters are sent once per step.
    """
    task = _Task(plan, tuple(seconds), cluster, microbatches)
    found = tuple(range(len(cluster)))
    if len(set(task.twin_of)) > len(set(task.kind_of)):  # otherwise all assignments are equal
        found, row = _swapped(task, found), _swapped(task, _nearest(task))
        found = row if task.score(row) < task.score(found) else found
        if len(cluster) <= EXACT:
            found = _Search(task, found).run()
    return found


@dataclass(frozen=True, slots=True)
class Wire:
    """The bytes that stages of two places send each other per microbatch, in one direction."""

    first: int
    second: int
    nbytes: int
    share: float  # of the microbatches, for both directions


@dataclass(frozen=True)
class _Task:
    """Places are the ranks of the plan with their stages. An assignment gives each place a device."""

    plan: Plan
    stage_seconds: tuple[float, ...]
    cluster: Cluster
    microbatches: int

    @cached_property
    def wires(self) -> tuple[Wire, ...]:
        """The wires between stages on different ranks."""
        replicas, rank_of = self.plan.replicas, self.plan.rank_of
        tied: Counter[tuple[int, int]] = Counter()
        for each in self.plan.tied:
            tied.update({(each.owner, follower): each.nbytes for follower in each.followers})
        wires = [
            Wire(
                rank_of[c.source],
                rank_of[c.target],
                c.nbytes,
                2 / lcm(*(len(replicas[s]) for s in (c.source, c.target))),
            )
            for c in self.plan.channels
        ] + [
            Wire(rank_of[owner], rank_of[follower], nbytes, 2 / self.microbatches)
            for (owner, follower), nbytes in tied.items()
            if nbytes
        ]
        return tuple(wire for wire in wires if wire.first != wire.second)

    @cached_property
    def wires_at(self) -> tuple[tuple[Wire, ...], ...]:
        """For each place, the wires that end there."""
        return tuple(
            tuple(wire for wire in self.wires if place in (wire.first, wire.second))
            for place in range(len(self.cluster))
        )

    @cached_property
    def kind_of(self) -> tuple[tuple[float, int | None], ...]:
        """For each device, the speed and memory that devices must share to be exchanged."""
        return tuple((device.speed, device.memory) for device in self.cluster.devices)

    @cached_property
    def twin_of(self) -> tuple[int, ...]:
        """For each device, the first one with which it can be exchanged without changing any link."""
        ranks = range(len(self.cluster))
        twins: list[int] = []
        for rank in ranks:
            twins.append(next((other for other in twins if self._alike(other, rank)), rank))
        return tuple(twins)

    def _alike(self, one: int, two: int) -> bool:
        between = self.cluster.between
        others = (rank for rank in range(len(self.cluster)) if rank not in (one, two))
        return self.kind_of[one] == self.kind_of[two] and all(between(one, r) == between(two, r) for r in others)

    @cached_property
    def computing(self) -> tuple[float, ...]:
        """For each place, the seconds that its stages compute per microbatch, averaged over all microbatches."""
        devices, plan = self.cluster.devices, self.plan
        found = [0.0] * len(devices)
        for seconds, rank, group in zip(self.stage_seconds, plan.rank_of, plan.replicas, strict=True):
            found[rank] += seconds / devices[rank].speed / len(group)
        return tuple(found)

    @cached_property
    def least(self) -> dict[Wire, float]:
        """For each wire, its seconds on the link that is fastest for it."""
        pairs = combinations(range(len(self.cluster)), 2)
        links = {self.cluster.between(*pair) for pair in pairs}
        return {wire: wire.share * min(link.seconds(wire.nbytes) for link in links) for wire in self.wires}

    def seconds(self, wire: Wire, devices: Sequence[int] | Mapping[int, int]) -> float:
        return wire.share * self.cluster.transfer_seconds(devices[wire.first], devices[wire.second], wire.nbytes)

    def score(self, devices: Sequence[int]) -> Score:
        """The score of a complete assignment, place -> device."""
        return self.scored(self.seconds(wire, devices) for wire in self.wires)

    def scored(self, seconds: Iterable[float]) -> Score:
        """The score for the seconds of each wire."""
        score = Score(list(self.computing))
        for wire, each in zip(self.wires, seconds, strict=True):
            score.add(wire, each)
        return score


@dataclass(slots=True)
class Score:
    """The load of each place, and the total on all links, in seconds."""

    loads: list[float]
    sent: float = 0.0

    def add(self, wire: Wire, seconds: float) -> None:
        self.loads[wire.first] += seconds
        self.loads[wire.second] += seconds
        self.sent += seconds

    def __lt__(self, other: Score) -> bool:
        """Whether this score is better by more than rounding."""
        mine, others = max(self.loads), max(other.loads)
        if abs(mine - others) <= SLACK * others:
            return self.sent < other.sent * (1 - SLACK)
        return mine < others


def _nearest(task: _Task) -> tuple[int, ...]:
    """The assignment that gives each place the unused device nearest to the previous one."""
    nbytes = sum(wire.nbytes for wire in task.wires) // max(1, len(task.wires))
    found: list[int] = []
    for place, kind in enumerate(task.kind_of):
        last = found[-1] if found else place
        free = (device for device in range(len(task.kind_of)) if device not in found and task.kind_of[device] == kind)
        found.append(min(free, key=lambda device: task.cluster.transfer_seconds(last, device, nbytes)))
    return tuple(found)


def _swapped(task: _Task, devices: tuple[int, ...]) -> tuple[int, ...]:
    """Swaps pairs of devices as long as a swap improves the score."""
    best = task.score(devices)
    improved = True
    while improved:
        improved = False
        for one, two in combinations(range(len(devices)), 2):
            here, there = devices[one], devices[two]
            if task.kind_of[here] != task.kind_of[there] or task.twin_of[here] == task.twin_of[there]:
                continue
            trial = list(devices)
            trial[one], trial[two] = there, here
            score = Score(list(best.loads), best.sent)
            for wire in {*task.wires_at[one], *task.wires_at[two]}:
                score.add(wire, task.seconds(wire, trial) - task.seconds(wire, devices))
            if score < best:
                devices, best, improved = tuple(trial), task.score(trial), True
    return devices


class _Search:
    """Branch and bound over places. A wire counts with its fastest link until both of its ends have a device."""

    def __init__(self, task: _Task, devices: tuple[int, ...]) -> None:
        self.task, self.best, self.best_score = task, devices, task.score(devices)
        weight = [sum(task.least[wire] for wire in wires) for wires in task.wires_at]
        self.order = sorted(range(len(devices)), key=lambda place: -weight[place])
        self.device_at: dict[int, int] = {}

    def run(self) -> tuple[int, ...]:
        self._place(0, self.task.scored(self.task.least[wire] for wire in self.task.wires))
        return self.best

    def _place(self, depth: int, bound: Score) -> None:
        if not bound < self.best_score:
            return
        if depth == len(self.order):
            self.best, self.best_score = tuple(self.device_at[place] for place in range(depth)), bound
            return
        place, task = self.order[depth], self.task
        for device in self._choices(place):
            self.device_at[place] = device
            score = Score(list(bound.loads), bound.sent)
            for wire in task.wires_at[place]:
                if {wire.first, wire.second} <= self.device_at.keys():
                    score.add(wire, task.seconds(wire, self.device_at) - task.least[wire])
            self._place(depth + 1, score)
            del self.device_at[place]

    def _choices(self, place: int) -> Iterator[int]:
        """Free devices of the place's kind, one for each group of twins."""
        taken, kinds = set(self.device_at.values()), self.task.kind_of
        free = (device for device in range(len(kinds)) if device not in taken and kinds[device] == kinds[place])
        yield from {self.task.twin_of[device]: device for device in free}.values()
