"""The time axis of figures. Timelines of similar lengths share one, so that they zoom together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bokeh.models import Range1d

from pipecompile.render.figures import frame

UNITS = ((1.0, "s"), (1e3, "ms"), (1e6, "us"))


@dataclass(frozen=True)
class TimeAxis:
    """Some seconds, drawn as ``factor`` times as many units, over one range for all figures on the axis."""

    seconds: float
    factor: float
    unit: str
    x_range: Range1d

    @staticmethod
    def of(seconds: float) -> TimeAxis:
        """An axis from 0 to some seconds, in the largest unit in which they are at least 1."""
        factor, unit = next((each for each in UNITS if seconds * each[0] >= 1), UNITS[-1])
        most = seconds * factor or 1.0
        return TimeAxis(seconds, factor, unit, Range1d(start=0, end=most, bounds=(0, most)))


def rows(axis: TimeAxis, names: list[tuple[str, str]]) -> Any:
    """A figure over the time axis with a row per rank, from the top.

    Args:
        axis: the axis.
        names: for each rank its name, and a second line that is shown if the rows are high enough.
    """
    count = len(names)
    height = max(12, min(44, 1400 // max(1, count)))
    plot = frame(height * count + 80, axis.x_range, Range1d(start=count - 0.45, end=-0.55))
    plot.yaxis.ticker = list(range(count))
    plot.yaxis.major_label_overrides = {
        rank: f"{name}\n{more}" if more and height >= 30 else name for rank, (name, more) in enumerate(names)
    }
    plot.xaxis.axis_label = f"time ({axis.unit})"
    plot.xaxis.ticker.desired_num_ticks = 5
    plot.xgrid.visible = True
    return plot
