"""The parameters of training that a plan depends on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

ADAM = 2.0  # bytes of optimizer state per byte of parameters


@dataclass(frozen=True, slots=True)
class Training:
    """What a plan depends on besides the model: the memory of training, per stage of a chain, and how stages step."""

    in_flight: tuple[int, ...]  # maximum number of microbatches in flight
    live: tuple[int, ...]  # maximum number of live weight versions
    optimizer_state: float = ADAM  # bytes per byte of trainable parameters
    again: tuple[bool, ...] = ()  # whether each stage recomputes activations; empty: no stage does
    reserved: tuple[int, ...] = ()  # bytes of each rank that the plan must leave free
    asynchronous: bool = False  # whether each stage steps on its own, so that no two may share a parameter

    @property
    def all_again(self) -> bool:
        """Whether every stage recomputes activations."""
        return bool(self.again) and all(self.again)

    @property
    def stashed(self) -> tuple[int, int]:
        """Older weight versions of a stage: a fixed number, plus a number per microbatch in flight.

        Exact if all stages hold the same number of versions, or as many as microbatches in flight; otherwise an upper
        bound.
        """
        each = all(live <= count for live, count in zip(self.live, self.in_flight, strict=True))
        return (-1, 1) if max(self.live) > 1 and each and not any(self.again) else (max(self.live) - 1, 0)

    @staticmethod
    def flushed(replicas: Sequence[int]) -> Training:
        """Training with 1F1B and Adam, for stages with ``replicas`` each."""
        in_flight: list[int] = []
        behind = 0
        for count in reversed(replicas):
            in_flight.append(1 + ceil(behind / count))
            behind = count * in_flight[-1]
        return Training(tuple(reversed(in_flight)), (1,) * len(replicas))
