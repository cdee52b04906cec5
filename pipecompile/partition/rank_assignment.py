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
from itertools import combinations, permutations
from math import lcm

from pipecompile.ir.cluster import Cluster, Link
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
    def by_link(self) -> tuple[Mapping[Link, Sequence[int]], ...]:
        """For each device, the other devices by the link to them."""
        found: list[dict[Link, list[int]]] = [{} for _ in self.cluster.devices]
        for one, two in permutations(range(len(found)), 2):
            found[one].setdefault(self.cluster.between(one, two), []).append(two)
        return tuple(found)

    @cached_property
    def twin_of(self) -> tuple[int, ...]:
        """For each device, the first one with which it can be exchanged without changing any link."""
        firsts: dict[int, Sequence[int]] = {}  # the first of each group of twins, with all ranks by distance from it
        twins: list[int] = []
        for rank in range(len(self.cluster)):
            twin = next((first for first, near in firsts.items() if self._alike(first, rank, near)), rank)
            if twin == rank:
                firsts[rank] = sorted(range(len(self.cluster)), key=lambda r: self.cluster.between(rank, r).seconds(1))
            twins.append(twin)
        return tuple(twins)

    def _alike(self, one: int, two: int, ranks: Iterable[int]) -> bool:
        """Whether two devices can be exchanged; ``ranks`` are all, best with those first whose links differ soonest."""
        between = self.cluster.between
        others = (rank for rank in ranks if rank not in (one, two))
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
        return _better(max(self.loads), self.sent, max(other.loads), other.sent)


def _better(load: float, sent: float, than_load: float, than_sent: float) -> bool:
    """Whether a bottleneck, and then the total on all links, is better by more than rounding."""
    if abs(load - than_load) <= SLACK * than_load:
        return sent < than_sent * (1 - SLACK)
    return load < than_load


def _nearest(task: _Task) -> tuple[int, ...]:
    """The assignment that gives each place the unused device nearest to the previous one."""
    nbytes = sum(wire.nbytes for wire in task.wires) // max(1, len(task.wires))
    found: list[int] = []
    free = dict.fromkeys(range(len(task.kind_of)))
    for place, kind in enumerate(task.kind_of):
        last = found[-1] if found else place
        alike = (device for device in free if task.kind_of[device] == kind)
        nearest = min(alike, key=lambda device: task.cluster.transfer_seconds(last, device, nbytes))
        del free[nearest]
        found.append(nearest)
    return tuple(found)


def _swapped(task: _Task, devices: tuple[int, ...]) -> tuple[int, ...]:
    """Swaps pairs of devices as long as a swap improves the score."""
    best = task.score(devices)
    order = _heaviest_first(best)
    improved = True
    while improved:
        improved = False
        for one in range(len(devices)):
            for two in _nearer(task, devices, one):
                trial = list(devices)
                trial[one], trial[two] = devices[two], devices[one]
                changes, sent = _changes(task, devices, trial, (one, two))
                other = next((best.loads[place] for place in order if place not in changes), 0.0)
                load = max(other, *(best.loads[place] + more for place, more in changes.items()))
                if _better(load, best.sent + sent, best.loads[order[0]], best.sent):
                    for place, more in changes.items():
                        best.loads[place] += more
                    best.sent += sent
                    devices, improved, order = tuple(trial), True, _heaviest_first(best)
        best = task.score(devices)  # without what rounding has left
    return devices


def _changes(
    task: _Task, devices: Sequence[int], trial: Sequence[int], places: tuple[int, int]
) -> tuple[dict[int, float], float]:
    """The seconds that an exchange at two places adds to the load of each place, and to the total on all links."""
    loads, sent = dict.fromkeys(places, 0.0), 0.0
    for wire in {wire for place in places for wire in task.wires_at[place]}:
        more = task.seconds(wire, trial) - task.seconds(wire, devices)
        for place in (wire.first, wire.second):
            loads[place] = loads.get(place, 0.0) + more
        sent += more
    return loads, sent


def _nearer(task: _Task, devices: Sequence[int], place: int) -> list[int]:
    """The places with a device like that of ``place`` that would make a wire of it faster; only those can be better."""
    here = devices[place]
    found: set[int] = set()
    for wire in task.wires_at[place]:
        other = devices[wire.second if wire.first == place else wire.first]
        now = task.cluster.transfer_seconds(here, other, wire.nbytes)
        for link, near in task.by_link[other].items():
            if link.seconds(wire.nbytes) < now:
                found.update(near)
    found = {device for device in found if task.kind_of[device] == task.kind_of[here]}
    return [at for at, device in enumerate(devices) if device in found] if found else []


def _heaviest_first(score: Score) -> list[int]:
    return sorted(range(len(score.loads)), key=lambda place: -score.loads[place])


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
