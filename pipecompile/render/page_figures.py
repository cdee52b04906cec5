"""The figures of the report page: timelines, memory, and the stage graph."""

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
    axes = {name: TimeAxis.of(timeline.makespan) for name, timeline in page.timelines.items()}
    if page.is_on_one_axis:
        axes = dict.fromkeys(axes, max(axes.values(), key=lambda axis: axis.seconds, default=TimeAxis.of(0.0)))
    figures: dict[str, Any] = {name: timeline_figure(each, axes[name]) for name, each in page.timelines.items()}
    if any(page.levels):
        last = max(level.end for levels in page.levels for level in levels)
        figures["memory"] = memory_figure(page, TimeAxis.of(last))
    return embedded({**figures, "graph": graph_figure(page)})
