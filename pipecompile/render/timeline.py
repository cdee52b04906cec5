"""A timeline for the terminal: a row per rank, a cell per computation, dots for idle time.

    rank 0   F0   F1  ··········    B0      F2       B1    ······    B2      75 % busy
    rank 1  ····  F0     B0     F1      B1      F2      B2    ··········     75 % busy

A cell that is too narrow for its label shows only its kind. Labels make cells visible without colors, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import floor

from rich.text import Text

from pipecompile.ir.timeline import Timeline
from pipecompile.ir.units import seconds_text
from pipecompile.render.cells import (
    COPY_KINDS,
    SHADES,
    Cell,
    busy_text,
    cells,
    copies,
    drawn_kinds,
    peak_text,
    summary,
    ticks,
    word_of,
)
from pipecompile.render.timeline_svg import timeline_svg

__all__ = ["timeline_svg", "timeline_text"]


def timeline_text(timeline: Timeline, width: int = 100) -> Text:
    """The timeline in lines of up to ``width`` columns: rows, a time axis, a legend, makespan and bubble."""
    ranks = range(timeline.num_ranks)
    lines_of = _copies(timeline)
    names = _column(["", *(f"rank {rank}" for rank in ranks), *(name for each in lines_of.values() for name in each)])
    busy = _column(["busy", *(busy_text(timeline, rank) for rank in ranks)])
    peak = _column(["peak" * any(timeline.peak_bytes), *(peak_text(timeline, rank) for rank in ranks)])
    notes = [f"  {b}  {p}".rstrip() for b, p in zip(busy, peak, strict=True)]
    scale = _Scale.of(timeline, max(20, width - len(names[0]) - 2 - max(map(len, notes))))
    rows = [Text(" " * scale.columns)]
    drawn = cells(timeline)
    rows += [_row([cell for cell in drawn if cell.rank == rank], scale) for rank in ranks]
    below = [Text(_axis(scale), "dim"), *_legend(timeline, width - len(names[0]) - 2), Text(summary(timeline))]
    lines: list[Text] = []
    for rank, (name, row, note) in enumerate(zip(names, rows, notes, strict=False), start=-1):  # the first is a header
        lines.append(Text.assemble(name, "  ", row, (note, "dim")))
        for way, copied in lines_of.get(rank, {}).items():
            lines.append(Text.assemble((way.rjust(len(name)), "dim"), "  ", _row(copied, scale)))
    lines += [Text.assemble(" " * len(names[0]), "  ", line) for line in below]
    return Text("\n", no_wrap=True, overflow="crop").join(lines)


@dataclass(frozen=True, slots=True)
class _Scale:
    """Converts seconds to columns."""

    makespan: float
    per_second: float

    @staticmethod
    def of(timeline: Timeline, columns: int) -> _Scale:
        """Uses all columns, or most of them if the shortest computation then has a whole number of columns."""
        makespan = timeline.makespan or 1.0
        shortest = min((cell.end - cell.start for cell in cells(timeline)), default=makespan)
        whole = floor(columns * shortest / makespan + 1e-9) / shortest
        return _Scale(makespan, whole if whole * makespan >= 0.7 * columns else columns / makespan)

    @property
    def columns(self) -> int:
        return self.column(self.makespan)

    def column(self, seconds: float) -> int:
        return floor(seconds * self.per_second + 0.5)


def _column(words: list[str]) -> list[str]:
    width = max(map(len, words))
    return [word.rjust(width) for word in words]


def _copies(timeline: Timeline) -> dict[int, dict[str, list[Cell]]]:
    """By rank and direction, the copies to the host and back."""
    found: dict[int, dict[str, list[Cell]]] = {}
    drawn = copies(timeline)
    for rank, kind in sorted(
        {(cell.rank, cell.kind) for cell in drawn}, key=lambda it: (it[0], [*COPY_KINDS].index(it[1]))
    ):
        found.setdefault(rank, {})[COPY_KINDS[kind]] = [c for c in drawn if (c.rank, c.kind) == (rank, kind)]
    return found


def _row(drawn: list[Cell], scale: _Scale) -> Text:
    row = Text()
    for cell in drawn:
        row.append("·" * (scale.column(cell.start) - len(row)), "dim")
        columns = scale.column(cell.end) - len(row)
        label = next((label for label in (cell.label, cell.kind) if len(label) <= columns), "")
        row.append(label.center(columns), f"bold #ffffff on {cell.shade}")
    return row.append("·" * (scale.columns - len(row)), "dim")


def _axis(scale: _Scale) -> str:
    axis = ""
    for seconds in ticks(scale.makespan, scale.columns // 10):
        column, label = scale.column(seconds), f"╵{seconds_text(seconds)}"
        if column + len(label) <= scale.columns:
            axis = axis.ljust(column) + label
    return axis


def _legend(timeline: Timeline, columns: int) -> list[Text]:
    """The legend, in as many lines as the width needs."""
    swatches = [
        (f" {kind} ", f"bold #ffffff on {SHADES[kind][0]}", f" {word_of(kind)}") for kind in drawn_kinds(timeline)
    ]
    lines: list[Text] = []
    for swatch, style, word in (*swatches, ("···", "dim", " idle")):
        words = Text.assemble((swatch, style), word)
        if lines and len(lines[-1]) + 3 + len(words) <= columns:
            lines[-1].append("   ").append_text(words)
        else:
            lines.append(words)
    return lines
