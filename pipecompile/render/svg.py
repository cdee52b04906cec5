"""The stage graph as an SVG picture, drawn without graphviz, in the reader's light or dark color scheme.

Boxes, wires and stages have ``data-stage``, ``data-module`` and ``data-edge`` attributes for the HTML page.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pipecompile.ir.units import seconds_text
from pipecompile.render.escape import xml
from pipecompile.render.labels import (
    box_text,
    edge_lines,
    inputs_line,
    module_lines,
    node_line,
    stage_lines,
    stage_name,
)
from pipecompile.render.layout import HEADER, PAD, Layout, Point, Rect, Wire, layout
from pipecompile.render.stage_graph import StageGraph

RADIUS = 7.0  # of the corners of wires

STYLE = """
.pc { font: 12px Helvetica, Arial, "Liberation Sans", sans-serif; }
.pc text { fill: #1f2933; }
.pc .page { fill: #ffffff; }
.pc .band { fill: #f4f6f8; stroke: #d5dbe1; }
.pc .name { font-size: 14px; font-weight: 600; }
.pc .fact, .pc .time, .pc .start text { font-size: 10.5px; fill: #5b6875; }
.pc .box rect { fill: #ffffff; stroke: #aab4bf; }
.pc .box .heat { fill: #2f7ed8; stroke: none; }
.pc .start rect { fill: none; stroke: #aab4bf; stroke-dasharray: 3 3; }
.pc .load { fill: #dfe5ea; }
.pc .loaded { fill: #2f7ed8; }
.pc .wire { fill: none; stroke: #8794a1; stroke-width: 1.2; }
.pc .cut .wire { stroke: #d9622b; stroke-width: 1.8; }
.pc .flow-tip { fill: #8794a1; }
.pc .cut-tip { fill: #d9622b; }
.pc .cut text { font-size: 10.5px; fill: #a8441a; paint-order: stroke; stroke: #ffffff; stroke-width: 4px; }
.pc .skip .wire { stroke: #7d55c7; }
.pc .skip-tip { fill: #7d55c7; }
.pc .skip text { fill: #5f3aa5; }
@media (prefers-color-scheme: dark) {
  .pc text { fill: #e4e9ee; }
  .pc .page { fill: #14181c; }
  .pc .band { fill: #1c2228; stroke: #333c45; }
  .pc .fact, .pc .time, .pc .start text { fill: #9aa7b4; }
  .pc .box rect { fill: #262e36; stroke: #56636f; }
  .pc .start rect { fill: none; stroke: #56636f; }
  .pc .load { fill: #333c45; }
  .pc .wire { stroke: #75828f; }
  .pc .cut .wire { stroke: #f0824c; }
  .pc .flow-tip { fill: #75828f; }
  .pc .cut-tip { fill: #f0824c; }
  .pc .cut text { fill: #f6a57c; stroke: #14181c; }
  .pc .skip .wire { stroke: #a98be6; }
  .pc .skip-tip { fill: #a98be6; }
  .pc .skip text { fill: #c4b0f0; }
}
"""


def svg(view: StageGraph) -> str:
    """A picture of the stages, their modules and the values that cross cuts."""
    places = layout(view)
    body = [*_stages(view, places), *_wires(view, places), *_modules(view, places)]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" class="pc" viewBox="0 0 {places.width:.0f} {places.height:.0f}"'
            f' width="{places.width:.0f}" height="{places.height:.0f}" role="img">',
            f"<title>{len(view.stages)} stages</title>",
            f"<style>{STYLE}</style>",
            f"<defs>{_tip('flow-tip')}{_tip('cut-tip')}{_tip('skip-tip')}</defs>",
            '<rect class="page" width="100%" height="100%"/>',
            *body,
            "</svg>",
            "",
        ]
    )


def _tip(name: str) -> str:
    shape = f'<path class="{name}" d="M0 0L8 4L0 8z"/>'
    size = 'markerUnits="userSpaceOnUse" markerWidth="8" markerHeight="8" refX="7" refY="4" orient="auto"'
    return f'<marker id="{name}" viewBox="0 0 8 8" {size}>{shape}</marker>'


def _stages(view: StageGraph, places: Layout) -> Iterator[str]:
    for stage, band in enumerate(places.bands):
        facts = stage_lines(view, stage)
        x = band.x + PAD
        yield f'<g class="stage" data-stage="{stage}">{_title((stage_name(view, stage), *facts))}'
        yield _rect(band, 'class="band" rx="10"')
        yield _text((x, band.y + 28), stage_name(view, stage), "name")
        for line, fact in enumerate(facts):
            yield _text((x, band.y + 62 + 15 * line), _elided(fact, 34), "fact")
        yield from _load(view, stage, x, band.y + 38)
        yield "</g>"
        if rect := places.inputs[stage]:
            yield from _start(view, stage, rect)


def _load(view: StageGraph, stage: int, x: float, y: float) -> Iterator[str]:
    """The load of a stage relative to the bottleneck."""
    width = HEADER - 3 * PAD
    yield _rect(Rect(x, y, width, 5), 'class="load" rx="2.5"')
    yield _rect(Rect(x, y, width * view.share(view.stages[stage].cost), 5), 'class="loaded" rx="2.5"')


def _start(view: StageGraph, stage: int, rect: Rect) -> Iterator[str]:
    it = view.stages[stage]
    lines = [node_line(view, node) for node in (*it.inputs, *it.rematerialized)]
    yield f'<g class="start" data-stage="{stage}">{_title(("inputs and rematerialized nodes", *lines))}'
    yield _rect(rect, 'rx="6"')
    yield _text((rect.x + rect.width / 2, rect.middle + 4), inputs_line(view, stage), anchor="middle")
    yield "</g>"


def _modules(view: StageGraph, places: Layout) -> Iterator[str]:
    for position, (module, rect) in enumerate(zip(view.modules, places.boxes, strict=True)):
        middle = rect.x + rect.width / 2
        heat = Rect(rect.x + 6, rect.bottom - 6, (rect.width - 12) * view.share(module.cost), 3)
        title = _title(module_lines(view, position))
        yield f'<g class="box" data-module="{position}" data-stage="{module.stage}">{title}'
        yield _rect(rect, 'rx="6"')
        yield _text((middle, rect.y + 19), box_text(view, position), anchor="middle")
        yield _text((middle, rect.y + 34), seconds_text(module.cost.seconds), "time", "middle")
        yield _rect(heat, 'class="heat" rx="1.5"')
        yield "</g>"


def _wires(view: StageGraph, places: Layout) -> Iterator[str]:
    """Wires within stages, then wires across cuts, then labels on top."""
    wires = sorted(places.wires, key=lambda wire: view.crosses(view.edges[wire.edge]))
    for wire in wires:
        kind, tip = _kind(view, wire)
        edge = view.edges[wire.edge]
        ends = f'data-edge="{wire.edge}" data-source="{edge.source}" data-target="{edge.target}"'
        yield f'<g class="{kind}" {ends}>{_title(edge_lines(view, edge))}'
        yield f'<path class="wire" d="{_way(wire)}" marker-end="url(#{tip})"/></g>'
    for wire in wires:
        if wire.texts:
            title = _title(edge_lines(view, view.edges[wire.edge]))
            texts = "".join(_text(text.at, text.text) for text in wire.texts)
            yield f'<g class="{_kind(view, wire)[0]}" data-edge="{wire.edge}">{title}{texts}</g>'


def _kind(view: StageGraph, wire: Wire) -> tuple[str, str]:
    """The CSS classes of a wire and its tip."""
    edge = view.edges[wire.edge]
    distance = view.modules[edge.target].stage - view.modules[edge.source].stage
    return [("flow", "flow-tip"), ("cut", "cut-tip"), ("cut skip", "skip-tip")][min(distance, 2)]


def _way(wire: Wire) -> str:
    """The path through the points of a wire, with rounded corners."""
    points = wire.points
    parts = [f"M{_xy(points[0])}"]
    for before, corner, after in zip(points, points[1:], points[2:], strict=False):
        parts.append(f"L{_xy(_towards(corner, before))}Q{_xy(corner)} {_xy(_towards(corner, after))}")
    return "".join([*parts, f"L{_xy(points[-1])}"])


def _towards(corner: Point, other: Point) -> Point:
    """A point near a corner, towards another point."""
    dx, dy = other[0] - corner[0], other[1] - corner[1]
    length = abs(dx) + abs(dy)
    part = min(RADIUS, length / 2) / length if length else 0.0
    return corner[0] + dx * part, corner[1] + dy * part


def _xy(point: Point) -> str:
    return f"{point[0]:.1f} {point[1]:.1f}"


def _rect(rect: Rect, attributes: str) -> str:
    place = f'x="{rect.x:.1f}" y="{rect.y:.1f}" width="{rect.width:.1f}" height="{rect.height:.1f}"'
    return f"<rect {place} {attributes}/>"


def _text(at: Point, text: str, kind: str = "", anchor: str = "start") -> str:
    return f'<text x="{at[0]:.1f}" y="{at[1]:.1f}" class="{kind}" text-anchor="{anchor}">{xml(text)}</text>'


def _title(lines: Sequence[str]) -> str:
    return f"<title>{xml(chr(10).join(lines))}</title>"


def _elided(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"
