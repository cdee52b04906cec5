"""The layout of the picture of a stage graph: coordinates only, drawn by ``svg``.

Each stage is a band, bands are stacked, and the modules of a stage are in its band from left to right. Between two
bands is a gutter with lanes. To the right of all bands is a margin with lanes.

    band 0    [ a ]->[ b ]->[ c ]        an edge within a stage: an arrow to the neighbor,
                 └── skip ──│───────┐       or an arc over the boxes in between
    gutter     ┌────────────┘       │    to the next stage: one lane of the gutter
    band 1    [ d ]->[ e ]          │    past a stage: a lane of the gutter, a lane of the margin,
    gutter        ┌─────────────────┘       and a lane of the gutter above its target
    band 2       [ f ]

Graphviz could lay the graph out too, but is a program that has to be installed apart from Python's packages.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from pipecompile.render.labels import box_text, edge_label, inputs_line, stage_lines
from pipecompile.render.stage_graph import Edge, StageGraph

PAD = 18.0  # around the picture, and inside a band
HEADER = 214.0  # at the left of a band
BOX_HEIGHT = 48.0
BOX_GAP = 22.0
ARC = 9.0  # between arcs over the boxes
LANE = 24.0  # between lanes of a gutter, with room for text
MARGIN_LANE = 16.0
GLYPH = 6.7  # mean width of a character in a box
SMALL_GLYPH = 5.5  # mean width of a small character

Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Rect:
    x: float
    y: float
    width: float
    height: float

    @property
    def right(self) -> float:
        return self.x + self.width

    @property
    def bottom(self) -> float:
        return self.y + self.height

    @property
    def middle(self) -> float:
        return self.y + self.height / 2


@dataclass(frozen=True, slots=True)
class Text:
    at: Point
    text: str


@dataclass(frozen=True, slots=True)
class Wire:
    """The path of an edge, with a corner at each point, and its label if it crosses a cut."""

    edge: int
    points: tuple[Point, ...]
    texts: tuple[Text, ...] = ()


@dataclass(frozen=True, slots=True)
class Layout:
    width: float
    height: float
    bands: tuple[Rect, ...]  # of the stages
    boxes: tuple[Rect, ...]  # of the modules
    inputs: tuple[Rect | None, ...]  # of the stages: their inputs
    wires: tuple[Wire, ...]


@dataclass
class _Lane:
    """A horizontal piece of a wire in a gutter. ``lane`` counts from the top once it is assigned."""

    edge: int
    start: float
    end: float
    text: str = ""
    from_margin: bool = False
    lane: int = field(default=0)

    @property
    def text_at(self) -> float:
        """Above the left end of the lane, or to its right if the lane is too short."""
        left, right = sorted((self.start, self.end))
        return (left if right - left > len(self.text) * SMALL_GLYPH + 16 else right) + 8

    @property
    def extent(self) -> tuple[float, float]:
        """From left to right, with text and some space."""
        text_right = self.text_at + len(self.text) * SMALL_GLYPH
        return min(self.start, self.end), max(self.start, self.end, text_right) + 12


def layout(view: StageGraph) -> Layout:
    """Computes the positions of stages, modules and edges. O(edges^2) in the worst case."""
    across = _Across.of(view)
    arcs = _arcs(view)
    lanes = _Lanes.of(view, across)
    bands = _bands(view, across, arcs, lanes)
    boxes = tuple(
        Rect(x, bands[m.stage].bottom - PAD - BOX_HEIGHT, width, BOX_HEIGHT)
        for (x, width), m in zip(across.boxes, view.modules, strict=True)
    )
    inputs = tuple(
        Rect(PAD + HEADER, bands[s].bottom - PAD - BOX_HEIGHT, width, BOX_HEIGHT) if width else None
        for s, width in enumerate(across.inputs)
    )
    wires = tuple(
        _crossing_wire(view, i, across, lanes, bands, boxes)
        if view.crosses(edge)
        else _inner_wire(edge, i, arcs, boxes)
        for i, edge in enumerate(view.edges)
    )
    return Layout(
        width=lanes.width + PAD, height=bands[-1].bottom + PAD, bands=bands, boxes=boxes, inputs=inputs, wires=wires
    )


@dataclass(frozen=True)
class _Across:
    """The coordinates that depend on x only: boxes as (x, width), ports of crossing edges as (out, in)."""

    boxes: tuple[tuple[float, float], ...]
    inputs: tuple[float, ...]  # widths; 0 if a stage reads only other stages
    ports: dict[int, tuple[float, float]]
    right: float  # of the bands

    @staticmethod
    def of(view: StageGraph) -> _Across:
        inputs = tuple(_text_width(inputs_line(view, s), SMALL_GLYPH) for s in range(len(view.stages)))
        boxes = _boxes_across(view, inputs)
        right = max(x + width for x, width in boxes) + PAD
        return _Across(boxes, inputs, _ports(view, boxes), right)


def _boxes_across(view: StageGraph, inputs: Sequence[float]) -> tuple[tuple[float, float], ...]:
    at = [PAD + HEADER + (width + BOX_GAP if width else 0) for width in inputs]
    boxes = []
    for position, module in enumerate(view.modules):
        width = max(64.0, _text_width(box_text(view, position), GLYPH))
        boxes.append((at[module.stage], width))
        at[module.stage] += width + BOX_GAP
    return tuple(boxes)


def _text_width(text: str, glyph: float) -> float:
    return len(text) * glyph + 22 if text else 0.0


def _ports(view: StageGraph, boxes: Sequence[tuple[float, float]]) -> dict[int, tuple[float, float]]:
    """For each crossing edge, where it leaves and arrives, spread over the width of the boxes, in an order with few
    crossings."""
    leaving: dict[int, list[int]] = {}
    arriving: dict[int, list[int]] = {}
    for i, edge in enumerate(view.edges):
        if view.crosses(edge):
            leaving.setdefault(edge.source, []).append(i)
            arriving.setdefault(edge.target, []).append(i)
    for edges in arriving.values():
        edges.sort(key=lambda i: (-view.modules[view.edges[i].source].stage, -boxes[view.edges[i].source][0]))

    def port(module: int, i: int, order: list[int]) -> float:
        x, width = boxes[module]
        return x + width * (order.index(i) + 1) / (len(order) + 1)

    crossing = {i: view.edges[i] for edges in leaving.values() for i in edges}
    return {
        i: (port(e.source, i, leaving[e.source]), port(e.target, i, arriving[e.target])) for i, e in crossing.items()
    }


def _arcs(view: StageGraph) -> dict[int, int]:
    """The level of each edge within a stage that passes over other boxes, from 1; inner edges are lower."""
    inner = [i for i, e in enumerate(view.edges) if not view.crosses(e) and e.target > e.source + 1]
    inner.sort(key=lambda i: view.edges[i].target - view.edges[i].source)
    spans = [(float(view.edges[i].source), float(view.edges[i].target)) for i in inner]
    return {i: level + 1 for i, level in zip(inner, _levels(spans), strict=True)}


def _levels(spans: Iterable[tuple[float, float]]) -> list[int]:
    """For each span, the first level on which no earlier span overlaps it."""
    levels: list[list[tuple[float, float]]] = []
    result = []
    for left, right in spans:
        free = (n for n, level in enumerate(levels) if all(right <= a or left >= b for a, b in level))
        level = next(free, len(levels))
        levels.extend([[]] if level == len(levels) else [])
        levels[level].append((left, right))
        result.append(level)
    return result


@dataclass(frozen=True)
class _Lanes:
    """The lanes of the gutters and of the margin."""

    gutters: tuple[tuple[_Lane, ...], ...]  # below each band
    margin: dict[int, float]  # edge -> x
    width: float

    @staticmethod
    def of(view: StageGraph, across: _Across) -> _Lanes:
        margin = _margin(view, across)
        gutters: list[list[_Lane]] = [[] for _ in view.stages]
        for i, (out, into) in across.ports.items():
            source, target = (view.modules[end].stage for end in (view.edges[i].source, view.edges[i].target))
            label = edge_label(view, view.edges[i])
            if i in margin:
                gutters[source].append(_Lane(i, out, margin[i], label))
                gutters[target - 1].append(_Lane(i, margin[i], into, f"from stage {source}", from_margin=True))
            else:
                gutters[source].append(_Lane(i, out, into, label))
        for gutter in gutters:
            gutter.sort(key=_lane_order)
            for lane, level in zip(gutter, _levels(lane.extent for lane in gutter), strict=True):
                lane.lane = level
        texts = (lane.extent[1] for gutter in gutters for lane in gutter)
        return _Lanes(tuple(map(tuple, gutters)), margin, max([across.right, *margin.values(), *texts]))

    def height(self, gutter: int) -> float:
        return 22.0 + LANE * (1 + max((lane.lane for lane in self.gutters[gutter]), default=-1))

    def find(self, gutter: int, edge: int) -> _Lane:
        return next(lane for lane in self.gutters[gutter] if lane.edge == edge)


def _lane_order(lane: _Lane) -> tuple[int, float]:
    """Sort key from top to bottom: lanes to the margin, then to the next stage, each rightmost first, so that wires
    cross others away from their labels; then lanes from the margin."""
    if lane.from_margin:
        return 2, lane.end
    return (0 if lane.end > lane.start else 1), -lane.start


def _margin(view: StageGraph, across: _Across) -> dict[int, float]:
    spans = {
        i: (float(source), float(target))
        for i in across.ports
        for source, target in [[view.modules[end].stage for end in (view.edges[i].source, view.edges[i].target)]]
        if target > source + 1
    }
    order = sorted(spans, key=lambda i: spans[i][1] - spans[i][0])
    levels = _levels(spans[i] for i in order)
    return {i: across.right + 22 + MARGIN_LANE * level for i, level in zip(order, levels, strict=True)}


def _bands(view: StageGraph, across: _Across, arcs: dict[int, int], lanes: _Lanes) -> tuple[Rect, ...]:
    bands = []
    y = PAD
    for stage in range(len(view.stages)):
        levels = (level for i, level in arcs.items() if view.modules[view.edges[i].source].stage == stage)
        over = ARC * max(levels, default=0)
        height = max(2 * PAD + BOX_HEIGHT + over, 56.0 + 16 * len(stage_lines(view, stage)))
        bands.append(Rect(PAD, y, across.right - PAD, height))
        y += height + lanes.height(stage)
    return tuple(bands)


def _inner_wire(edge: Edge, i: int, arcs: dict[int, int], boxes: Sequence[Rect]) -> Wire:
    source, target = boxes[edge.source], boxes[edge.target]
    if i not in arcs:
        return Wire(i, ((source.right, source.middle), (target.x, target.middle)))
    top = source.y - ARC * arcs[i] - 2
    out, into = source.x + source.width * 0.7, target.x + target.width * 0.3
    return Wire(i, ((out, source.y), (out, top), (into, top), (into, target.y)))


def _crossing_wire(
    view: StageGraph, i: int, across: _Across, lanes: _Lanes, bands: Sequence[Rect], boxes: Sequence[Rect]
) -> Wire:
    edge = view.edges[i]
    source, target = view.modules[edge.source].stage, view.modules[edge.target].stage
    out, into = across.ports[i]
    gutters = (source,) if i not in lanes.margin else (source, target - 1)
    points: list[Point] = [(out, boxes[edge.source].bottom)]
    texts = []
    for gutter in gutters:
        lane = lanes.find(gutter, i)
        y = bands[gutter].bottom + LANE * (lane.lane + 1)
        points += [(lane.start, y), (lane.end, y)]
        texts.append(Text((lane.text_at, y - 6), lane.text))
    return Wire(i, (*points, (into, boxes[edge.target].y)), tuple(texts))
