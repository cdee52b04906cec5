"""``pipecompile simulate``: predicts a step of given stages under any schedule."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from pipecompile.cli.arguments import AsJson, one_of
from pipecompile.cli.checks import ranks_for
from pipecompile.cli.drawn_schedule import DRAWN, drawn_program
from pipecompile.cli.stage_figures import StageFigures, read_stages
from pipecompile.cli.timeline_output import CsvFile, ShowProgram, SvgFile, TraceFile, show
from pipecompile.errors import InputError
from pipecompile.ir.cluster import Cluster, Link
from pipecompile.ir.program import Program
from pipecompile.schedule import SCHEDULES


def simulate(
    stages: Annotated[
        Path,
        typer.Argument(
            metavar="STAGES",
            help="What [bold]plan --json[/] printed (.json), or a table (.csv) with a row per stage and the columns "
            "stage, forward, backward (seconds), parameter_bytes, saved_bytes, bytes_out.",
        ),
    ],
    schedule: Annotated[
        str | None,
        typer.Option(
            "--schedule",
            "-s",
            help=f"One of {', '.join(DRAWN)}; or a file: a grid of computations (.txt), or torch's actions (.csv). "
            "Default: that of the plan, or 1f1b.",
            autocompletion=one_of(DRAWN),
        ),
    ] = None,
    microbatches: Annotated[
        int | None,
        typer.Option("--microbatches", "-m", min=1, help="Microbatches per step. Default: those of the plan, or 8."),
    ] = None,
    cluster: Annotated[
        str | None,
        typer.Option(help="Cluster whose links are used, such as 8xH100. Default: that of the plan, or --bandwidth."),
    ] = None,
    bandwidth: Annotated[
        float, typer.Option(min=1, help="Bytes per second of a link, without a plan or a cluster.")
    ] = float("inf"),
    latency: Annotated[float, typer.Option(min=0, help="Seconds of a transfer of no bytes, likewise.")] = 0.0,
    weight_part: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Part of a backward that is for weights, where it is split. Default: as in the plan, or 0.5.",
        ),
    ] = None,
    svg: SvgFile = None,
    trace: TraceFile = None,
    csv: CsvFile = None,
    program: ShowProgram = False,
    as_json: AsJson = False,
) -> None:
    """Predict a step: the timeline, the bubble, and the peak memory of weights and activations of each rank.

    pipecompile plan hf:gpt2 --stages 4 --json > plan.json
    pipecompile simulate plan.json --schedule zb-h1 --microbatches 16
    """
    from pipecompile.schedule.simulator import simulate as simulated

    figures = read_stages(stages)
    name = schedule or figures.schedule or "1f1b"
    it = program_for(figures, name, microbatches or figures.microbatches or 8)
    links = _cluster(figures, cluster, bandwidth, latency, len(it.ranks))
    if weight_part is None:
        timeline = simulated(it, figures.costs, links, halves=figures.halves)
    else:
        timeline = simulated(it, figures.costs, links, weight_part=weight_part)
    show(name, it, timeline, svg=svg, trace=trace, csv=csv, program=program, as_json=as_json)


def program_for(figures: StageFigures, schedule: str, microbatches: int) -> Program:
    """The bare program of a schedule, or of a file with an order, for given stages.

    Raises:
        InputError: the schedule or the file is for other stages.
    """
    plan = figures.plan
    if schedule in SCHEDULES:
        placement = SCHEDULES[schedule].placement
        ranks = ranks_for(plan.num_stages, placement, schedule) or plan.num_stages
        if not placement.is_plain:
            plan = replace(plan, rank_of=placement.rank_of(ranks))
        return SCHEDULES[schedule].program(plan, microbatches)
    it = drawn_program(schedule, plan.num_stages, microbatches)
    theirs, ours = {(c.source, c.target) for c in it.plan.channels}, {(c.source, c.target) for c in plan.channels}
    if it.plan.num_stages != plan.num_stages:
        raise InputError(
            f"{schedule} is an order of {it.plan.num_stages} stages, but there are {plan.num_stages}; they must match"
        )
    if len(set(plan.replica_of)) < plan.num_stages or not ours <= theirs or plan.tied:
        raise InputError(
            f"schedule {schedule!r} is simulated for a chain of stages only, but these have replicas, tied parameters "
            f"or values that skip stages; use one of {', '.join(SCHEDULES)}, or a table of stages (.csv)"
        )
    nbytes = {(channel.source, channel.target): channel.nbytes for channel in plan.channels}
    channels = tuple(replace(each, nbytes=nbytes.get((each.source, each.target), 0)) for each in it.plan.channels)
    return replace(it, plan=replace(it.plan, channels=channels))


def _cluster(figures: StageFigures, name: str | None, bandwidth: float, latency: float, ranks: int) -> Cluster:
    if name is not None:
        return Cluster.from_name(name)
    if figures.cluster is not None:
        return figures.cluster
    return Cluster.of([f"rank {rank}" for rank in range(ranks)], Link(bandwidth, latency))
