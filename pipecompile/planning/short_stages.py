"""Stages so short that their times tell nothing: Python passes its lock on between threads every 5 ms."""

from __future__ import annotations

from collections.abc import Iterable

from pipecompile.ir.graph import Cost

WORTH = 5e-3  # seconds of a stage per microbatch from which it is worth to compare, to rehearse or to time


def all_short(stages: Iterable[Cost]) -> bool:
    """Whether all stages are short."""
    return max(cost.seconds for cost in stages) < WORTH
