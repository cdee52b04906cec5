"""The output formats of a stage graph, by name. The others are of ``Page.view`` alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from pipecompile.render.dot import dot
from pipecompile.render.html import html
from pipecompile.render.mermaid import mermaid
from pipecompile.render.page import Page

FORMATS: Mapping[str, Callable[[Page], str]] = MappingProxyType(
    {
        "dot": lambda page: dot(page.view),
        "mermaid": lambda page: mermaid(page.view),
        "json": lambda page: page.view.to_json(),
        "html": html,
    }
)
