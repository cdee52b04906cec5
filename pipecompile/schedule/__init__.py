"""Schedules: make a bare program from a plan and a number of microbatches.

``SCHEDULES`` holds the synchronous schedules, which end a step with an empty pipeline. ``ASYNCHRONOUS`` schedules keep
it full from one call to the next, and update weights in between.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from pipecompile.ir.plan import Plan
from pipecompile.ir.program import Program
from pipecompile.schedule.gpipe import gpipe
from pipecompile.schedule.halves import backward_only, forward_only
from pipecompile.schedule.one_f_one_b import one_f_one_b
from pipecompile.schedule.pipedream import carried_after, drain, pipedream, steady
from pipecompile.schedule.sequential import sequential


class Schedule(Protocol):
    """A synchronous schedule. With ``step`` the program ends with a Step of each stage."""

    def __call__(self, plan: Plan, num_microbatches: int, *, step: bool = False) -> Program: ...


SCHEDULES: Mapping[str, Schedule] = {"sequential": sequential, "gpipe": gpipe, "1f1b": one_f_one_b}
ASYNCHRONOUS = ("pipedream",)

__all__ = [
    "ASYNCHRONOUS",
    "SCHEDULES",
    "Schedule",
    "backward_only",
    "carried_after",
    "drain",
    "forward_only",
    "gpipe",
    "one_f_one_b",
    "pipedream",
    "sequential",
    "steady",
]
