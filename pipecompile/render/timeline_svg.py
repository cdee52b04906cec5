"""A timeline as a self-contained SVG picture in the reader's color scheme, with details on hover."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pipecompile.ir.timeline import Timeline
from pipecompile.ir.units import seconds_text
from pipecompile.render.cells import (
    COPY_KINDS,
    SHADES,
    Cell,
    Wire,
    busy_text,
    cells,
    copies,
    drawn_kinds,
    peak_text,
    summary,
    ticks,
    wires,
    word_of,
)

ROW, GAP, LEFT, RIGHT, TOP, BOTTOM = 30, 14, 70, 160, 52, 30  # pixels
BAR = 5  # pixels

STYLE = """
.pt { font: 12px system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
.pt text { fill: #1f2933; }
.pt .page { fill: #ffffff; }
.pt .idle { fill: #eef1f4; }
.pt .summary { font-size: 14px; font-weight: 600; }
.pt .fact { font-size: 11px; fill: #5b6875; }
.pt .grid { stroke: #d5dbe1; }
.pt .wire { stroke: #8794a1; stroke-width: 1.2; }
.pt .cell text { font-size: 11px; font-weight: 600; fill: #ffffff; text-anchor: middle; pointer-events: none; }
@media (prefers-color-scheme: dark) {
  .pt text { fill: #e4e9ee; }
  .pt .page { fill: #14181c; }
  .pt .idle { fill: #232a31; }
  .pt .fact { fill: #9aa7b4; }
  .pt .grid { stroke: #333c45; }
  .pt .wire { stroke: #75828f; }
}
"""


@dataclass(frozen=True, slots=True)
class _Scale:
    """Converts times and ranks to coordinates."""

    makespan: float  # seconds
    inner: int  # pixels of the time axis
    num_ranks: int

    def x(self, seconds: float) -> float:
        return LEFT + seconds / (self.makespan or 1.0) * self.inner

    def y(self, rank: int) -> int:
        return TOP + rank * (ROW + GAP)

    @property
    def width(self) -> int:
        return LEFT + self.inner + RIGHT

    @property
    def bottom(self) -> int:
        return self.y(self.num_ranks)


def timeline_svg(timeline: Timeline) -> str:
    """The timeline as SVG. Cells and transfers show their instruction and time on hover."""
    scale = _Scale(timeline.makespan, _inner(timeline), timeline.num_ranks)
    width, height, words = scale.width, scale.bottom + BOTTOM, summary(timeline)
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" class="pt" viewBox="0 0 {width} {height}" width="{width}" '
            f'height="{height}" role="img">',
            f"<title>{words}</title>",
            f"<style>{STYLE}</style>",
            '<rect class="page" width="100%" height="100%"/>',
            *_picture(timeline, scale, words),
            "</svg>",
            "",
        ]
    )


def _picture(timeline: Timeline, scale: _Scale, words: str) -> Iterator[str]:
    yield _text(LEFT, 24, words, "summary")
    yield from _legend(drawn_kinds(timeline), scale)
    yield from _rows(timeline, scale)
    yield from _axis(scale)
    yield from (_wire(wire, scale) for wire in wires(timeline))
    yield from (_cell(cell, scale) for cell in cells(timeline))
    yield from (_copy(cell, scale) for cell in copies(timeline))


def _inner(timeline: Timeline) -> int:
    """Pixels that fit a label into the shortest Forward or Backward, within the limits of a page."""
    labelled = [cell for cell in cells(timeline) if cell.kind in "FBW"]
    wanted = max((_pixels(cell.label) * timeline.makespan / (cell.end - cell.start) for cell in labelled), default=0)
    return round(min(max(720, wanted), 2400))


def _pixels(label: str) -> int:
    return 7 * len(label) + 4


def _legend(kinds: list[str], scale: _Scale) -> Iterator[str]:
    for place, kind in enumerate(kinds):
        x = LEFT + scale.inner - 90 * (len(kinds) - place) + 24
        yield f'<rect x="{x}" y="14" width="12" height="12" rx="2" fill="{SHADES[kind][0]}"/>'
        yield _text(x + 18, 24, word_of(kind))


def _rows(timeline: Timeline, scale: _Scale) -> Iterator[str]:
    for rank in range(timeline.num_ranks):
        y, peak = scale.y(rank), peak_text(timeline, rank)
        fact = f"{busy_text(timeline, rank)} busy" + (f" · {peak}" if peak else "")
        yield _text(LEFT - 12, y + ROW / 2 + 4, f"rank {rank}", anchor="end")
        yield f'<rect class="idle" x="{LEFT}" y="{y}" width="{scale.inner}" height="{ROW}" rx="3"/>'
        yield _text(LEFT + scale.inner + 12, y + ROW / 2 + 4, fact, "fact")


def _axis(scale: _Scale) -> Iterator[str]:
    for seconds in ticks(scale.makespan, scale.inner // 90):
        x = scale.x(seconds)
        yield f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 8}" y2="{scale.bottom}"/>'
        yield _text(x, scale.bottom + 14, seconds_text(seconds), "fact", "middle")


def _wire(wire: Wire, scale: _Scale) -> str:
    """A line from the edge of the sending row to the edge of the receiving row."""
    down = wire.target > wire.source
    y1, y2 = scale.y(wire.source) + ROW * down, scale.y(wire.target) + ROW * (not down)
    place = f'x1="{scale.x(wire.start):.2f}" y1="{y1}" x2="{scale.x(wire.end):.2f}" y2="{y2}"'
    return f'<line class="wire" {place}><title>{wire.words}</title></line>'


def _cell(cell: Cell, scale: _Scale) -> str:
    left, right, y = scale.x(cell.start), scale.x(cell.end), scale.y(cell.rank)
    label = cell.label if _pixels(cell.label) <= right - left + 1 else ""
    place = f'x="{left:.2f}" y="{y}" width="{max(right - left - 0.7, 0.3):.2f}" height="{ROW}"'
    rect = f'<rect {place} rx="2" fill="{cell.shade}"/>'
    return f'<g class="cell"><title>{cell.words}</title>{rect}{_text((left + right) / 2, y + ROW / 2 + 4, label)}</g>'


def _copy(cell: Cell, scale: _Scale) -> str:
    """A bar below the row of the rank, of each direction at its own height."""
    left, right = scale.x(cell.start), scale.x(cell.end)
    y = scale.y(cell.rank) + ROW + 1 + (BAR + 1) * [*COPY_KINDS].index(cell.kind)
    place = f'x="{left:.2f}" y="{y}" width="{max(right - left - 0.7, 0.3):.2f}" height="{BAR}"'
    return f'<g class="copy"><title>{cell.words}</title><rect {place} rx="1" fill="{cell.shade}"/></g>'


def _text(x: float, y: float, words: str, style: str = "", anchor: str = "") -> str:
    attributes = (f' class="{style}"' if style else "") + (f' text-anchor="{anchor}"' if anchor else "")
    return f'<text x="{x:.1f}" y="{y:.1f}"{attributes}>{words}</text>' if words else ""
