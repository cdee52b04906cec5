"""Memory over time as a figure: a row per rank, whose height is the memory of its device.

If all devices have much more memory than they need, the height is the largest peak, and the limit is only told.
"""

from __future__ import annotations

from typing import Any

from bokeh.models import ColumnDataSource

from pipecompile.ir.units import bytes_text
from pipecompile.render.figures import hover
from pipecompile.render.page import Page
from pipecompile.render.time_axis import TimeAxis, rows

SHARE = 0.3  # of its limit that a rank needs, for limits to be drawn
TOP, BOTTOM = 0.4, 0.42  # above and below the middle of a row
FITS, EXCEEDS = "#2f7ed8", "#d0312d"
FAINT = "#8794a1"


def tops(page: Page) -> list[int]:
    """The bytes that the height of a row stands for: the device's memory, if some rank needs a good part of its own."""
    if near_limits(page):
        return [page.limit(rank) or _largest(page) for rank in range(len(page.levels))]
    return [_largest(page)] * len(page.levels)


def near_limits(page: Page) -> bool:
    """Whether some rank needs so much of its device's memory that the limit can be drawn to scale."""
    limits = (page.limit(rank) for rank in range(len(page.levels)))
    return any(limit and peak >= SHARE * limit for limit, peak in zip(limits, _peaks(page), strict=True))


def _peaks(page: Page) -> list[int]:
    return [max(level.nbytes for level in levels) for levels in page.levels]


def _largest(page: Page) -> int:
    return max(_peaks(page)) or 1


def memory_figure(page: Page, axis: TimeAxis) -> Any:
    """The figure; hover shows bytes and what happens meanwhile."""
    heights, ranks = tops(page), range(len(page.levels))
    plot = rows(axis, [(f"rank {rank}", _fact(page, rank, peak)) for rank, peak in enumerate(_peaks(page))])
    ends = axis.factor * max(level.end for levels in page.levels for level in levels)
    plot.hbar(y=[rank + (BOTTOM - TOP) / 2 for rank in ranks], left=0, right=ends, height=TOP + BOTTOM,
              fill_color=FAINT, fill_alpha=0.12, line_color=None)  # fmt: skip
    data: dict[str, list[Any]] = {name: [] for name in ("left", "right", "top", "bottom", "color", "words")}
    for rank, levels in enumerate(page.levels):
        limit = page.limit(rank)
        of = "" if limit is None else f" of {bytes_text(limit)}"
        for level in levels:
            part = min(1.0, level.nbytes / heights[rank])
            data["left"].append(level.start * axis.factor)
            data["right"].append(level.end * axis.factor)
            data["top"].append(rank + BOTTOM - part * (TOP + BOTTOM))
            data["bottom"].append(rank + BOTTOM)
            data["color"].append(EXCEEDS if limit is not None and level.nbytes > limit else FITS)
            data["words"].append(f"rank {rank}: {bytes_text(level.nbytes)}{of}, {level.words}")
    areas = plot.quad(
        left="left", right="right", top="top", bottom="bottom", source=ColumnDataSource(data),
        fill_color="color", line_color="color", line_width=0.5, hover_fill_color="color", hover_line_color="#ffffff",
    )  # fmt: skip
    hover(plot, areas, words="")
    known = [rank for rank in ranks if page.limit(rank) is not None] if near_limits(page) else []
    at = [rank - TOP for rank in known]
    plot.segment(x0=[0] * len(at), x1=[ends] * len(at), y0=at, y1=at, line_color=EXCEEDS, line_dash="dashed")
    return plot


def _fact(page: Page, rank: int, peak: int) -> str:
    limit = page.limit(rank)
    return bytes_text(peak) if limit is None else f"{bytes_text(peak)} / {bytes_text(limit)}"
