"""How ``schedule`` and ``simulate`` print a simulated program: as a drawing, as JSON, and to files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipecompile.ir.program import Program
from pipecompile.ir.timeline import Timeline

if TYPE_CHECKING:
    from pipecompile.cli.weighed_orders import WeighedOrder

SvgFile = Annotated[Path | None, typer.Option("--svg", help="Write the timeline to this SVG file.")]
TraceFile = Annotated[Path | None, typer.Option("--trace", help="Write the timeline to this file, for Perfetto.")]
CsvFile = Annotated[Path | None, typer.Option("--csv", help="Write the order to this file, as torch reads it.")]
ShowProgram = Annotated[bool, typer.Option("--program", help="Also print the instructions of each rank.")]


def show(
    name: str,
    it: Program,
    timeline: Timeline,
    *,
    svg: Path | None,
    trace: Path | None,
    csv: Path | None,
    program: bool,
    as_json: bool,
    weighed: Sequence[WeighedOrder] = (),
) -> None:
    """Prints a simulated program to stdout, after the orders that it was ``weighed`` against, and writes it to files.

    Raises:
        InputError: a file cannot be written.
    """
    from rich.console import Console
    from rich.text import Text

    from pipecompile.cli.output import print_json, write
    from pipecompile.render.timeline import timeline_svg, timeline_text
    from pipecompile.render.trace import trace as trace_text
    from pipecompile.schedule.grid import write_torch_csv
    from pipecompile.schedule.order_program import order_of

    if as_json:
        others = [{"name": e.name, "seconds": e.makespan, "bubble": e.rate, "peak": e.peak} for e in weighed]
        print_json(facts(name, it, timeline) | ({"weighed": others} if others else {}))
    else:
        console = Console()
        for each in weighed:
            console.print(Text(str(each)), soft_wrap=True)
        if program:
            console.print(Text(str(it)), soft_wrap=True)
        console.print(timeline_text(timeline, console.width))
    if svg is not None:
        write(timeline_svg(timeline), svg)
    if trace is not None:
        write(trace_text({name: timeline}), trace)
    if csv is not None:
        write(write_torch_csv(order_of(it)), csv)


def facts(name: str, it: Program, timeline: Timeline) -> dict[str, Any]:
    """A simulated program, ready for JSON: seconds, bytes, and a bubble from 0 to 1.

    ``peak_bytes`` is absent if the costs have no bytes.
    """
    stages = range(it.plan.num_stages)
    peaks = timeline.peak_bytes if any(timeline.peak_bytes) else ()
    return {
        "schedule": name,
        "stages": len(stages),
        "microbatches": len(it.microbatches),
        "seconds": timeline.makespan,
        "bubble": timeline.bubble,
        "ranks": [
            {
                "rank": rank,
                "stages": [stage for stage in stages if it.plan.rank_of[stage] == rank],
                "busy_seconds": timeline.busy(rank),
                **({"peak_bytes": peaks[rank]} if peaks else {}),
                "program": list(map(str, row)),
            }
            for rank, row in enumerate(it.ranks)
        ],
        "spans": [
            {"rank": span.rank, "instruction": str(span.instruction), "start": span.start, "end": span.end}
            for span in timeline.spans
        ],
    }
