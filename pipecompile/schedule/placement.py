"""Which rank runs which stages, where each rank may have several: a schedule asks for a placement.

Placement()          Placement(2)         Placement(2, turns=True)
rank 0  0            rank 0  0  2         rank 0  0  3
rank 1  1            rank 1  1  3         rank 1  1  2
"""

from __future__ import annotations

from dataclasses import dataclass

from pipecompile.schedule.shape import looped, v_shape


@dataclass(frozen=True)
class Placement:
    """How many stages each rank has, and where.

    Args:
        per_rank: the stages of each rank; more than one are dealt to the ranks in turn.
        turns: whether they go down the ranks and up again instead.
        given: the rank of each stage, for a schedule of the user's own; empty: by the other two.
    """

    per_rank: int = 1
    turns: bool = False
    given: tuple[int, ...] = ()

    def rank_of(self, num_ranks: int) -> tuple[int, ...]:
        """stage -> rank"""
        if self.given:
            return self.given
        return (v_shape(num_ranks) if self.turns else looped(num_ranks, self.per_rank)).rank_of

    @property
    def is_plain(self) -> bool:
        """Whether each rank has one stage, in order."""
        return self.given == tuple(range(len(self.given))) if self.given else self.per_rank == 1

    def __str__(self) -> str:
        if self.given:
            return f"stages on ranks {', '.join(map(str, self.given))}"
        if self.per_rank == 1:
            return "one stage on each rank"
        return f"{self.per_rank} stages on each rank" + (", down the ranks and up again" if self.turns else "")


PLAIN = Placement()
