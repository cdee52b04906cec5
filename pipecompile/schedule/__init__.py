"""Schedules: make a bare program from a plan and a number of microbatches. ``SCHEDULES`` holds them by name."""

from __future__ import annotations

from pipecompile.schedule.gpipe import gpipe
from pipecompile.schedule.halves import backward_only, forward_only
from pipecompile.schedule.one_f_one_b import one_f_one_b
from pipecompile.schedule.pipedream import carried_after, drain, pipedream, vertical_sync
from pipecompile.schedule.pipedream_2bw import drain_batch, pipedream_2bw
from pipecompile.schedule.registry import AUTO, SCHEDULES, SYNCHRONOUS, MakeProgram, Schedule, Segment
from pipecompile.schedule.sequential import sequential

__all__ = [
    "AUTO",
    "SCHEDULES",
    "SYNCHRONOUS",
    "MakeProgram",
    "Schedule",
    "Segment",
    "backward_only",
    "carried_after",
    "drain",
    "drain_batch",
    "forward_only",
    "gpipe",
    "one_f_one_b",
    "pipedream",
    "pipedream_2bw",
    "sequential",
    "vertical_sync",
]
