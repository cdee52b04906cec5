"""Layer and operator graphs in the JSON format of the NeurIPS 2020 artifact, as partitioning problems, and their own
score.

Source: Tarnawski, Phanishayee, Devanur, Mahajan, Nina Paravecino, "Efficient Algorithms for Device Placement of DNN
Graph Operators" (NeurIPS 2020), and the program ``throughput-dp`` of its artifact, read for the exact objective:

1. nodes of one colour class share a device; so a backward node follows its forward node;
2. only forward edges order the devices; a class without a forward node is ordered by its backward edges, reversed;
3. a device pays its nodes, and the cost of each node's output once if that crosses its border in either direction;
4. a device holds no more bytes than ``maxSizePerFPGA``; it may stay empty. The CPUs of the format are not used.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import inf
from pathlib import Path
from typing import Any

from pipecompile.partition.solver.contraction import Contraction, contract
from pipecompile.partition.solver.problem import Seat

Edge = tuple[int, int]


@dataclass(frozen=True)
class Instance:
    """One file; nodes are counted from 0 in its order."""

    name: str
    ids: tuple[int, ...]
    seconds: tuple[float, ...]  # without a unit in the format
    sizes: tuple[float, ...]
    colours: tuple[Any, ...]
    backward: tuple[bool, ...]
    edges: tuple[Edge, ...]
    costs: tuple[float, ...]  # node -> cost of its output
    limit: float  # bytes of a device

    @staticmethod
    def read(path: Path, name: str) -> Instance:
        """The instance in a file.

        Raises:
            ValueError: the file is not in the format, or a node's output has two costs.
        """
        try:
            return _read(json.loads(path.read_text()), name)
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is not an instance: {type(error).__name__} {error}") from error

    def problem(self, num_stages: int) -> Contraction:
        """The problem, from nodes to its atoms."""
        return contract(
            self.seconds,
            self._order,
            [((node, *users), self.costs[node]) for node, users in enumerate(self._users) if users],
            [Seat(memory=self.limit, may_idle=True)] * num_stages,
            together=list(self._classes.values()),
            kept_bytes=self.sizes,
        )

    def load(self, stage_of: Sequence[int]) -> float:
        """The greatest load of a device, from the nodes and edges as they stand in the file."""
        loads = [0.0] * (1 + max(stage_of))
        for node, stage in enumerate(stage_of):
            loads[stage] += self.seconds[node]
        for node, users in enumerate(self._users):
            devices = {stage_of[node], *(stage_of[user] for user in users)}
            for device in devices if len(devices) > 1 else ():
                loads[device] += self.costs[node]
        return max(loads)

    @cached_property
    def _users(self) -> list[list[int]]:
        users: list[list[int]] = [[] for _ in self.ids]
        for source, target in self.edges:
            users[source].append(target)
        return users

    @cached_property
    def _classes(self) -> dict[Any, list[int]]:
        classes: dict[Any, list[int]] = {}
        for node, colour in enumerate(self.colours):
            classes.setdefault(colour, []).append(node)
        return classes

    @cached_property
    def _order(self) -> list[Edge]:
        """Which node's device must not come after which other's."""
        orphans = {c for c, nodes in self._classes.items() if all(self.backward[node] for node in nodes)}
        order = []
        for source, target in self.edges:
            if not self.backward[source] and not self.backward[target]:
                order.append((source, target))
            elif (
                self.backward[source]
                and self.backward[target]
                and orphans & {self.colours[source], self.colours[target]}
            ):
                order.append((target, source))
        return order


def _read(file: dict[str, Any], name: str) -> Instance:
    nodes = file["nodes"]
    index = {node["id"]: i for i, node in enumerate(nodes)}
    costs: list[float | None] = [None] * len(nodes)
    for edge in file["edges"]:
        source = index[edge["sourceId"]]
        if costs[source] not in (None, edge["cost"]):
            raise ValueError(f"{name}: the output of node {edge['sourceId']} has two costs")
        costs[source] = edge["cost"]
    return Instance(
        name,
        tuple(index),
        tuple(node["fpgaLatency"] if node.get("supportedOnFpga", 1) else inf for node in nodes),
        tuple(node["size"] for node in nodes),
        tuple(node.get("colorClass", ("alone", node["id"])) for node in nodes),
        tuple(bool(node["isBackwardNode"]) for node in nodes),
        tuple((index[edge["sourceId"]], index[edge["destId"]]) for edge in file["edges"]),
        tuple(cost or 0.0 for cost in costs),
        file.get("maxSizePerFPGA", inf),
    )
