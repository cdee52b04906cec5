"""Escapes names for each format. A name comes from the user's model and can contain any character."""

from __future__ import annotations

import re
from xml.sax.saxutils import escape

_NOT_XML = re.compile("[^\t\n\r -\ud7ff\ue000-�\U00010000-\U0010ffff]")


def xml(text: str) -> str:
    """Text for an element or a quoted attribute of SVG or HTML; characters that XML forbids become U+FFFD."""
    return escape(_NOT_XML.sub("�", text), {'"': "&quot;", "'": "&#39;"})


def dot_string(text: str, end: str = "\\n") -> str:
    """A quoted string of the DOT language. ``end`` ends a line: ``\\n`` centers it, ``\\l`` aligns it left."""
    return '"' + _NOT_XML.sub("�", text).replace("\\", "\\\\").replace('"', '\\"').replace("\n", end) + '"'


def mermaid_string(text: str) -> str:
    """A quoted Mermaid string: special characters become numeric entities, newlines become ``<br/>``."""
    lines = _NOT_XML.sub("�", text).split("\n")
    return '"' + "<br/>".join(re.sub(r"[^\w .,:+()\[\]/·…→-]", _entity, line) for line in lines) + '"'


def _entity(match: re.Match[str]) -> str:
    return f"#{ord(match[0])};"
