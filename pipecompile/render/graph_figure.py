"""The stage graph as a figure: a band per stage, a box per module, a line per edge.

    band 0    [ a ] [ b ] [ c ]       modules in the order of execution, the redder the longer they take
                └──────────┘  ╲       an edge within a stage that passes a box: below the boxes
    band 1    [ d ] [ e ]      │      to the next stage: a curve
                   ┌───────────┘      past a stage: along the right side
    band 2    [ f ] [ g ]

Names and bytes of an edge are shown on hover, so that no label overlaps another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bokeh.models import ColumnDataSource, Range1d

from pipecompile.ir.units import bytes_text, names_text, plural, seconds_text
from pipecompile.render.figures import fitted, frame, hover
from pipecompile.render.labels import inputs_line, module_path, node_line
from pipecompile.render.page import Page
from pipecompile.render.stage_graph import Edge, StageGraph

BAND = (0.06, 0.72)  # top and bottom of a band, in stages
BOX = (0.14, 0.58)
GAP = 0.014  # between boxes, of the width of a band
WIDEST = 0.3
INPUTS = 0.07  # the width of the box of inputs
MARGIN = 0.018  # between lines along the right side
COLD, HOT = (0x5B, 0x6B, 0x7D), (0xB4, 0x40, 0x0F)  # white text is readable on both, and in between
COLORS = ("#8794a1", "#d9622b", "#8f6bd1")  # edges within a stage, to the next one, and past one
START = "#7d8995"  # of the box of inputs, with text on either background
STEPS = 16  # of a curve
LONGEST = 16  # characters of the name of a device
VALUES = 6  # of an edge that a tooltip lists

Points = list[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Box:
    left: float
    right: float
    stage: int

    @property
    def middle(self) -> float:
        return (self.left + self.right) / 2


def graph_figure(page: Page) -> Any:
    """The figure of all stages."""
    view = page.view
    boxes, starts = boxes_of(view)
    paths = paths_of(view, boxes)
    right = max([1.0 + GAP, *(x for path in paths for x, _ in path)])
    count = len(view.stages)
    height = max(30, min(96, 2400 // count))
    y_range = Range1d(start=count - 0.2, end=-0.02)
    plot = frame(height * count + 70, Range1d(start=-GAP, end=right + GAP), y_range, both=True)
    plot.xaxis.visible = False
    plot.yaxis.ticker = [stage + sum(BOX) / 2 for stage in range(count)]
    plot.yaxis.major_label_overrides = {
        at: _name(page, stage, height) for stage, at in enumerate(plot.yaxis[0].ticker.ticks)
    }
    _bands(plot, view)
    _edges(plot, view, paths)
    _starts(plot, view, starts)
    _boxes(plot, view, boxes)
    return plot


def boxes_of(view: StageGraph) -> tuple[tuple[Box, ...], tuple[Box | None, ...]]:
    """The boxes of the modules, and for each stage that of its inputs, if any."""
    modules: dict[int, Box] = {}
    starts: list[Box | None] = []
    for stage, it in enumerate(view.stages):
        first = int(bool(it.inputs or it.rematerialized))
        count, start = len(it.modules), first * (INPUTS + GAP)
        width = min(WIDEST, (1 - start - GAP * (count - 1)) / max(1, count))
        places = [start + i * (width + GAP) for i in range(count)]
        starts.append(Box(0.0, INPUTS, stage) if first else None)
        modules.update(zip(it.modules, (Box(left, left + width, stage) for left in places), strict=True))
    return tuple(modules[i] for i in range(len(view.modules))), tuple(starts)


def paths_of(view: StageGraph, boxes: Sequence[Box]) -> list[Points]:
    """The line of each edge, from box to box."""
    past = [i for i, edge in enumerate(view.edges) if _distance(view, edge) > 1]
    lanes = {edge: lane for lane, edge in enumerate(sorted(past, key=lambda i: _distance(view, view.edges[i])))}
    return [
        _path(boxes[edge.source], boxes[edge.target], edge.target - edge.source == 1, lanes.get(i))
        for i, edge in enumerate(view.edges)
    ]


def _distance(view: StageGraph, edge: Edge) -> int:
    return view.modules[edge.target].stage - view.modules[edge.source].stage


def _path(source: Box, target: Box, neighbors: bool, lane: int | None) -> Points:
    top, bottom = BOX
    start, end = (source.middle, source.stage + bottom), (target.middle, target.stage + top)
    if lane is not None:
        side, shift = 1 + GAP + MARGIN * (lane + 1), 0.02 * (lane % 5)
        out, into = source.stage + 0.8 + shift, target.stage - 0.14 + shift
        return [start, (start[0], out), (side, out), (side, into), (end[0], into), end]
    if source.stage != target.stage:
        return _curve(start, end)
    if neighbors:
        level = source.stage + sum(BOX) / 2
        return [(source.right, level), (target.left, level)]
    return _curve(start, (target.middle, target.stage + bottom), dip=0.11)


def _curve(start: tuple[float, float], end: tuple[float, float], dip: float = 0.0) -> Points:
    """A cubic that leaves and arrives upright; with ``dip`` it hangs below two points of one height."""
    (x0, y0), (x1, y1) = start, end
    y = (y0 + y1) / 2 + dip * 4 / 3
    points = []
    for step in range(STEPS + 1):
        t = step / STEPS
        a, b, c, d = (1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t * t * (1 - t), t**3
        points.append(((a + b) * x0 + (c + d) * x1, a * y0 + (b + c) * y + d * y1))
    return points


def _name(page: Page, stage: int, height: int) -> str:
    cost = page.view.stages[stage].cost
    rank = page.view.stages[stage].rank
    device = page.device(rank) or f"rank {rank}"
    lines = [
        f"stage {stage}",
        device if len(device) <= LONGEST else f"{device[: LONGEST - 1]}…",
        seconds_text(cost.seconds),
    ]
    return "\n".join(lines[: max(1, min(3, height // 18))])


def _bands(plot: Any, view: StageGraph) -> None:
    stages = range(len(view.stages))
    top, bottom = ([stage + end for stage in stages] for end in BAND)
    plot.quad(left=-GAP, right=1 + GAP, top=top, bottom=bottom, fill_color=COLORS[0], fill_alpha=0.14, line_color=None)


def _edges(plot: Any, view: StageGraph, paths: list[Points]) -> None:
    for kind, color in enumerate(COLORS):
        mine = [i for i, edge in enumerate(view.edges) if min(2, _distance(view, edge)) == kind]
        ends = [[view.modules[view.edges[i].source], view.modules[view.edges[i].target]] for i in mine]
        data = {
            "xs": [[x for x, _ in paths[i]] for i in mine],
            "ys": [[y for _, y in paths[i]] for i in mine],
            "ends": [" → ".join(f"{each.label} (stage {each.stage})" for each in pair) for pair in ends],
            "values": [_values(view, view.edges[i]) for i in mine],
            "bytes": [f"{bytes_text(view.edges[i].nbytes)} per microbatch" for i in mine],
        }
        lines = plot.multi_line(
            xs="xs", ys="ys", source=ColumnDataSource(data), line_color=color, line_width=1.3 if kind == 0 else 2,
            hover_line_color=color, hover_line_width=4,
        )  # fmt: skip
        hover(plot, lines, ends="", bytes="", values="")


def _values(view: StageGraph, edge: Edge) -> str:
    more = len(edge.values) - VALUES
    listed = "; ".join(node_line(view, value) for value in edge.values[:VALUES])
    return f"{listed}; and {more} more" if more > 0 else listed


def _starts(plot: Any, view: StageGraph, starts: Sequence[Box | None]) -> None:
    drawn = [(stage, box) for stage, box in enumerate(starts) if box is not None]
    data = {
        "left": [box.left for _, box in drawn],
        "right": [box.right for _, box in drawn],
        "top": [stage + BOX[0] for stage, _ in drawn],
        "bottom": [stage + BOX[1] for stage, _ in drawn],
        "words": [f"{inputs_line(view, stage)}: read or computed by stage {stage} itself" for stage, _ in drawn],
    }
    quads = plot.quad(
        left="left", right="right", top="top", bottom="bottom", source=ColumnDataSource(data),
        fill_color=None, line_color=START, line_dash="dashed", hover_line_color=COLORS[0], hover_fill_color=None,
    )  # fmt: skip
    hover(plot, quads, words="")
    labels: dict[str, list[Any]] = {
        "x": [box.middle for _, box in drawn],
        "y": [stage + sum(BOX) / 2 for stage, _ in drawn],
        "full": ["in"] * len(drawn),
        "width": [INPUTS] * len(drawn),
    }
    fitted(plot, labels, elide=False, color=START)


def _boxes(plot: Any, view: StageGraph, boxes: Sequence[Box]) -> None:
    modules = view.modules
    times = [seconds_text(module.cost.seconds) for module in modules]
    most = max((module.cost.seconds for module in modules), default=0.0) or 1.0
    data = {
        "left": [box.left for box in boxes],
        "right": [box.right for box in boxes],
        "top": [box.stage + BOX[0] for box in boxes],
        "bottom": [box.stage + BOX[1] for box in boxes],
        "color": [_shade(module.cost.seconds / most) for module in modules],
        "path": [module_path(view, i) for i in range(len(modules))],
        "forward": [seconds_text(module.cost.forward) for module in modules],
        "backward": [seconds_text(module.cost.backward) for module in modules],
        "weights": [bytes_text(module.cost.parameter_bytes) for module in modules],
        "saved": [f"{bytes_text(module.cost.saved_bytes)} per microbatch" for module in modules],
        "nodes": [_nodes(view, module.nodes) for module in modules],
    }
    quads = plot.quad(
        left="left", right="right", top="top", bottom="bottom", source=ColumnDataSource(data),
        fill_color="color", line_color=None, hover_fill_color="color", hover_line_color="#ffffff",
    )  # fmt: skip
    hover(plot, quads, path="", forward="forward", backward="backward", weights="weights", saved="saved", nodes="")
    labels: dict[str, list[Any]] = {
        "x": [box.middle for box in boxes],
        "y": [box.stage + sum(BOX) / 2 for box in boxes],
        "full": [f"{module.label}\n{time}" for module, time in zip(modules, times, strict=True)],
        "width": [box.right - box.left for box in boxes],
    }
    fitted(plot, labels, elide=True)


def _nodes(view: StageGraph, nodes: Sequence[int]) -> str:
    sources = list(dict.fromkeys(view.node(node).source for node in nodes))
    ops = list(dict.fromkeys(view.node(node).op for node in nodes))
    return f"{plural(len(nodes), 'node')}: {names_text(ops, 6)}; {names_text([s for s in sources if s], 2)}"


def _shade(share: float) -> str:
    mixed = (round(cold + (hot - cold) * share**0.5) for cold, hot in zip(COLD, HOT, strict=True))
    return "#" + "".join(f"{part:02x}" for part in mixed)
