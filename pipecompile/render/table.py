"""The stage table: what each stage holds, costs and passes on, for the terminal."""

from __future__ import annotations

from math import prod

from rich import box
from rich.table import Table
from rich.text import Text

from pipecompile.graph import Cost
from pipecompile.render.labels import modules_line
from pipecompile.render.stage_graph import Stage, StageGraph
from pipecompile.render.units import bytes_text, count_text, seconds_text

NUMBERS = ("params", "forward", "backward", "weights", "saved", "in", "out")


def table(view: StageGraph) -> Table:
    """A row for each stage and one for the whole model; ``saved`` is kept from forward to backward by a microbatch."""
    it = Table(box=box.SIMPLE_HEAD, show_footer=True, pad_edge=False, caption_justify="left", caption=_caption(view))
    it.add_column("stage", justify="right", footer="all")
    it.add_column("rank", justify="right")
    it.add_column("modules", ratio=1)
    for name, total in zip(NUMBERS, totals(view), strict=True):
        it.add_column(name, justify="right", no_wrap=True, footer=total)
    for index, stage in enumerate(view.stages):
        it.add_row(str(index), str(stage.rank), Text(modules_line(view, index)), *stage_numbers(stage))
    return it


def stage_numbers(stage: Stage) -> tuple[str, ...]:
    """The columns ``NUMBERS`` of a stage."""
    return _numbers(stage.num_parameters, stage.cost, stage.bytes_in, stage.bytes_out)


def _numbers(num_parameters: int, cost: Cost, bytes_in: int, bytes_out: int) -> tuple[str, ...]:
    times = seconds_text(cost.forward), seconds_text(cost.backward)
    sizes = map(bytes_text, (cost.parameter_bytes, cost.saved_bytes, bytes_in, bytes_out))
    return (count_text(num_parameters), *times, *sizes)


def totals(view: StageGraph) -> tuple[str, ...]:
    """The parameters of the model, and sums over the stages: the memory of a tied weight is there in each of them."""
    num_parameters = sum(prod(parameter.spec.shape) for parameter in view.costed.graph.parameters)
    total = sum((stage.cost for stage in view.stages), Cost())
    crossing = sum(channel.nbytes for channel in view.cuts)
    return _numbers(num_parameters, total, crossing, crossing)


def _caption(view: StageGraph) -> Text:
    lines = [f"one microbatch, {view.costed.origin}; busiest stage / mean: {view.balance:.2f}"]
    for tied in view.plan.tied:
        lines.append(f"tied: {tied.parameter} in stages {', '.join(map(str, tied.stages))}")
    return Text("\n".join(lines))
