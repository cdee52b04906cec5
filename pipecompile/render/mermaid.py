"""The stage graph as a Mermaid flowchart, which GitHub and many editors render from a fenced block."""

from __future__ import annotations

from collections.abc import Iterator

from pipecompile.ir.units import seconds_text
from pipecompile.render.escape import mermaid_string
from pipecompile.render.labels import edge_label, stage_lines, stage_name
from pipecompile.render.stage_graph import StageGraph


def mermaid(view: StageGraph) -> str:
    """A flowchart. Modules are ``m0``, ``m1``, ..., stages are the subgraphs ``s0``, ..., thick edges cross a cut."""
    lines = ["flowchart TB"]
    for stage in range(len(view.stages)):
        lines += _subgraph(view, stage)
    return "\n".join([*lines, *_edges(view), ""])


def _subgraph(view: StageGraph, stage: int) -> Iterator[str]:
    title = " · ".join((stage_name(view, stage), *stage_lines(view, stage)[:2]))
    yield f"  subgraph s{stage}[{mermaid_string(title)}]"
    yield "    direction LR"
    for position in view.stages[stage].modules:
        module = view.modules[position]
        words = f"{module.label}\n{seconds_text(module.cost.seconds)}"
        yield f"    m{position}[{mermaid_string(words)}]"
    yield "  end"


def _edges(view: StageGraph) -> Iterator[str]:
    for edge in view.edges:
        arrow = f"== {mermaid_string(edge_label(view, edge))} ==>" if view.crosses(edge) else "-->"
        yield f"  m{edge.source} {arrow} m{edge.target}"
