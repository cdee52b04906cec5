"""The labels that dot, mermaid and html share. Plain text, not escaped."""

from __future__ import annotations

from collections.abc import Sequence

from pipecompile.ir.plan import Plan
from pipecompile.ir.units import bytes_text, count_text, names_text, plural, seconds_text
from pipecompile.render.paths import is_numbered, parent_of
from pipecompile.render.stage_graph import Edge, StageGraph

TOOLTIP_LINES = 14


def stage_name(view: StageGraph, stage: int) -> str:
    return f"stage {stage} · rank {view.stages[stage].rank}"


def stage_lines(view: StageGraph, stage: int) -> tuple[str, ...]:
    """The contents and costs of a stage, one fact per line."""
    it = view.stages[stage]
    lines = [
        f"{count_text(it.num_parameters)} parameters",
        f"forward {seconds_text(it.cost.forward)}, backward {seconds_text(it.cost.backward)}",
        f"weights {bytes_text(it.cost.parameter_bytes)}, saved {bytes_text(it.cost.saved_bytes)}",
    ]
    first, *others = view.plan.replicas[stage]
    if first != stage:
        lines.append(f"a replica of stage {first}")
    elif others:
        lines.append(f"replicas: {_stages(others)}")
    return (*lines, *(f"tied to {_stages(others)}: {_end(name)}" for name, others in view.tied(stage)))


def replica_notes(plan: Plan) -> tuple[str, ...]:
    """A note on each stage that has replicas."""
    groups = [group for stage, group in enumerate(plan.replicas) if group[0] == stage and len(group) > 1]
    listed = (", ".join(map(str, group)) for group in groups)
    return tuple(f"stages {stages} are replicas (microbatches are distributed round-robin)" for stages in listed)


def modules_line(view: StageGraph, stage: int, limit: int = 5) -> str:
    """The modules of a stage in short, numbered siblings as a range: ``"wte, wpe, h.0…4"``."""
    siblings: dict[tuple[str, bool], list[str]] = {}
    for path in view.stages[stage].blocks:
        numbered = is_numbered(path)
        siblings.setdefault((parent_of(path) if numbered else path, numbered), []).append(path)
    names = [view.names.run(run[0], run[-1]) for run in siblings.values()]
    return names_text(names, limit) or ", ".join(view.modules[m].label for m in view.stages[stage].modules)


def inputs_line(view: StageGraph, stage: int) -> str:
    """The model inputs that a stage reads, and the number of its rematerialized nodes."""
    it = view.stages[stage]
    words = [names_text([view.node(i).name for i in it.inputs])] if it.inputs else []
    return " · ".join([*words, *([f"{len(it.rematerialized)} rematerialized"] if it.rematerialized else [])])


def edge_label(view: StageGraph, edge: Edge) -> str:
    """The values of an edge in one line; with its shape if there is only one."""
    names = [view.node(value).name for value in edge.values]
    specs = names_text([str(spec) for spec in view.node(edge.values[0]).outputs], 1) if len(names) == 1 else ""
    return " · ".join(filter(None, [names_text(names, 2), specs, bytes_text(edge.nbytes)]))


def edge_lines(view: StageGraph, edge: Edge) -> tuple[str, ...]:
    """The ends of an edge, then each of its values."""
    ends = [view.modules[end] for end in (edge.source, edge.target)]
    head = " → ".join(f"{module.label} (stage {module.stage})" for module in ends)
    return (head, *_limited([node_line(view, value) for value in edge.values]))


def module_lines(view: StageGraph, position: int) -> tuple[str, ...]:
    """The path of a module, its costs, then its nodes."""
    module = view.modules[position]
    cost = module.cost
    time = f"forward {seconds_text(cost.forward)}, backward {seconds_text(cost.backward)}"
    memory = f"weights {bytes_text(cost.parameter_bytes)}, saved {bytes_text(cost.saved_bytes)}"
    nodes = _limited([node_line(view, node) for node in module.nodes])
    return (module_path(view, position), f"{plural(len(module.nodes), 'node')}, {time}", memory, *nodes)


def module_path(view: StageGraph, position: int) -> str:
    """The full paths of a module; the path of the model itself is empty."""
    paths = view.modules[position].paths
    first, last = (path or "(model)" for path in (paths[0], paths[-1]))
    return first if len(paths) == 1 else f"{first} … {last}"


def node_line(view: StageGraph, index: int) -> str:
    """A node in one line: name, operation, shapes, source."""
    node = view.node(index)
    specs = names_text([*map(str, node.outputs)])
    return "  ".join(filter(None, [f"{node.name} = {node.op}", specs, bytes_text(node.nbytes), node.source]))


def _end(name: str) -> str:
    return ".".join(name.split(".")[-2:])


def _stages(stages: Sequence[int]) -> str:
    return f"stage{'s' if len(stages) > 1 else ''} {names_text([*map(str, stages)])}"


def _limited(lines: list[str]) -> list[str]:
    more = len(lines) - TOOLTIP_LINES
    return lines if more <= 1 else [*lines[:TOOLTIP_LINES], f"… and {more} more"]
