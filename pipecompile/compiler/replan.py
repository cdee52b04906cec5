"""Makes a new plan of a pipeline that has run, from the times of its last training step or from given costs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from pipecompile.compiler.batches import Batches
from pipecompile.compiler.compile_call import replanned
from pipecompile.compiler.options import Options, read_costs
from pipecompile.compiler.plan_call import reused
from pipecompile.errors import InputError
from pipecompile.ir.graph import CostedGraph
from pipecompile.ir.plan_options import PlanOptions
from pipecompile.ir.timeline import Timeline
from pipecompile.planning.calibration import corrected
from pipecompile.runtime.compiled import Compiled
from pipecompile.runtime.session import Session


def replan(
    batches: Batches, session: Session, plan: PlanOptions | None, costs: str | Path | CostedGraph | None
) -> tuple[Options, Compiled]:
    """The options with what was asked for, and the first capture cut along a new plan; see ``Pipeline.replan``.

    Args:
        batches: the captures of the pipeline. They stay as they are; parameters move to the devices of the new stages.
        session: knows the times of the last step.
        plan: replaces that of the options.
        costs: instead of the times of the last step.

    Raises:
        InputError, PlanError: as ``Pipeline.replan``.
    """
    first, timeline = batches.first, session.timeline
    if session.optimizer is not None:
        raise InputError(
            f"replan() cannot move the optimizers that step inside a pipeline with "
            f"schedule={str(batches.options.schedule)!r}; pass costs=pipe.pipeline.costs to a new compile after flush()"
        )
    if first is None:
        raise InputError("replan() has no plan to replace; call the pipeline first")
    costed = _given(costs, first)
    if costed is None:
        costed = _measured(first, timeline if batches.last is first else None)
    options = replace(batches.options, plan=plan or batches.options.plan, costs=costed)
    options.check(batches.model, len(batches.devices))
    return options, replanned(first, costed, options, batches.devices)


def _given(costs: str | Path | CostedGraph | None, first: Compiled) -> CostedGraph | None:
    given = read_costs(costs)
    if isinstance(given, str):
        raise InputError(f"costs={given!r} needs a batch, which replan() does not have; pass saved costs")
    return None if given is None else reused(given, first.graph)


def _measured(first: Compiled, timeline: Timeline | None) -> CostedGraph:
    """The costs of the plan, corrected by a step on its capture."""
    times = () if timeline is None else first.times(timeline)
    if not times:
        raise InputError(
            "replan() needs the stage times of a training step on the planned capture, which the last call did not "
            "measure; run a training step like the first call, or pass costs="
        )
    return corrected(first.planned.costed, first.plan, times)
