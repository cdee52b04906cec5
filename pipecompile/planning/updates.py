"""Seconds of optimizers that step inside the pipeline, as part of the costs that plans weigh.

PipeDream updates the weights of a stage after each microbatch, so an update is as much work of its rank as a backward.
A stage with many parameters and little to compute, such as one with an embedding, is slower than its nodes say. 2BW
updates once for all microbatches of a call, other schedules outside of the pipeline.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from pipecompile.ir.graph import CostedGraph
from pipecompile.ir.instruction import Step, Update
from pipecompile.ir.plan import Plan, members
from pipecompile.ir.program import Program


@dataclass(frozen=True, slots=True)
class UpdateCost:
    """Seconds of an optimizer step: for each parameter, and for each byte of parameters."""

    per_parameter: float
    per_byte: float

    def seconds(self, nbytes: int) -> float:
        """The seconds of one parameter."""
        return self.per_parameter + self.per_byte * nbytes


def updates_per_microbatch(schedule: Callable[[Plan, int], Program], num_microbatches: int) -> float:
    """The updates of a stage in a step of a schedule, for each microbatch; 0 if optimizers step outside of it."""
    program = schedule(Plan.chain(1), num_microbatches)
    updates = [
        i for i in program.ranks[0] if isinstance(i, Update) or (isinstance(i, Step) and i not in program.updated)
    ]
    return len(updates) / num_microbatches


def update_seconds_of(costed: CostedGraph, plan: Plan, cost: UpdateCost) -> tuple[float, ...]:
    """The seconds of one update of each stage, on a device of speed 1."""
    sizes = _trained(costed)
    found = []
    for stage in range(plan.num_stages):
        nodes = members(costed.graph, plan, stage)
        names = {name for i in nodes for name in costed.graph.nodes[i].parameters if name in sizes}
        found.append(sum(cost.seconds(sizes[name]) for name in sorted(names)))
    return tuple(found)


def with_updates(costed: CostedGraph, cost: UpdateCost, share: float) -> CostedGraph:
    """Costs in which the backward of the first node that reads a parameter has a share of its update."""
    sizes, costs = _trained(costed), list(costed.costs)
    for i, node in enumerate(costed.graph.nodes):
        more = sum(cost.seconds(sizes.pop(name)) for name in node.parameters if name in sizes)
        costs[i] = replace(costs[i], backward=costs[i].backward + share * more)
    return replace(costed, costs=tuple(costs))


def _trained(costed: CostedGraph) -> dict[str, int]:
    return {it.name: it.spec.nbytes for it in costed.graph.parameters if it.spec.requires_grad}
