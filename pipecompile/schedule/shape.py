"""Where the stages of a schedule are, as numbers: the stage graph, and the rank of each stage.

    chain(4)         looped(2, 2)       v_shape(2)
    rank 0  0        rank 0  0  2       rank 0  0  3      stage 2 is the second chunk of its rank
    rank 1  1        rank 1  1  3       rank 1  1  2
    rank 2  2
    rank 3  3

A *chunk* is the place of a stage among those of its rank. Stages are in topological order.

Sources: looped, Megatron (Narayanan et al., SC 2021); V, Zero Bubble (Qi et al., ICLR 2024), section 6.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from pipecompile.errors import InputError
from pipecompile.ir.plan import Plan

Edge = tuple[int, int]  # from a stage to a later one


@dataclass(frozen=True)
class Shape:
    """The rank of each stage, and the pairs of stages of which the second reads the first.

    Raises:
        InputError: an edge does not lead to a later stage, or a rank has no stage.
    """

    rank_of: tuple[int, ...]
    edges: tuple[Edge, ...]

    def __post_init__(self) -> None:
        if sorted(set(self.rank_of)) != list(range(self.num_ranks)):
            raise InputError(f"each rank from 0 needs a stage; got rank_of={self.rank_of}")
        for source, target in self.edges:
            if not 0 <= source < target < self.num_stages:
                raise InputError(f"edge {source} -> {target} must lead to a later one of {self.num_stages} stages")
        if len(set(self.edges)) < len(self.edges):
            raise InputError(f"an edge must not occur twice; got {self.edges}")

    @property
    def num_stages(self) -> int:
        return len(self.rank_of)

    @cached_property
    def num_ranks(self) -> int:
        return max(self.rank_of, default=-1) + 1

    @cached_property
    def stages_of(self) -> tuple[tuple[int, ...], ...]:
        """The stages of each rank, ascending."""
        ranks: list[list[int]] = [[] for _ in range(self.num_ranks)]
        for stage, rank in enumerate(self.rank_of):
            ranks[rank].append(stage)
        return tuple(map(tuple, ranks))

    @cached_property
    def chunk_of(self) -> tuple[int, ...]:
        """The place of each stage among those of its rank."""
        return tuple(self.stages_of[rank].index(stage) for stage, rank in enumerate(self.rank_of))

    @cached_property
    def depth(self) -> tuple[int, ...]:
        """The stages on the longest path from each stage to a sink, itself included."""
        depth = [1] * self.num_stages
        for source, target in sorted(self.edges, reverse=True):
            depth[source] = max(depth[source], 1 + depth[target])
        return tuple(depth)

    @property
    def is_chain(self) -> bool:
        """Whether each stage reads exactly the one before it."""
        return sorted(self.edges) == [(s, s + 1) for s in range(self.num_stages - 1)]


def chain(num_ranks: int) -> Shape:
    """One stage on each rank."""
    return _in_a_row(range(num_ranks))


def looped(num_ranks: int, chunks: int) -> Shape:
    """Stage s is on rank s mod ``num_ranks``."""
    return _in_a_row([s % num_ranks for s in range(num_ranks * chunks)])


def v_shape(num_ranks: int) -> Shape:
    """Two stages on each rank: down the ranks and up again."""
    return _in_a_row([*range(num_ranks), *reversed(range(num_ranks))])


def shape_of(plan: Plan) -> Shape:
    """The shape of a plan.

    Raises:
        InputError: stages have replicas, which a shape does not describe.
    """
    refuse_replicas(plan)
    return Shape(plan.rank_of, tuple((c.source, c.target) for c in plan.channels))


def refuse_replicas(plan: Plan) -> None:
    """Raises ``InputError`` if stages have replicas."""
    if any(len(group) > 1 for group in plan.replicas):
        raise InputError("stages with replicas run only 'sequential', 'gpipe' and '1f1b'; use one of these")


def in_order(plan: Plan) -> Shape:
    """The shape of a plan with its ranks numbered by their first stages, as policies count them.

    Raises:
        InputError: as ``shape_of``.
    """
    number = {rank: place for place, rank in enumerate(dict.fromkeys(plan.rank_of))}
    return shape_of(plan.on_ranks([number.get(rank, -1) for rank in range(plan.num_ranks)]))


def _in_a_row(rank_of: Sequence[int]) -> Shape:
    if len(rank_of) < 1:
        raise InputError("a schedule must have at least one rank, and a stage on it")
    return Shape(tuple(rank_of), tuple((s, s + 1) for s in range(len(rank_of) - 1)))
