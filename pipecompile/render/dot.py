"""The stage graph in the DOT language: a cluster per stage, a node per module."""

from __future__ import annotations

from collections.abc import Iterator

from pipecompile.ir.units import seconds_text
from pipecompile.render.escape import dot_string
from pipecompile.render.labels import edge_label, edge_lines, module_lines, stage_lines, stage_name
from pipecompile.render.stage_graph import StageGraph

HEAD = """digraph plan {
  rankdir=TB; compound=true;
  graph [fontname="Helvetica", fontsize=12];
  node [shape=box, style="rounded,filled", fillcolor=white, color="#aab4bf", fontname="Helvetica", fontsize=11];
  edge [color="#8794a1", fontname="Helvetica", fontsize=9];"""


def dot(view: StageGraph) -> str:
    """Graphviz source. Modules are ``m0``, ``m1``, ..., stages are ``cluster_0``, ..."""
    lines = [HEAD]
    for stage in range(len(view.stages)):
        lines += _cluster(view, stage)
    return "\n".join([*lines, *_edges(view), "}", ""])


def _cluster(view: StageGraph, stage: int) -> Iterator[str]:
    label = dot_string("\n".join((stage_name(view, stage), *stage_lines(view, stage), "")), end=r"\l")
    yield f"  subgraph cluster_{stage} {{"
    yield f'    label={label}; labeljust=l; style="rounded,filled"; fillcolor="#f4f6f8"; color="#d5dbe1";'
    for position in view.stages[stage].modules:
        module = view.modules[position]
        words = dot_string(f"{module.label}\n{seconds_text(module.cost.seconds)}")
        yield f"    m{position} [label={words}, tooltip={dot_string(_lines(module_lines(view, position)))}];"
    yield "  }"


def _edges(view: StageGraph) -> Iterator[str]:
    for edge in view.edges:
        tooltip = dot_string(_lines(edge_lines(view, edge)))
        attributes = f"tooltip={tooltip}"
        if view.crosses(edge):
            label = dot_string(edge_label(view, edge))
            attributes += f', label={label}, labeltooltip={tooltip}, color="#d9622b", penwidth=1.8'
        yield f"  m{edge.source} -> m{edge.target} [{attributes}];"


def _lines(lines: tuple[str, ...]) -> str:
    return "\n".join(lines)
