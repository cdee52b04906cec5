"""Simulates a program of a plan with all that is known of its seconds, split backwards included."""

from __future__ import annotations

from collections.abc import Sequence

from pipecompile.ir.cluster import Cluster
from pipecompile.ir.graph import CostedGraph
from pipecompile.ir.plan import stage_costs
from pipecompile.ir.program import Program
from pipecompile.ir.split_nodes import stage_halves
from pipecompile.ir.timeline import Timeline
from pipecompile.schedule.simulator import simulate


def predict(
    program: Program, costed: CostedGraph, cluster: Cluster | None = None, step_seconds: float | Sequence[float] = 0.0
) -> Timeline:
    """The timeline of a program, from the costs of the graph that its plan divides.

    Args:
        program: of a plan of ``costed``, bare or lowered.
        costed: the costs of one microbatch.
        cluster: as for ``simulate``.
        step_seconds: as for ``simulate``.

    Raises:
        InputError, DeadlockError: as ``simulate``.
    """
    plan = program.plan
    halves = stage_halves(costed, plan, cluster) if program.split else None
    return simulate(program, stage_costs(costed, plan), cluster, step_seconds, halves=halves)
