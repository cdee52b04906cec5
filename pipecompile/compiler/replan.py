"""Makes a new plan of a pipeline that has run, from the times of its last training step or from given costs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from pipecompile.compiler.batches import Batches
from pipecompile.compiler.capture_cache import Captures
from pipecompile.compiler.compile_call import following, replanned
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

    In several processes the first one plans, from the times of all.

    Args:
        batches: the captures of the pipeline. They stay as they are; parameters move to the devices of the new stages.
        session: knows the times of the last step.
        plan: replaces that of the options.
        costs: instead of the times of the last step.

    Raises:
        InputError, PlanError: as ``Pipeline.replan``.
    """
    first, timeline, peers = batches.first, session.timeline, session.peers
    if session.optimizer is not None:
        raise InputError(
            f"replan() cannot move the optimizers that step inside a pipeline with "
            f"schedule={str(batches.options.schedule)!r}; pass costs=pipe.pipeline.costs to a new compile after flush()"
        )
    if first is None:
        raise InputError("replan() has no plan to replace; call the pipeline first")
    costed = _given(costs, first)
    if costed is None:
        if peers.are_several and timeline is not None:
            spans = (span for each in peers.of_each(timeline.spans) for span in each)
            timeline = Timeline(tuple(spans), timeline.num_ranks)
        costed = _measured(first, timeline if session.has_run(first) else None)
    options = replace(batches.options, plan=plan or batches.options.plan, costs=costed)
    if options.plan.replicas is not None and not options.policy.takes_replicas:  # what was chosen gives way
        options = replace(options, found="")
    options.check(batches.model, len(batches.devices))
    return options, replanned(first, costed, options, batches.devices, peers)


def others(batches: Batches, first: Compiled) -> tuple[Captures, tuple[Compiled, ...]]:
    """All captures cut along the plan of ``first``, and those besides it.

    Raises:
        InputError: one of them has no such cut.
    """
    found: list[Compiled] = []

    def follow(other: Compiled) -> Compiled:
        cut = following(other, first, batches.options, batches.devices)
        if cut is None:
            raise InputError(
                "replan() found a plan that another call of the model cannot follow, whose values would flow backward; "
                "pass plan=PlanOptions(...) with other constraints"
            )
        found.append(cut)
        return cut

    assert batches.first is not None
    return batches.captures.recut(batches.first, first, follow), tuple(found)


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
