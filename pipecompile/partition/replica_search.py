"""Proposes the number of devices per stage: a dynamic program over the last stages of a model and their devices.

    best(s, a, m)   smallest bottleneck of s stages that run atoms a, a+1, ... of one order on the last m devices
                  = min over b, r of max(load of a ... b-1 on r devices, best(s - 1, b, m - r))

The load of a stage on r devices is its seconds divided by r, plus its communication, plus the seconds to sum gradients
and return weights, divided by the microbatches of a step. The program runs from the last stage to the first, because
the microbatches in flight in a stage depend on the devices behind it. Its results are proposals:
``planning.replicas`` makes plans of them and compares their simulations.

Source: PipeDream (Narayanan et al., SOSP 2019), section 3.1, extended by memory and solved for each number of stages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from math import inf

import numpy as np

from pipecompile.ir.cluster import Cluster
from pipecompile.ir.graph import CostedGraph
from pipecompile.partition.from_graph import parameter_bytes, problem_of
from pipecompile.partition.memory_model import Training
from pipecompile.partition.solver.coarsen import lossy
from pipecompile.partition.solver.interval_dp import Crossing
from pipecompile.partition.solver.problem import Floats, Problem
from pipecompile.partition.stage_nodes import Placed

MOST_ATOMS = 150


@dataclass(frozen=True)
class Step:
    """The parameters of a training step that replicas depend on.

    Args:
        microbatches: the number per step.
        in_flight: ``in_flight(r, m)`` is the most microbatches in flight in a stage with r devices, if it and all
            stages behind it have m devices.
        optimizer_state: bytes per byte of trainable parameters.
        again: every stage recomputes activations in the backward.
    """

    microbatches: int
    in_flight: Callable[[int, int], int]
    optimizer_state: float
    again: bool = False


def deals(costed: CostedGraph, cluster: Cluster, step: Step) -> list[tuple[int, ...]]:
    """For each possible number of stages on all devices of the cluster, the best number of replicas per stage."""
    return list(_Programme.of(costed, cluster, step).run())


@dataclass(frozen=True)
class _Programme:
    problem: Problem
    cluster: Cluster
    step: Step
    trained: Floats  # atom -> bytes
    writes: Floats  # atom -> nodes that write buffers, which replicas must not

    @staticmethod
    def of(costed: CostedGraph, cluster: Cluster, step: Step) -> _Programme:
        count = len(cluster)
        training = Training((1,) * count, (1,) * count, step.optimizer_state, (step.again,) * count)
        nodes = problem_of(costed, count, cluster, training)
        coarse = nodes.then(lossy(nodes.problem, MOST_ATOMS))
        placed = Placed(costed.graph)
        size = len(coarse.problem)
        writes = [bool(costed.graph.nodes[node].writes) for node in placed.nodes]
        trained, writers = (
            np.bincount(coarse.atom_of, numbers, size).astype(np.float64)
            for numbers in (parameter_bytes(costed, placed)[1], writes)
        )
        return _Programme(problem=coarse.problem, cluster=cluster, step=step, trained=trained, writes=writers)

    def run(self) -> Iterator[tuple[int, ...]]:
        """For each number of stages, the best replicas of each stage."""
        atoms, devices = len(self.problem), len(self.cluster)
        behind: Floats = np.full((devices + 1, atoms + 1), inf)  # for one stage fewer: devices taken, first atom
        behind[0, atoms] = 0.0
        chosen: dict[tuple[int, int, int], tuple[int, int]] = {}  # stages, devices, first atom -> replicas, next atom
        for stages in range(1, devices + 1):
            best: Floats = np.full_like(behind, inf)
            for taken in range(stages, devices + 1):
                for replicas in range(1, taken + 1):
                    greatest = np.maximum(self._load(replicas, taken), behind[taken - replicas])
                    end = greatest.argmin(axis=1)
                    load = greatest[np.arange(atoms + 1), end]
                    for first in np.flatnonzero(load < best[taken]).tolist():
                        chosen[stages, taken, first] = (replicas, int(end[first]))
                    best[taken] = np.minimum(best[taken], load)
            if best[devices, 0] < inf:
                yield _traced(chosen, stages, devices)
            behind = best

    def _load(self, replicas: int, taken: int) -> Floats:
        """Load of a stage (first atom, first atom behind) on the first ``replicas`` of the last ``taken`` devices."""
        first = len(self.cluster) - taken
        ranks = range(first, first + replicas)
        speed = replicas * min(self.cluster.devices[rank].speed for rank in ranks)
        trained = _between(self.trained)
        made, read = self.crossing
        seats = self.problem.seats
        load = _between(self.problem.weight) / speed + seats[ranks[-1]].sends * made + seats[first].receives * read
        for rank in ranks[1:]:
            link = self.cluster.between(first, rank)
            load = load + 2 * (link.latency + trained / link.bandwidth) / self.step.microbatches
        limits = [memory for rank in ranks if (memory := self.cluster.devices[rank].memory) is not None]
        if limits:
            in_flight = 1 if self.step.again else self.step.in_flight(replicas, taken)
            held = _between(self.problem.kept) + in_flight * _between(self.problem.saved)
            load = np.where(held > min(limits), inf, load)
        if replicas > 1:
            load = np.where(_between(self.writes) > 0, inf, load)
        return np.where(np.tri(len(load), dtype=bool), inf, load)  # a stage needs an atom

    @cached_property
    def crossing(self) -> Floats:
        """Seconds of the nets that cross a stage, made and only read in it, by its first and the next first atom."""
        atoms = len(self.problem)
        crossing, seconds = Crossing(self.problem), np.zeros((2, atoms + 1, atoms + 1))
        for atom in range(atoms):
            crossing.place(atom, atom)
            seconds[:, : atom + 1, atom + 1] = crossing.seconds[:, : atom + 1]
        return seconds


def _between(numbers: Floats) -> Floats:
    """For each pair of atoms, the sum from the first up to but not including the second."""
    sums = np.concatenate([[0.0], np.cumsum(numbers)])
    return np.asarray(sums[None, :] - sums[:, None])


def _traced(chosen: dict[tuple[int, int, int], tuple[int, int]], stages: int, devices: int) -> tuple[int, ...]:
    counts, first = [], 0
    for left in range(stages, 0, -1):
        replicas, first = chosen[left, devices, first]
        counts.append(replicas)
        devices -= replicas
    return tuple(counts)
