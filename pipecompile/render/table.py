"""The stage table for the terminal: contents, costs and communication of each stage."""

from __future__ import annotations

from dataclasses import replace
from math import prod

from rich import box
from rich.table import Table
from rich.text import Text

from pipecompile.ir.cluster import Cluster
from pipecompile.ir.graph import Cost
from pipecompile.ir.plan import Plan
from pipecompile.ir.units import bytes_text, count_text, seconds_text
from pipecompile.planning.memory import KINDS, Memory
from pipecompile.render.fitted import Fitted
from pipecompile.render.labels import modules_line, replica_notes
from pipecompile.render.stage_graph import Stage, StageGraph

NUMBERS = ("params", "forward", "backward", "weights", "saved", "in", "out")
WIDE = 96  # columns of a terminal with space for the modules


def table(view: StageGraph, width: int = 100) -> Fitted:
    """A row per stage and one for the whole model. ``saved`` is the bytes kept from forward to backward per microbatch.

    Args:
        view: the stages.
        width: columns of the terminal; if it is narrow, the modules are listed below.
    """
    lines = _notes(view) if width >= WIDE else [*_modules(view), *_notes(view)]
    caption = Text("\n".join(lines))
    it = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_footer=True, caption=caption)
    it.add_column("stage", justify="right", no_wrap=True, footer="all")
    it.add_column("rank", justify="right", no_wrap=True)
    if width >= WIDE:
        it.add_column("modules", ratio=1)
    for name, total in zip(NUMBERS, totals(view), strict=True):
        it.add_column(name, justify="right", no_wrap=True, footer=total)
    for index, stage in enumerate(view.stages):
        modules = [Text(modules_line(view, index))] if width >= WIDE else []
        it.add_row(str(index), str(stage.rank), *modules, *stage_numbers(stage))
    return Fitted(it)


_SHORT = {"parameters": "params", "gradients": "grads", "optimizer": "state", "activations": "saved"}


def memory_table(memory: Memory, plan: Plan, cluster: Cluster) -> Fitted:
    """The peak memory of each stage in training, by kind, of ranks with several stages, and of each device."""
    kinds = [kind for kind in KINDS if any(dict(stage.by_kind())[kind] for stage in memory.stages)]
    it = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, title="peak memory", title_style="")
    limited = any(device.memory is not None for device in cluster.devices)
    for name in ("stage", *(_SHORT.get(kind, kind) for kind in kinds), "all", *(["of"] if limited else [])):
        it.add_column(name, justify="right", no_wrap=True)
    limits = ["" if device.memory is None else bytes_text(device.memory) for device in cluster.devices]
    shared = len(set(plan.rank_of)) < plan.num_stages
    for index, stage in enumerate(memory.stages):
        sizes = [bytes_text(dict(stage.by_kind())[kind]) for kind in kinds]
        again = "*" if index in plan.recomputed else "^" if index in plan.offloaded else ""
        of = ["" if shared else limits[plan.rank_of[index]]] if limited else []
        it.add_row(f"{index}{again}", *sizes, bytes_text(stage.total), *of)
    for rank, nbytes in enumerate(memory.ranks) if shared else ():
        it.add_row(f"rank {rank}", *[""] * len(kinds), bytes_text(nbytes), *([limits[rank]] if limited else []))
    notes = [
        *(["* recomputes activations in the backward instead of keeping them"] if plan.recomputed else []),
        *(["^ offloads activations to the host's memory between the passes"] if plan.offloaded else []),
    ]
    it.caption = "\n".join(notes) or None
    return Fitted(it)


def stage_numbers(stage: Stage) -> tuple[str, ...]:
    """The columns ``NUMBERS`` of a stage."""
    return _numbers(stage.num_parameters, stage.cost, stage.bytes_in, stage.bytes_out)


def _numbers(num_parameters: int, cost: Cost, bytes_in: int, bytes_out: int) -> tuple[str, ...]:
    times = seconds_text(cost.forward), seconds_text(cost.backward)
    sizes = map(bytes_text, (cost.parameter_bytes, cost.saved_bytes, bytes_in, bytes_out))
    return (count_text(num_parameters), *times, *sizes)


def totals(view: StageGraph) -> tuple[str, ...]:
    """The parameters of the model, and sums over the stages. Each stage counts its tied copies.

    Replicas have their own memory, but a microbatch is computed, and crosses a cut, only once.
    """
    num_parameters = sum(prod(parameter.spec.shape) for parameter in view.costed.graph.parameters)
    total = sum((stage.cost for stage in view.stages), Cost())
    once = [view.stages[stage].cost for stage in set(view.plan.replica_of)]
    total = replace(total, forward=sum(c.forward for c in once), backward=sum(c.backward for c in once))
    crossing = sum(channel.nbytes for channel in view.cuts)
    return _numbers(num_parameters, total, crossing, crossing)


def _modules(view: StageGraph) -> list[str]:
    return [f"stage {index}: {modules_line(view, index)}" for index in range(len(view.stages))]


def _notes(view: StageGraph) -> list[str]:
    costs = [f"one microbatch, {view.costed.origin}", f"bottleneck / mean: {view.balance:.2f}"]
    tied = [f"tied: {it.parameter} in stages {', '.join(map(str, it.stages))}" for it in view.plan.tied_by_model]
    return [*costs, *replica_notes(view.plan), *tied]
