"""Options of commands, checked and read."""

from __future__ import annotations

from pipecompile.compiler.options import AUTO
from pipecompile.errors import InputError
from pipecompile.ir.plan_options import PlanOptions
from pipecompile.schedule import SCHEDULES
from pipecompile.schedule.placement import PLAIN, Placement


def check_choice(what: str, given: str, choices: tuple[str, ...]) -> None:
    if given not in choices:
        raise InputError(f"{what} {given!r} is not known; it must be one of {', '.join(choices)}")


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
            f"--replicas does not work with --schedule {schedule}, which steps after each microbatch; use 1f1b or gpipe"
        )
    if counts and stages not in (None, len(counts)):
        raise InputError(f"--replicas {text} is for {len(counts)} stages, but --stages is {stages}; they must match")
    if counts and sum(counts) != devices:
        raise InputError(f"--replicas {text} is for {sum(counts)} devices, but there are {devices}; they must match")


def per_stage(option: str, text: str, stages: int) -> list[float]:
    try:
        seconds = [float(word) for word in text.split(",")]
    except ValueError:
        raise InputError(
            f"{option} {text!r} is not a number of seconds; write one number, or one per stage, such as 1,2,1,1"
        ) from None
    if not all(0 <= it < float("inf") for it in seconds):
        raise InputError(f"{option} {text!r} is negative or not finite; seconds must be finite and at least 0")
    if len(seconds) not in (1, stages):
        raise InputError(f"{option} has {len(seconds)} numbers for {stages} stages; give one, or {stages}")
    return seconds * stages if len(seconds) == 1 else seconds
