"""What the figures of the report page share: the frame, its tools and colors, and labels that are shown where they fit.

Bokeh draws them: it ships its scripts, reads colors from the page's CSS, and zooms several figures together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from bokeh.core.properties import value
from bokeh.embed import components
from bokeh.models import (
    BoxZoomTool,
    ColumnDataSource,
    CustomJS,
    HoverTool,
    PanTool,
    Range1d,
    ResetTool,
    Text,
    WheelZoomTool,
    ZoomInTool,
    ZoomOutTool,
)
from bokeh.plotting import figure
from bokeh.resources import Resources

FONT = "Helvetica, Arial, 'Liberation Sans', sans-serif"
SIZE = 10.5  # pixels of the font of a label
GLYPH = 5.9  # pixels of a character in a label, on average
LEFT = 108  # pixels for the names of rows, the same in all figures, so that their time axes are in line
TIP = (
    "margin: -5px; padding: 6px 10px; max-width: min(44vw, 440px); white-space: normal; overflow-wrap: anywhere; "
    f"background: var(--panel); color: var(--ink); font: 12px/1.45 {FONT}"
)

FIT = """
const scale = plot.inner_width / (plot.x_range.end - plot.x_range.start);
const cut = (text, most, line) =>
  text.length <= most ? text : elide && line == 0 && most >= 4 ? text.slice(0, most - 1) + "…" : "";
const { full, width } = labels.data;
labels.data.text = full.map((text, i) => {
  const most = Math.floor((width[i] * scale - 4) / glyph);
  return text.split("\\n").map((part, line) => cut(part, most, line)).filter(Boolean).join("\\n");
});
labels.change.emit();
"""


def frame(height: int, x_range: Range1d, y_range: Range1d, both: bool = False) -> Any:
    """An empty figure as wide as the page, with zoom and pan; ``both``: also in the direction of y."""
    dimensions: Literal["both", "width"] = "both" if both else "width"
    pan, reset = PanTool(dimensions=dimensions), ResetTool()
    wheel = WheelZoomTool(dimensions=dimensions, modifiers={"ctrl": True})
    tools = [
        pan,
        BoxZoomTool(dimensions=dimensions),
        wheel,
        ZoomInTool(dimensions=dimensions),
        ZoomOutTool(dimensions=dimensions),
        reset,
    ]
    plot = figure(
        height=height,
        sizing_mode="stretch_width",
        x_range=x_range,
        y_range=y_range,
        tools=tools,
        active_drag=pan,
        active_scroll=wheel,
        toolbar_location="above",
        min_border_left=LEFT,
        min_border_right=12,
    )
    plot.toolbar.logo = None
    plot.grid.visible = False
    for axis in plot.axis:
        axis.minor_tick_line_color = axis.axis_line_color = axis.major_tick_line_color = None
        axis.major_label_text_font = FONT
        axis.major_label_text_font_size = "11px"
        axis.axis_label_text_font = FONT
        axis.axis_label_text_font_size = "11px"
        axis.axis_label_text_font_style = "normal"
    return plot


def hover(plot: Any, renderer: Any, **columns: str) -> None:
    """Shows columns of a data source near the pointer, a line each. Bokeh escapes their values.

    Args:
        plot: the figure.
        renderer: what is pointed at.
        columns: the name of each column, and the word before its values, or an empty one.
    """
    lines = (f'<div><span style="color: var(--soft)">{word}</span> @{name}</div>' for name, word in columns.items())
    tip = f'<div style="{TIP}">{"".join(lines)}</div>'
    plot.add_tools(HoverTool(renderers=[renderer], tooltips=tip, visible=False))


def fitted(plot: Any, labels: Mapping[str, Sequence[Any]], *, elide: bool, color: str = "#ffffff") -> None:
    """Adds labels that are shown where they fit, at any zoom.

    Args:
        plot: the figure.
        labels: columns ``x`` and ``y`` (the center), ``full`` (the text, which may have several lines) and ``width``
            (the space, in units of x).
        elide: whether the beginning of the first line is shown if that line does not fit.
    """
    source = ColumnDataSource({**labels, "text": [""] * len(labels["full"])})
    glyph = Text(
        x="x", y="y", text="text", text_align="center", text_baseline="middle", text_color=color,
        text_font=value(FONT), text_font_size=f"{SIZE}px", text_line_height=1.25,
    )  # fmt: skip
    plot.add_glyph(source, glyph)
    fit = CustomJS(args={"plot": plot, "labels": source, "glyph": GLYPH, "elide": elide}, code=FIT)
    plot.x_range.js_on_change("start", fit)
    plot.x_range.js_on_change("end", fit)
    plot.js_on_change("inner_width", fit)


def embedded(figures: Mapping[str, Any]) -> tuple[str, dict[str, str]]:
    """The scripts of a page with these figures, with all that they need, and the element of each figure."""
    for name, plot in figures.items():
        plot.name = name
    script, places = components(dict(figures))
    return Resources(mode="inline", components=["bokeh"], log_level="error").render() + script, dict(places)
