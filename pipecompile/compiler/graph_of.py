"""The graph that a call is planned from: that of a microbatch, with what the stages give to several processes."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from pipecompile.batching import Batched, Division, Kind
from pipecompile.capture import summarize
from pipecompile.compiler.options import Options
from pipecompile.ir.graph import Graph, SharedOutput


def graph_of(division: Division, options: Options, apart: bool) -> Graph:
    """The graph of a microbatch of a division.

    Args:
        division: of a call.
        options: of the pipeline; which outputs come to all processes.
        apart: whether its ranks are in several processes.
    """
    graph = summarize(division.body)
    return replace(graph, shared_outputs=_shared_outputs(division, graph, options.outputs == "all")) if apart else graph


def _shared_outputs(division: Division, graph: Graph, everything: bool) -> tuple[SharedOutput, ...]:
    """What the stages give to the processes.

    Args:
        everything: whether all processes get the values of all outputs.
    """
    places = {node.name: place for place, node in enumerate(graph.nodes)}

    def how(name: str, kind: Kind) -> Literal["joined", "once", "shape"]:
        if not everything and name not in division.wanted:
            return "shape"
        return "joined" if isinstance(kind, Batched) else "once"

    return tuple(SharedOutput(name, places.get(name), how(name, kind)) for name, kind in division.joins.items())
