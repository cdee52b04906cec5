"""Groups the nodes of each stage into boxes that resemble the modules of the model.

The boxes of a stage are runs of consecutive nodes, so the picture keeps the order of execution, and edges between boxes
point forward. A path is truncated at the first module that is not *open*. Open modules are

- the model itself, and parents of numbered blocks (``transformer`` and ``transformer.h``, not ``transformer.h.3``);
- each module that the plan cuts, so that the position of the cut is visible.

Operations directly in an open module become a box named after them. Long runs of numbered siblings become one box
(``h.0…5``), and no stage has more than ``MOST_BOXES``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

from pipecompile.ir.graph import Graph
from pipecompile.ir.plan import Plan
from pipecompile.ir.units import names_text
from pipecompile.render.paths import Names, common, is_numbered, parent_of, prefixes, words_of

LONG_RUN = 4  # numbered siblings that still get a box each
MOST_BOXES = 8  # per stage


@dataclass(frozen=True, slots=True)
class Box:
    """Consecutive nodes of one stage. ``paths`` are its modules, empty for operations directly in an open module."""

    nodes: tuple[int, ...]
    paths: tuple[str, ...]

    def __add__(self, other: Box) -> Box:
        return Box(self.nodes + other.nodes, tuple(dict.fromkeys(self.paths + other.paths)))


def boxes_of_stages(graph: Graph, plan: Plan) -> tuple[tuple[Box, ...], ...]:
    """The boxes of each stage, in execution order. Rematerialized nodes are in no box, and replicas have no boxes."""
    opened = _open_modules(graph, plan)
    stages: list[list[int]] = [[] for _ in range(plan.num_stages)]
    for node, stage in enumerate(plan.stage_of):
        if stage is not None:
            stages[stage].append(node)
    return tuple(tuple(_bounded(_collapsed(_runs(graph, nodes, opened)))) for nodes in stages)


def box_label(graph: Graph, box: Box, names: Names) -> str:
    """A short name for a box: from its modules, or from the operations directly in an open module."""
    if box.paths:
        return names.run(box.paths[0], box.paths[-1])
    ops = list(dict.fromkeys(graph.nodes[node].op.strip("_") for node in box.nodes))
    path = graph.nodes[box.nodes[0]].path
    if any(word.isdigit() for word in words_of(path)):
        return f"{names.short(path)}: {names_text(ops, 1)}"
    return names_text(ops, 2)


def blocks_of_stages(graph: Graph, plan: Plan) -> tuple[tuple[str, ...], ...]:
    """The modules of each stage; a module that the plan cuts is listed in several stages."""
    opened = _leading(node.path for node in graph.nodes)
    stages: list[dict[str, None]] = [{} for _ in range(plan.num_stages)]
    for node, stage in zip(graph.nodes, plan.stage_of, strict=True):
        if stage is not None and (path := _closed(node.path, opened)) is not None:
            stages[stage][path] = None
    return tuple(tuple(stages[original]) for original in plan.replica_of)


def _open_modules(graph: Graph, plan: Plan) -> set[str]:
    """The open modules. A plan cuts a module if a value flows between two of its nodes in different stages."""
    cut: set[str] = set()
    for channel in plan.channels:
        for value in channel.values:
            readers = (user for user in graph.users[value] if plan.stage_of[user] == channel.target)
            for reader in readers:
                cut.update(prefixes(common([graph.nodes[value].path, graph.nodes[reader].path])))
    return _leading(node.path for node in graph.nodes) | cut


def _leading(paths: Iterable[str]) -> set[str]:
    """The model itself, and the parents of numbered blocks."""
    parents = {parent_of(prefix) for path in paths for prefix in prefixes(path) if prefix}
    blocks = {path for path in parents if is_numbered(path)}
    return {""} | {prefix for path in blocks for prefix in _outside_blocks(path, blocks)}


def _closed(path: str, opened: set[str]) -> str | None:
    """The outermost module on a path that is not open."""
    return next((prefix for prefix in prefixes(path) if prefix not in opened), None)


def _outside_blocks(path: str, blocks: set[str]) -> Iterator[str]:
    for prefix in prefixes(parent_of(path)):
        if prefix in blocks:
            return
        yield prefix


def _runs(graph: Graph, nodes: Sequence[int], opened: set[str]) -> list[Box]:
    def key(node: int) -> tuple[str, bool]:
        path = graph.nodes[node].path
        closed = _closed(path, opened)
        return (path, False) if closed is None else (closed, True)

    runs = [(tuple(run), path, closed) for (path, closed), run in groupby(nodes, key)]
    return [Box(run, (_narrowed(graph, run, path),) if closed else ()) for run, path, closed in runs]


def _narrowed(graph: Graph, nodes: Sequence[int], path: str) -> str:
    """The innermost module that contains all nodes, unless ``path`` is a numbered block."""
    return path if is_numbered(path) else common([graph.nodes[node].path for node in nodes])


def _collapsed(boxes: Sequence[Box]) -> list[Box]:
    """Merges each long run of numbered siblings, with the operations of their parents in between."""
    result: list[Box] = []
    start = 0
    while start < len(boxes):
        run = _sibling_run(boxes, start)
        end = run[-1] + 1 if len(run) > LONG_RUN else start + 1
        result.append(_sum(boxes[start:end]))
        start = end
    return result


def _sibling_run(boxes: Sequence[Box], start: int) -> list[int]:
    """The positions of the numbered siblings of ``boxes[start]`` that follow it, itself first."""
    if not boxes[start].paths or not is_numbered(boxes[start].paths[0]):
        return [start]
    parent = parent_of(boxes[start].paths[0])
    run = []
    for position in range(start, len(boxes)):
        paths = boxes[position].paths
        if paths and not (is_numbered(paths[0]) and parent_of(paths[0]) == parent):
            break
        if paths:
            run.append(position)
    return run


def _bounded(boxes: list[Box]) -> list[Box]:
    """Merges the smallest neighbors until at most ``MOST_BOXES`` are left."""
    while len(boxes) > MOST_BOXES:
        sizes = [len(left.nodes) + len(right.nodes) for left, right in pairwise(boxes)]
        at = sizes.index(min(sizes))
        boxes = [*boxes[:at], boxes[at] + boxes[at + 1], *boxes[at + 2 :]]
    return boxes


def _sum(boxes: Sequence[Box]) -> Box:
    total = boxes[0]
    for box in boxes[1:]:
        total += box
    return total
