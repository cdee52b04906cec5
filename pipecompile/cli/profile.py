"""``pipecompile profile``: the costs of a model, by module or by node."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipecompile.cli.arguments import AsJson, DeviceToMeasure, Dtype, Length, Microbatch, Model
from pipecompile.errors import InputError


def profile(
    model: Model,
    nodes: Annotated[bool, typer.Option("--nodes", help="A row for each operation instead of each module.")] = False,
    depth: Annotated[
        int | None,
        typer.Option(min=0, help="Parts of a path that name a module. Default: those up to the first number."),
    ] = None,
    count: Annotated[
        str | None, typer.Option(metavar="KIND", help="Count the work for a kind of device, such as H100; no run.")
    ] = None,
    microbatch: Microbatch = None,
    length: Length = 128,
    device: DeviceToMeasure = "cpu",
    dtype: Dtype = "float32",
    save: Annotated[Path | None, typer.Option(help="Save the costs to this file, for plan --costs.")] = None,
    as_json: AsJson = False,
) -> None:
    """Profile a model: seconds forward and backward, parameters, and bytes kept for the backward.

    pipecompile profile hf:gpt2
    pipecompile profile hf:llama --count H100 --dtype bfloat16 --depth 4 --json
    """
    if nodes and depth is not None:
        raise InputError("--nodes and --depth exclude each other: a node has no depth; use one of them")

    from rich.console import Console

    from pipecompile.cli import costed_model, module_costs
    from pipecompile.cli.output import print_json, write
    from pipecompile.compiler.devices import parse_devices
    from pipecompile.ir.cluster import Cluster
    from pipecompile.ops.phases import Phases

    (place,) = parse_devices([device])
    kind = "" if count is None else Cluster.from_name(f"1x{count}").devices[0].kind
    how = "measure" if count is None else "count"
    with Phases().recorded():
        captured = costed_model.captured(model, microbatch, length, dtype, meta=how == "count")
        costed = costed_model.costed(captured, how, place, kind)
    rows = module_costs.by_node(costed) if nodes else module_costs.by_module(costed, depth)
    if as_json:
        print_json(module_costs.facts(costed, rows))
    else:
        module_costs.show(costed, rows, Console())
    if save is not None:
        write(costed.to_json(), save)
