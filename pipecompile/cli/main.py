"""The commands: plan a model, check a split model, draw a schedule. They only call the library and print."""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.text import Text
from torch import Tensor
from typer.core import TyperGroup

from pipecompile.api import compile
from pipecompile.batching import Batching
from pipecompile.capture import Captured, capture, read_call, summarize
from pipecompile.capture.loss import with_only_the_loss
from pipecompile.cli import cache
from pipecompile.cli.checks import check_choice, check_replicas, per_stage, placement_of, ranks_for
from pipecompile.cli.dataclass_options import takes
from pipecompile.cli.doctor import all_devices, examine
from pipecompile.cli.drawn_schedule import DRAWN, drawn_program, program_on_its_shape
from pipecompile.cli.model_spec import load
from pipecompile.cli.prediction import Prediction
from pipecompile.cli.weighed_orders import RankCosts, weighed_orders
from pipecompile.compiler.devices import parse_devices
from pipecompile.compiler.disk_cache import DiskCache
from pipecompile.compiler.options import AUTO, OUTPUTS, read_costs
from pipecompile.compiler.plan_call import reused
from pipecompile.errors import InputError, PipecompileError
from pipecompile.ir.cluster import Cluster, Link
from pipecompile.ir.graph import Cost, CostedGraph
from pipecompile.ir.plan_options import PlanOptions
from pipecompile.ops.torch_internals import tree_map_only
from pipecompile.partition import ADAM
from pipecompile.planning.planned import chosen, planned
from pipecompile.planning.training_spec import Workload
from pipecompile.profile import profile
from pipecompile.render.formats import FORMATS
from pipecompile.render.timeline import timeline_svg, timeline_text
from pipecompile.render.trace import trace as trace_text
from pipecompile.schedule import SCHEDULES, SYNCHRONOUS
from pipecompile.schedule.grid import write_torch_csv
from pipecompile.schedule.order_program import order_of
from pipecompile.schedule.simulator import simulate

SUFFIXES = {".gv": "dot", ".mmd": "mermaid", **{f".{name}": name for name in FORMATS}}

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="[bold]module:function[/] or [bold]path/file.py:function[/], a function that returns (model, inputs); "
        "or [bold]hf:gpt2[/] or [bold]hf:path/or/name[/], the config of a transformers model.",
    ),
]
Length = Annotated[int, typer.Option(min=1, help="Sequence length of the sample inputs, for hf.")]
Stages = Annotated[int, typer.Option("--stages", "-n", min=1, help="Number of stages.")]
Microbatches = Annotated[int, typer.Option("--microbatches", "-m", min=1, help="Number of microbatches per step.")]


class _Group(TyperGroup):
    """Prints an error of pipecompile as one message instead of a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except PipecompileError as error:
            if ctx.params["debug"]:
                raise
            Console(stderr=True).print(Text.assemble(("error: ", "bold red"), (str(error), "red")), soft_wrap=True)
            raise typer.Exit(2) from None


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Split any PyTorch model over several devices and train it, without rewriting it.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"pipecompile {version('pipecompile')}")
        raise typer.Exit


@app.callback()
def main(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Read by ``_Group`` and ``_print_version``."""


@app.command()
@takes("options", PlanOptions)
def plan(
    model: Model,
    stages: Annotated[
        int | None, typer.Option("--stages", "-n", min=1, help="Number of stages. Default: one per device, or 2.")
    ] = None,
    microbatches: Microbatches = 8,
    schedule: Annotated[
        str, typer.Option("--schedule", "-s", help=f"One of {', '.join(SCHEDULES)}; or auto, the shortest step.")
    ] = "1f1b",
    microbatch: Annotated[
        int | None, typer.Option(min=1, help="Samples per microbatch. Default: all that MODEL returns; 2 for hf.")
    ] = None,
    length: Length = 128,
    costs: Annotated[
        str | None,
        typer.Option(
            "--costs",
            help="[bold]measure[/] the seconds of each operation, [bold]count[/] its work, or a file of saved costs. "
            "Default: count with --cluster, otherwise measure.",
        ),
    ] = None,
    save_costs: Annotated[Path | None, typer.Option(help="Save the costs to this file, for --costs.")] = None,
    device: Annotated[str, typer.Option(help="Device to measure on.")] = "cpu",
    cluster: Annotated[
        str | None, typer.Option(help="Cluster to plan for, such as 8xH100, 64xH100 or 2x8xA100-40GB.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Dtype of the weights: float32, bfloat16 or float16.")] = "float32",
    fused: Annotated[bool, typer.Option("--fused", help="The optimizer step needs no temporary memory.")] = False,
    outputs: Annotated[str, typer.Option(help="[bold]all[/], or [bold]loss[/]: keep no other outputs.")] = "all",
    format: Annotated[
        str | None, typer.Option("--format", "-f", help=f"Write the stage graph as one of {', '.join(FORMATS)}.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="File to write the stage graph to; its suffix selects the format."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the table and the prediction as JSON.")] = False,
    *,
    options: PlanOptions,
) -> None:
    """Split a model into stages. Prints their modules, costs and memory, and the predicted time of a step.

    pipecompile plan hf:gpt2 --stages 4 --output plan.html
    pipecompile plan hf:llama --cluster 64xH100 --dtype bfloat16
    """
    written = _format(format, output, as_json)
    check_choice("schedule", schedule, (*SCHEDULES, AUTO))
    (place,) = parse_devices([device])
    placement = placement_of(options, schedule)
    ranks = ranks_for(stages, placement, schedule)
    devices = Cluster.from_name(cluster) if cluster else Cluster.of([str(place)] * (sum(options.counts) or ranks or 2))
    check_replicas(options, ranks, len(devices), schedule)
    check_choice("outputs", outputs, OUTPUTS)
    costs = costs or ("count" if cluster else "measure")
    captured = _captured(model, microbatch, length, dtype, meta=costs != "measure")
    if outputs == "loss":
        captured = with_only_the_loss(captured, None)
    costed = _costed(captured, costs, place, devices.devices[0].kind)
    if save_costs is not None:
        _write(costed.to_json(), save_costs)
    state = ADAM if options.optimizer_state is None else options.optimizer_state
    policy = SCHEDULES["1f1b" if schedule == AUTO else schedule]
    work = Workload(
        schedule=policy.steady,
        microbatches=microbatches,
        optimizer_state=state,
        recompute=options.recompute,
        fused=fused,
        asynchronous=policy.is_asynchronous,
        placement=placement,
    )
    if schedule == AUTO:
        found = chosen(costed, devices, work, options)
    elif not placement.is_plain and ranks not in (None, len(devices)):
        raise InputError(
            f"--stages {stages} is for {ranks} devices with {placement.per_rank} stages each, but there are "
            f"{len(devices)}; leave --stages out"
        )
    else:
        found = planned(costed, devices, work, options, stages)
    prediction = Prediction.of(found, found.schedule or schedule)
    if as_json:
        typer.echo(json.dumps(prediction.facts(), indent=2))
    else:
        prediction.print_to(Console(stderr=written is not None and output is None))  # stdout is for the stage graph
    if written is not None:
        _write(FORMATS[written](prediction.view), output)


@app.command()
@takes("plan", PlanOptions)
@takes("batching", Batching)
def check(
    model: Model,
    stages: Stages = 2,
    microbatches: Microbatches = 4,
    schedule: Annotated[str, typer.Option("--schedule", "-s", help=f"One of {', '.join(SYNCHRONOUS)}, auto.")] = "1f1b",
    batch: Annotated[
        int | None, typer.Option(min=1, help="Samples per batch, for hf. Default: two per microbatch.")
    ] = None,
    length: Length = 128,
    loss_output: Annotated[
        str | None,
        typer.Option(help="Name of the output that is the loss, if it is neither called loss nor the only scalar."),
    ] = None,
    double: Annotated[bool, typer.Option("--double", help="Compare in float64, where rounding is small.")] = False,
    device: Annotated[str, typer.Option(help="Device that runs all stages.")] = "cpu",
    stage_compile: Annotated[
        str | None,
        typer.Option(help="Backend of torch that compiles the stages, such as inductor. Default: none."),
    ] = None,
    *,
    batching: Batching,
    plan: PlanOptions,
) -> None:
    """Run a step of the split and of the unsplit model, also on fresh inputs, and compare all results.

    The exit code is 1 if any difference is larger than rounding.

    pipecompile check hf:gpt2 --stages 4 --double
    """
    check_choice("schedule", schedule, (*SYNCHRONOUS, AUTO))
    ranks = ranks_for(stages, placement_of(plan, schedule), schedule) or stages
    places = parse_devices([device] * (sum(plan.counts) or ranks))
    it, args, kwargs = load(model, batch or 2 * microbatches, length)
    if double:
        it, (args, kwargs) = it.double(), tree_map_only(Tensor, _to_double, (args, kwargs))
    it, (args, kwargs) = it.to(places[0]), tree_map_only(Tensor, lambda t: t.to(places[0]), (args, kwargs))
    pipe = compile(
        it,
        list(map(str, places)),
        schedule=schedule,
        microbatches=microbatches,
        loss_output=loss_output,
        batching=batching,
        plan=plan,
        costs="count",
        stage_compile=stage_compile or False,
    )
    result = pipe.pipeline.verify(*args, **kwargs)
    Console().print(result)
    if not result.exact:
        raise typer.Exit(1)


@app.command()
def doctor(
    devices: Annotated[
        str, typer.Option(help="Devices of the step, by commas: cuda:0,cuda:1. Default: all accelerators, or the CPU.")
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print what is found as JSON.")] = False,
) -> None:
    """Look at the devices and their links, and compare a step split over them with the unsplit model."""
    found = examine(parse_devices(devices.split(",")) if devices else all_devices())
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=1))
    else:
        found.show(Console())
    raise typer.Exit(not found.exact)


@app.command("cache")
def look_at_cache(
    clear: Annotated[bool, typer.Option("--clear", help="Remove all entries.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the entries as JSON.")] = False,
) -> None:
    """Show or clear what earlier runs have measured and planned. PIPECOMPILE_CACHE names another folder, or off."""
    kept = DiskCache.of_user()
    if clear:
        typer.echo(cache.clear(kept))
    elif as_json:
        typer.echo(json.dumps(cache.facts(kept), indent=1))
    else:
        cache.show(kept, Console())


@app.command("schedule")
def draw_schedule(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help=f"One of {', '.join(DRAWN)}; auto, the best of all and what it was weighed against, where --stages "
            "counts ranks; or a file: a grid of computations (.txt), or torch's actions (.csv).",
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
    svg: Annotated[Path | None, typer.Option(help="Write the timeline to this SVG file.")] = None,
    trace: Annotated[Path | None, typer.Option(help="Write the timeline to this file, for Perfetto.")] = None,
    csv: Annotated[Path | None, typer.Option(help="Write the order to this file, as torch reads it.")] = None,
    program: Annotated[bool, typer.Option("--program", help="Also print the instructions of each rank.")] = False,
) -> None:
    """Draw the timeline of a schedule: what each rank computes, and when.

    pipecompile schedule 1f1b --stages 4 --microbatches 8 --svg 1f1b.svg
    pipecompile schedule zb-v --stages 8 --microbatches 8 --trace zb-v.json
    """
    console = Console()
    if name == AUTO:
        given = (per_stage("--forward", forward, stages), per_stage("--backward", backward, stages))
        weighed = weighed_orders(
            RankCosts(*given, weight_part, transfer), microbatches, float("inf") if memory is None else memory
        )
        for each in weighed:
            console.print(Text(str(each)), soft_wrap=True)
        it = program_on_its_shape(weighed[0].order)
        rank_of = it.plan.rank_of
        f, b = ([each[rank] / rank_of.count(rank) for rank in rank_of] for each in given)
    else:
        it = drawn_program(name, stages, microbatches)
        f, b = (
            per_stage(option, text, it.plan.num_stages)
            for option, text in (("--forward", forward), ("--backward", backward))
        )
    seconds = zip(f, b, strict=True)
    cluster = Cluster.of([f"rank {rank}" for rank in range(len(it.ranks))], Link(float("inf"), transfer))
    timeline = simulate(it, [Cost(*pair) for pair in seconds], cluster, weight_part=weight_part)
    if program:
        console.print(Text(str(it)), soft_wrap=True)
    console.print(timeline_text(timeline, console.width))
    if svg is not None:
        _write(timeline_svg(timeline), svg)
    if trace is not None:
        _write(trace_text({name: timeline}), trace)
    if csv is not None:
        _write(write_torch_csv(order_of(it)), csv)


def _to_double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _captured(model: str, microbatch: int | None, length: int, dtype: str, meta: bool) -> Captured:
    """A microbatch of a model; ``meta``: without memory for its weights."""
    check_choice("dtype", dtype, ("float32", "bfloat16", "float16"))
    it, args, kwargs = load(model, microbatch or 2, length, meta=meta)
    it = it.to(getattr(torch, dtype))
    call = read_call(it.forward, args, kwargs)
    if microbatch and call.batch and microbatch > call.batch:
        raise InputError(
            f"--microbatch {microbatch} is more than the {call.batch} samples that {model} returns; it must be at most "
            f"{call.batch}"
        )
    return capture(it, call, microbatch)


def _costed(captured: Captured, costs: str, device: torch.device, kind: str) -> CostedGraph:
    """The costs of a capture: measured, counted for a kind of device, or read from a file."""
    how = read_costs(costs)
    if isinstance(how, CostedGraph):
        return reused(how, summarize(captured))
    return profile(captured, summarize(captured), how, device, kind=kind)


def _format(format: str | None, output: Path | None, as_json: bool) -> str | None:
    """The name of the format in which the stage graph is written, if it is."""
    if format is None and output is not None:
        format = SUFFIXES.get(output.suffix)
        if format is None:
            raise InputError(f"the suffix of {output} is not a known format; add --format, one of {', '.join(FORMATS)}")
    if format is not None:
        check_choice("format", format, tuple(FORMATS))
    if as_json and format is not None and output is None:
        raise InputError("--json and --format would both go to the terminal; add --output FILE")
    return format


def _write(text: str, path: Path | None) -> None:
    if path is None:
        sys.stdout.write(text if text.endswith("\n") else f"{text}\n")
        return
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}; choose another path") from error
    Console(stderr=True).print(Text(f"wrote {path}", "dim"), soft_wrap=True)
