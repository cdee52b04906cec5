"""``pipecompile plan``: splits a model into stages, and predicts a step."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipecompile.cli.arguments import (
    AsJson,
    Costs,
    DeviceToMeasure,
    Dtype,
    Length,
    Microbatch,
    Model,
    check_choice,
    one_of,
)
from pipecompile.cli.checks import check_replicas, placement_of, ranks_for
from pipecompile.cli.dataclass_options import takes
from pipecompile.errors import InputError
from pipecompile.ir.plan_options import PlanOptions
from pipecompile.schedule import AUTO, SCHEDULES

FORMATS = ("dot", "mermaid", "json", "html")  # those of render/formats.py, which takes long to import
SUFFIXES = {".gv": "dot", ".mmd": "mermaid", **{f".{name}": name for name in FORMATS}}
OUTPUTS = ("all", "loss")
USUAL = 8  # microbatches


@takes("options", PlanOptions)
def plan(
    model: Model,
    stages: Annotated[
        int | None, typer.Option("--stages", "-n", min=1, help="Number of stages. Default: one per device, or 2.")
    ] = None,
    microbatches: Annotated[
        int | None,
        typer.Option(
            "--microbatches",
            "-m",
            min=1,
            help="Number per step. Default: 8; with auto, the best for as many rows.",
        ),
    ] = None,
    schedule: Annotated[
        str | None,
        typer.Option(
            "--schedule",
            "-s",
            help=f"One of {', '.join(SCHEDULES)}; or auto, the shortest step. Default: 1f1b or zb-h1.",
            autocompletion=one_of((*SCHEDULES, AUTO)),
        ),
    ] = None,
    microbatch: Microbatch = None,
    length: Length = 128,
    costs: Costs = None,
    save_costs: Annotated[Path | None, typer.Option(help="Save the costs to this file, for --costs.")] = None,
    device: DeviceToMeasure = "cpu",
    cluster: Annotated[
        str | None, typer.Option(help="Cluster to plan for, such as 8xH100, 64xH100 or 2x8xA100-40GB.")
    ] = None,
    dtype: Dtype = "float32",
    fused: Annotated[bool, typer.Option("--fused", help="The optimizer step needs no temporary memory.")] = False,
    outputs: Annotated[
        str,
        typer.Option(help="[bold]all[/], or [bold]loss[/]: keep no other outputs.", autocompletion=one_of(OUTPUTS)),
    ] = "all",
    format: Annotated[
        str | None,
        typer.Option(
            "--format",
            "-f",
            help=f"Write the stage graph as one of {', '.join(FORMATS)}.",
            autocompletion=one_of(FORMATS),
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="File to write the stage graph to; its suffix selects the format."),
    ] = None,
    as_json: AsJson = False,
    *,
    options: PlanOptions,
) -> None:
    """Split a model into stages. Prints their modules, costs and memory, and the predicted time of a step.

    pipecompile plan hf:gpt2 --stages 4 --output plan.html
    pipecompile plan hf:llama --cluster 64xH100 --dtype bfloat16
    """
    from pipecompile.planning.candidates import DEFAULT, Candidates

    written = _format(format, output, as_json)
    named = schedule or DEFAULT.prefers  # what the stages are for, whichever runs
    check_choice("schedule", named, (*SCHEDULES, AUTO))
    check_choice("outputs", outputs, OUTPUTS)

    if written == "html":
        from pipecompile.render.html import figures

        figures()  # before what takes long

    from rich.console import Console

    from pipecompile.capture.loss import with_only_the_loss
    from pipecompile.cli import costed_model
    from pipecompile.cli.output import print_json, write
    from pipecompile.cli.prediction import Prediction
    from pipecompile.compiler.devices import parse_devices
    from pipecompile.ir.cluster import Cluster
    from pipecompile.ops.phases import Phases, phase
    from pipecompile.partition import ADAM
    from pipecompile.planning.best_schedule import under_best, with_best_pair, with_best_schedule
    from pipecompile.planning.counted import numbers
    from pipecompile.planning.planned import planned
    from pipecompile.planning.training_spec import Workload
    from pipecompile.render import formats

    (place,) = parse_devices([device])
    placement = placement_of(options, named)
    ranks = ranks_for(stages, placement, named)
    devices = Cluster.from_name(cluster) if cluster else Cluster.of([str(place)] * (sum(options.counts) or ranks or 2))
    check_replicas(options, ranks, len(devices), named)
    if not placement.is_plain and ranks not in (None, len(devices)):
        raise InputError(
            f"--stages {stages} is for {ranks} devices with {placement.per_rank} stages each, but there are "
            f"{len(devices)}; leave --stages out"
        )
    costs = costs or ("count" if cluster else "measure")
    with Phases().recorded():
        captured = costed_model.captured(model, microbatch, length, dtype, meta=costs != "measure")
        if outputs == "loss":
            captured = with_only_the_loss(captured, None)
        costed = costed_model.costed(captured, costs, place, devices.devices[0].kind)
        if save_costs is not None:
            write(costed.to_json(), save_costs)
        state = ADAM if options.optimizer_state is None else options.optimizer_state
        among = Candidates.of(schedule)
        policy = SCHEDULES[named if among is None else among.prefers]
        work = Workload(
            schedule=policy.steady,
            microbatches=microbatches or USUAL,
            optimizer_state=state,
            recompute=options.recompute,
            offload=options.offload,
            fused=fused,
            asynchronous=policy.is_asynchronous,
            placement=placement,
        )
        with phase("plan"):
            by_rows = None
            if schedule == AUTO and microbatches is None:
                by_rows = costed_model.by_rows(captured, costed, USUAL, costs, place, devices.devices[0].kind)
            if by_rows is not None:
                tried = numbers(by_rows.batch, len(devices), USUAL, most=by_rows.batch)
                made = with_best_pair(by_rows, devices, work, options, tried, by_rows.costed)
            elif schedule == AUTO:
                made = with_best_schedule(costed, devices, work, options)
            else:
                made = planned(costed, devices, work, options, stages)
            if among is not None and among.one_plan and among.are_open(work, devices, options, costs == "measure"):
                made = under_best(made, among)
            prediction = Prediction.of(made, made.schedule or named, model, costed_model.topics(captured))
    if as_json:
        print_json(prediction.facts())
    else:
        prediction.print_to(Console(stderr=written is not None and output is None))  # stdout is for the stage graph
    if written is not None:
        write(formats.FORMATS[written](prediction.page), output)


def _format(format: str | None, output: Path | None, as_json: bool) -> str | None:
    """The name of the format in which the stage graph is written, if it is."""
    if format is None and output is not None:
        format = SUFFIXES.get(output.suffix)
        if format is None:
            raise InputError(f"the suffix of {output} is not a known format; add --format, one of {', '.join(FORMATS)}")
    if format is not None:
        check_choice("format", format, FORMATS)
    if as_json and format is not None and output is None:
        raise InputError("--json and --format would both go to the terminal; add --output FILE")
    return format
