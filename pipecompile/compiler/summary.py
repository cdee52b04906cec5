"""What ``print(pipe.pipeline)`` prints below its first line: the stages, and the last step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from pipecompile.ir.units import bytes_text, count_text, plural, seconds_text
from pipecompile.planning.planned import Planned
from pipecompile.render.labels import modules_line
from pipecompile.render.stage_graph import stage_graph


def summary(planned: Planned, devices: Sequence[torch.device], figures: Mapping[str, float]) -> Iterator[str]:
    """A line for each stage, with what was predicted of it, and one for the last step, if there was one.

    Args:
        planned: the plan.
        devices: one per rank.
        figures: of the last step (see ``metrics``).
    """
    plan = planned.plan
    view, memory = stage_graph(planned.costed, plan), planned.memory()
    for stage, seen in enumerate(view.stages):
        first = plan.replica_of[stage]
        rank = plan.rank_of[stage]
        what = f"a replica of stage {first}" if first != stage else modules_line(view, stage)
        cost = planned.stage_costs[stage]
        times = f"{seconds_text(cost.forward)} forward, {seconds_text(cost.backward)} backward per microbatch"
        size = f"{count_text(seen.num_parameters)} parameters, peak {bytes_text(memory.stages[stage].total)}"
        yield f"stage {stage} on rank {rank}, {devices[rank]}: {what}; {size}; {times}"
    yield f"predicted from costs: {planned.costed.origin}"
    if "step_seconds" in figures:
        step, captures = figures["step_seconds"], int(figures["captures"])
        bubble = f", bubble {figures['bubble']:.1%}" if "bubble" in figures else ""
        yield f"last step: {seconds_text(step)}{bubble}; {plural(captures, 'capture')}"
