"""``pipecompile check``: compares a split model with the unsplit one."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipecompile.cli.arguments import AsJson, Length, Microbatches, Model, Stages, check_choice, one_of
from pipecompile.cli.checks import placement_of, ranks_for
from pipecompile.cli.dataclass_options import takes
from pipecompile.ir.batching_options import Batching
from pipecompile.ir.plan_options import PlanOptions
from pipecompile.schedule import AUTO, SYNCHRONOUS

if TYPE_CHECKING:
    from pipecompile.verify.results import Verification


@takes("plan", PlanOptions)
@takes("batching", Batching)
def check(
    model: Model,
    stages: Stages = 2,
    microbatches: Microbatches = 4,
    schedule: Annotated[
        str,
        typer.Option(
            "--schedule",
            "-s",
            help=f"One of {', '.join(SYNCHRONOUS)}, {AUTO}.",
            autocompletion=one_of((*SYNCHRONOUS, AUTO)),
        ),
    ] = "1f1b",
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
    as_json: AsJson = False,
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

    from rich.console import Console
    from torch import Tensor

    from pipecompile.api import compile
    from pipecompile.cli.model_spec import load
    from pipecompile.cli.output import print_json, working
    from pipecompile.compiler.devices import parse_devices
    from pipecompile.ops.phases import Phases, phase
    from pipecompile.ops.torch_internals import tree_map_only

    def moved(tensor: Tensor) -> Tensor:
        wide = tensor.double() if double and tensor.is_floating_point() else tensor
        return wide.to(places[0])

    places = parse_devices([device] * (sum(plan.counts) or ranks))
    with working(f"loading {model}"):
        it, args, kwargs = load(model, batch or 2 * microbatches, length)
        it = (it.double() if double else it).to(places[0])
    args, kwargs = tree_map_only(Tensor, moved, (args, kwargs))
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
    with Phases().recorded(), phase("verify"):
        result = pipe.pipeline.verify(*args, **kwargs)
    if as_json:
        print_json(facts(result))
    else:
        Console().print(result)
    if not result.exact:
        raise typer.Exit(1)


def facts(result: Verification) -> dict[str, Any]:
    """A comparison, ready for JSON. Differences are absolute; null: the two tensors cannot be subtracted."""
    return {
        "exact": result.exact,
        "bit_equal": result.bit_equal,
        "checks": [
            {
                "mode": it.mode,
                "inputs": it.inputs,
                "microbatches": it.microbatches,
                "against": it.against,
                "verdict": it.verdict,
                "failure": it.failure,
                "left_out": it.left_out,
                "differences": [{**asdict(each), "verdict": each.verdict} for each in it.differences],
            }
            for it in result.checks
        ],
        "notes": {topic: list(lines) for topic, lines in result.notes.items()},
    }
