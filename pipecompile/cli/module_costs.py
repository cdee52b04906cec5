"""What ``pipecompile profile`` prints: the costs of a model by module or by node."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipecompile.ir.graph import Cost, CostedGraph
from pipecompile.ir.units import bytes_text, count_text, seconds_text
from pipecompile.render.fitted import Fitted
from pipecompile.render.paths import words_of

MODEL = "(model)"


@dataclass(frozen=True)
class Row:
    """The costs of a module or a node per microbatch.

    Args:
        name: the path of the module, or the name of the node.
        op: the function of a node; empty for a module.
        nodes: how many nodes it has.
        num_parameters: the parameters that it reads; tied ones count in each row that reads them.
        cost: seconds, bytes of parameters, and bytes kept from forward to backward.
        nbytes: of the results of a node; 0 for a module.
    """

    name: str
    op: str
    nodes: int
    num_parameters: int
    cost: Cost
    nbytes: int = 0


def by_module(costed: CostedGraph, depth: int | None = None) -> list[Row]:
    """A row for each module, in the order of their first nodes.

    Args:
        depth: how many parts of a path name a module; by default those up to the first number (``transformer.h.3``).
    """
    groups: dict[str, list[int]] = {}
    for index, node in enumerate(costed.graph.nodes):
        if node.op != "input":
            groups.setdefault(_module(node.path, depth), []).append(index)
    return [_row(costed, name or MODEL, "", nodes) for name, nodes in groups.items()]


def by_node(costed: CostedGraph) -> list[Row]:
    """A row for each node, in order."""
    nodes = costed.graph.nodes
    return [
        _row(costed, node.name, node.op, [index], node.nbytes) for index, node in enumerate(nodes) if node.op != "input"
    ]


def _module(path: str, depth: int | None) -> str:
    words = words_of(path)
    if depth is None:
        numbered = next((at for at, word in enumerate(words) if word.isdigit()), len(words))
        return ".".join(words[: numbered + 1])
    return ".".join(words[:depth])


def _row(costed: CostedGraph, name: str, op: str, nodes: Sequence[int], nbytes: int = 0) -> Row:
    names = {parameter for index in nodes for parameter in costed.graph.nodes[index].parameters}
    sizes = [it.spec for it in costed.graph.parameters if it.name in names]
    costs = [costed.costs[index] for index in nodes]
    cost = Cost(
        sum(it.forward for it in costs),
        sum(it.backward for it in costs),
        sum(it.saved_bytes for it in costs),
        sum(spec.nbytes for spec in sizes),
    )
    num_parameters = sum(prod(spec.shape) for spec in sizes)
    return Row(name=name, op=op, nodes=len(nodes), num_parameters=num_parameters, cost=cost, nbytes=nbytes)


def facts(costed: CostedGraph, rows: Iterable[Row]) -> dict[str, Any]:
    """The rows, ready for JSON: seconds and bytes of one microbatch."""
    setting = costed.setting
    return {
        "costs": costed.origin,
        "measured": costed.measured,
        "model": setting and setting.model,
        "inputs": setting and list(setting.inputs),
        "seconds": costed.seconds,
        "rows": [
            {
                "name": row.name,
                **({"op": row.op, "output_bytes": row.nbytes} if row.op else {"nodes": row.nodes}),
                "num_parameters": row.num_parameters,
                "forward": row.cost.forward,
                "backward": row.cost.backward,
                "parameter_bytes": row.cost.parameter_bytes,
                "saved_bytes": row.cost.saved_bytes,
            }
            for row in rows
        ],
    }


def show(costed: CostedGraph, rows: Sequence[Row], console: Console) -> None:
    """Prints the rows as a table, and where the costs come from."""
    ops = any(row.op for row in rows)
    it = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_footer=True)
    it.add_column("node" if ops else "module", overflow="fold", footer="all")
    if ops:
        it.add_column("op", overflow="fold")
    for name, total in zip(NUMBERS, _totals(costed), strict=True):
        it.add_column(name, justify="right", no_wrap=True, footer=total)
    for row in rows:
        share = (row.cost.seconds / costed.seconds) if costed.seconds else 0.0
        it.add_row(Text(row.name), *([Text(row.op)] if ops else []), *_figures(row.num_parameters, row.cost, share))
    console.print(Fitted(it))
    console.print(Text(f"one microbatch, {costed.origin}"))


NUMBERS = ("params", "forward", "backward", "time", "weights", "saved")


def _figures(num_parameters: int, cost: Cost, share: float) -> tuple[str, ...]:
    times = seconds_text(cost.forward), seconds_text(cost.backward), f"{share:.1%}"
    return (count_text(num_parameters), *times, bytes_text(cost.parameter_bytes), bytes_text(cost.saved_bytes))


def _totals(costed: CostedGraph) -> tuple[str, ...]:
    """Sums over the model, in which a tied parameter counts once."""
    specs = [it.spec for it in costed.graph.parameters]
    cost = Cost(
        sum(it.forward for it in costed.costs),
        sum(it.backward for it in costed.costs),
        sum(it.saved_bytes for it in costed.costs),
        sum(spec.nbytes for spec in specs),
    )
    return _figures(sum(prod(spec.shape) for spec in specs), cost, 1.0 if costed.seconds else 0.0)
