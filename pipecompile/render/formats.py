"""The output formats of a stage graph, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from pipecompile.render.dot import dot
from pipecompile.render.html import html
from pipecompile.render.mermaid import mermaid
from pipecompile.render.stage_graph import StageGraph
from pipecompile.render.svg import svg

FORMATS: Mapping[str, Callable[[StageGraph], str]] = MappingProxyType(
    {"dot": dot, "mermaid": mermaid, "svg": svg, "json": StageGraph.to_json, "html": html}
)
