"""What a plan within memory must know of the training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

ADAM = 2.0  # bytes of optimizer state for each byte of parameters


@dataclass(frozen=True, slots=True)
class Training:
    """What memory in training depends on beside the model; for each stage, as a program has it on stages in a row."""

    in_flight: tuple[int, ...]  # microbatches at once
    live: tuple[int, ...]  # weight versions at once
    optimizer_state: float = ADAM  # bytes for each byte of trainable parameters
    again: tuple[bool, ...] = ()  # whether each stage's backward computes its forward again; none given: no stage's
    reserved: tuple[int, ...] = ()  # bytes of each rank that the plan may not use

    @property
    def all_again(self) -> bool:
        """Whether every stage's backward computes its forward again."""
        return bool(self.again) and all(self.again)

    @property
    def stashed(self) -> tuple[int, int]:
        """Older weight versions: how many a stage holds, plus how many for each microbatch in flight.

        Exact where stages hold one version, or as many as they have microbatches in flight; else not too few.
        """
        each = all(live <= count for live, count in zip(self.live, self.in_flight, strict=True))
        return (-1, 1) if max(self.live) > 1 and each and not any(self.again) else (max(self.live) - 1, 0)

    @staticmethod
    def flushed(replicas: Sequence[int]) -> Training:
        """As 1F1B has it, with Adam, for stages with so many replicas each."""
        in_flight: list[int] = []
        behind = 0
        for count in reversed(replicas):
            in_flight.append(1 + ceil(behind / count))
            behind = count * in_flight[-1]
        return Training(tuple(reversed(in_flight)), (1,) * len(replicas))
