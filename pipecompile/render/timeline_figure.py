"""A timeline as a figure: a row per rank, a cell per computation, a line per transfer."""

from __future__ import annotations

from typing import Any

from bokeh.models import ColumnDataSource

from pipecompile.ir.timeline import Timeline
from pipecompile.render.cells import COPY_KINDS, Cell, busy_text, cells, copies, wires
from pipecompile.render.figures import fitted, hover
from pipecompile.render.time_axis import TimeAxis, rows

HALF = 0.36  # of the height of a cell, in rows
BAR = 0.06  # of the height of a copy, in rows
FAINT = "#8794a1"


def timeline_figure(timeline: Timeline, axis: TimeAxis) -> Any:
    """The figure; hover shows an instruction and its times."""
    ranks = range(timeline.num_ranks)
    plot = rows(axis, [(f"rank {rank}", f"{busy_text(timeline, rank)} busy") for rank in ranks])
    end = timeline.makespan * axis.factor
    plot.hbar(y=[*ranks], left=0, right=end, height=2 * HALF, fill_color=FAINT, fill_alpha=0.16, line_color=None)
    _transfers(plot, timeline, axis)
    _cells(plot, cells(timeline), axis)
    _copies(plot, copies(timeline), axis)
    return plot


def _copies(plot: Any, drawn: list[Cell], axis: TimeAxis) -> None:
    """A bar below the row of the rank, of each direction at its own height."""
    if not drawn:
        return
    tops = [cell.rank + HALF + BAR * [*COPY_KINDS].index(cell.kind) for cell in drawn]
    data = {
        "left": [cell.start * axis.factor for cell in drawn],
        "right": [cell.end * axis.factor for cell in drawn],
        "top": tops,
        "bottom": [top + 0.8 * BAR for top in tops],
        "shade": [cell.shade for cell in drawn],
        "words": [cell.words for cell in drawn],
    }
    quads = plot.quad(
        left="left", right="right", top="top", bottom="bottom", source=ColumnDataSource(data),
        fill_color="shade", line_color=None,
    )  # fmt: skip
    hover(plot, quads, words="")


def _cells(plot: Any, drawn: list[Cell], axis: TimeAxis) -> None:
    left, right = [cell.start * axis.factor for cell in drawn], [cell.end * axis.factor for cell in drawn]
    ranks = [cell.rank for cell in drawn]
    data = {
        "left": left,
        "right": right,
        "top": [rank - HALF for rank in ranks],
        "bottom": [rank + HALF for rank in ranks],
        "shade": [cell.shade for cell in drawn],
        "words": [cell.words for cell in drawn],
    }
    quads = plot.quad(
        left="left", right="right", top="top", bottom="bottom", source=ColumnDataSource(data),
        fill_color="shade", line_color=None, hover_fill_color="shade", hover_line_color="#ffffff",
    )  # fmt: skip
    hover(plot, quads, words="")
    spans = list(zip(left, right, strict=True))
    labels: dict[str, list[Any]] = {
        "x": [(start + end) / 2 for start, end in spans],
        "y": [*ranks],
        "full": [cell.label for cell in drawn],
        "width": [end - start for start, end in spans],
    }
    fitted(plot, labels, elide=False)


def _transfers(plot: Any, timeline: Timeline, axis: TimeAxis) -> None:
    drawn = list(wires(timeline))
    ways = [1 if wire.target > wire.source else -1 for wire in drawn]
    data = {
        "x0": [wire.start * axis.factor for wire in drawn],
        "x1": [wire.end * axis.factor for wire in drawn],
        "y0": [wire.source + HALF * way for wire, way in zip(drawn, ways, strict=True)],
        "y1": [wire.target - HALF * way for wire, way in zip(drawn, ways, strict=True)],
        "words": [wire.words for wire in drawn],
    }
    lines = plot.segment(x0="x0", x1="x1", y0="y0", y1="y1", line_color=FAINT, source=ColumnDataSource(data))
    hover(plot, lines, words="")
