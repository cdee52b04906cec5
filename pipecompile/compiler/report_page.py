"""The report page of a capture, with the timelines of the last program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pipecompile.compiler.options import Options
from pipecompile.ir.program import Program
from pipecompile.ir.timeline import Timeline
from pipecompile.render.memory_levels import memory_levels
from pipecompile.render.page import MEASURED, PREDICTED, Page
from pipecompile.render.stage_graph import stage_graph
from pipecompile.runtime.compiled import Compiled


def page_of(
    compiled: Compiled,
    options: Options,
    program: Program,
    measured: Timeline | None,
    topics: Mapping[str, Sequence[str]],
) -> Page:
    """What ``render.html`` shows of a capture. Stages and costs are those of the capture that was planned.

    Args:
        compiled: the capture.
        options: of the pipeline.
        program: lowered, the last one or one to come.
        measured: when its instructions ran, if they have.
        topics: the lines of the report.
    """
    planned, predicted = compiled.planned, compiled.predict(program)
    return Page(
        view=stage_graph(planned.costed, planned.plan),
        model=type(compiled.captured.model).__name__,
        schedule=options.schedule,
        microbatches=len(program.microbatches),
        cluster=planned.cluster,
        timelines={PREDICTED: predicted, **({MEASURED: measured} if measured is not None else {})},
        memory=compiled.memory,
        levels=memory_levels(
            planned.costed, planned.plan, program, predicted, planned.work, planned.cluster, compiled.buffer_bytes
        ),
        topics=topics,
    )
