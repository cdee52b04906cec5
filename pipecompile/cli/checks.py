"""Where the stages of a command are, and the checks of what places them."""

from __future__ import annotations

from pipecompile.errors import InputError
from pipecompile.ir.plan_options import PlanOptions
from pipecompile.schedule import AUTO, SCHEDULES
from pipecompile.schedule.placement import PLAIN, Placement


def placement_of(options: PlanOptions, schedule: str) -> Placement:
    """Where the stages are that a schedule asks for; one on each rank for auto, which chooses."""
    return PLAIN if schedule == AUTO else SCHEDULES[schedule].placed(options.stages_per_rank, schedule)


def ranks_for(stages: int | None, placement: Placement, schedule: str) -> int | None:
    """The number of devices for a number of stages; None if that is not given."""
    per_rank = placement.per_rank
    if stages is not None and stages % per_rank:
        raise InputError(
            f"schedule {schedule!r} has {per_rank} stages on each rank, so --stages must be a multiple of {per_rank}; "
            f"got {stages}"
        )
    return None if stages is None else stages // per_rank


def check_replicas(options: PlanOptions, stages: int | None, devices: int, schedule: str) -> None:
    counts = options.counts
    text = ",".join(map(str, counts))
    if options.replicas is not None and (schedule == AUTO or not SCHEDULES[schedule].takes_replicas):
        raise InputError(
            f"--replicas does not work with --schedule {schedule}, whose order is for one device per stage; use 1f1b "
            f"or gpipe"
        )
    if options.replicas is not None and SCHEDULES[schedule].is_asynchronous:
        raise InputError(
            f"--replicas does not work with --schedule {schedule}, which steps inside the pipeline; use 1f1b or gpipe"
        )
    if counts and stages not in (None, len(counts)):
        raise InputError(f"--replicas {text} is for {len(counts)} stages, but --stages is {stages}; they must match")
    if counts and sum(counts) != devices:
        raise InputError(f"--replicas {text} is for {sum(counts)} devices, but there are {devices}; they must match")
