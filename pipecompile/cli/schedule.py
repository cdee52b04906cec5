"""``pipecompile schedule``: draws a schedule for invented times."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from pipecompile.cli.arguments import AsJson, Microbatches, Stages, one_of, per_stage
from pipecompile.cli.drawn_schedule import DRAWN
from pipecompile.cli.timeline_output import CsvFile, ShowProgram, SvgFile, TraceFile, show
from pipecompile.ir.cluster import Cluster, Link
from pipecompile.ir.graph import Cost
from pipecompile.schedule import AUTO

if TYPE_CHECKING:
    from pipecompile.cli.weighed_orders import WeighedOrder


def schedule(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help=f"One of {', '.join(DRAWN)}; auto, the best of all and what it was weighed against, where --stages "
            "counts ranks; or a file: a grid of computations (.txt), or torch's actions (.csv).",
            autocompletion=one_of((*DRAWN, AUTO)),
        ),
    ],
    stages: Stages = 4,
    microbatches: Microbatches = 8,
    forward: Annotated[
        str, typer.Option(help="Seconds of a forward: one number, or one per stage, such as 1,2,1,1.")
    ] = "1",
    backward: Annotated[str, typer.Option(help="Seconds of a backward: one number, or one per stage.")] = "2",
    weight_part: Annotated[
        float, typer.Option(min=0, max=1, help="Part of a backward that is for weights, where it is split.")
    ] = 0.5,
    transfer: Annotated[float, typer.Option(min=0, help="Seconds of a transfer between stages.")] = 0.0,
    memory: Annotated[
        float | None,
        typer.Option(min=1, help="For auto: memory of a rank, in microbatches of all its stages. Default: no limit."),
    ] = None,
    svg: SvgFile = None,
    trace: TraceFile = None,
    csv: CsvFile = None,
    program: ShowProgram = False,
    as_json: AsJson = False,
) -> None:
    """Draw the timeline of a schedule: what each rank computes, and when.

    pipecompile schedule 1f1b --stages 4 --microbatches 8 --svg 1f1b.svg
    pipecompile schedule zb-v --stages 8 --microbatches 8 --trace zb-v.json
    """
    from pipecompile.cli.drawn_schedule import drawn_program, program_on_its_shape
    from pipecompile.cli.weighed_orders import RankCosts, weighed_orders
    from pipecompile.schedule.simulator import simulate

    weighed: Sequence[WeighedOrder] = ()
    if name == AUTO:
        given = (per_stage("--forward", forward, stages), per_stage("--backward", backward, stages))
        cap = float("inf") if memory is None else memory
        weighed = weighed_orders(RankCosts(*given, weight_part, transfer), microbatches, cap)
        it = program_on_its_shape(weighed[0].order)
        rank_of = it.plan.rank_of
        f, b = ([each[rank] / rank_of.count(rank) for rank in rank_of] for each in given)
    else:
        it = drawn_program(name, stages, microbatches)
        stages = it.plan.num_stages
        f, b = per_stage("--forward", forward, stages), per_stage("--backward", backward, stages)
    seconds = zip(f, b, strict=True)
    cluster = Cluster.of([f"rank {rank}" for rank in range(len(it.ranks))], Link(float("inf"), transfer))
    timeline = simulate(it, [Cost(*pair) for pair in seconds], cluster, weight_part=weight_part)
    show(name, it, timeline, weighed=weighed, svg=svg, trace=trace, csv=csv, program=program, as_json=as_json)
