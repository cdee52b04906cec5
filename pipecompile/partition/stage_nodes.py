"""The nodes of a graph that need a stage, as the things of a problem. Rematerialized nodes are left out."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from pipecompile.ir.graph import Graph


@dataclass(frozen=True)
class Placed:
    """The nodes of a graph that are not rematerialized, numbered in order."""

    graph: Graph

    @cached_property
    def nodes(self) -> tuple[int, ...]:
        """thing -> node"""
        return tuple(index for index, node in enumerate(self.graph.nodes) if not node.rematerialized)

    @cached_property
    def thing_of(self) -> dict[int, int]:
        """node -> thing"""
        return {index: thing for thing, index in enumerate(self.nodes)}

    @cached_property
    def users(self) -> tuple[tuple[int, ...], ...]:
        """thing -> things that read it"""
        return tuple(tuple(self.thing_of[user] for user in self.graph.users[index]) for index in self.nodes)

    @cached_property
    def arcs(self) -> tuple[tuple[int, int], ...]:
        return tuple((thing, user) for thing, users in enumerate(self.users) for user in users)

    @cached_property
    def together(self) -> tuple[tuple[int, ...], ...]:
        groups = (tuple(self.thing_of[i] for i in group if i in self.thing_of) for group in self.graph.together)
        return tuple(group for group in groups if len(group) > 1)

    def stages(self, stage_of: tuple[int, ...]) -> list[int | None]:
        """node -> stage, given thing -> stage"""
        found: list[int | None] = [None] * len(self.graph)
        for index, stage in zip(self.nodes, stage_of, strict=True):
            found[index] = stage
        return found
