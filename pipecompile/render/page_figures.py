"""The figures of the report page: timelines over one time axis, memory, and the stage graph."""

from __future__ import annotations

from typing import Any

from pipecompile.render.figures import embedded
from pipecompile.render.graph_figure import graph_figure
from pipecompile.render.memory_figure import memory_figure, near_limits
from pipecompile.render.page import Page
from pipecompile.render.time_axis import TimeAxis
from pipecompile.render.timeline_figure import timeline_figure

__all__ = ["near_limits", "page_figures"]


def page_figures(page: Page) -> tuple[str, dict[str, str]]:
    """The scripts that draw the figures, and an element for each: ``graph``, ``memory`` and the names of timelines."""
    axis = TimeAxis.of(max((timeline.makespan for timeline in page.timelines.values()), default=0.0))
    figures: dict[str, Any] = {name: timeline_figure(each, axis) for name, each in page.timelines.items()}
    if any(page.levels):  # its own axis: a measured step may be many times as long as the predicted one
        last = max(level.end for levels in page.levels for level in levels)
        figures["memory"] = memory_figure(page, TimeAxis.of(last))
    return embedded({**figures, "graph": graph_figure(page)})
