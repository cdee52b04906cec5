"""The report page of a capture, with the timelines of the last program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

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
    topics: Mapping[str, Sequence[str]] | None = None,
) -> Page:
    """What ``render.html`` shows of a capture. Stages and costs are those of the capture that was planned.

    Args:
        compiled: the capture.
        options: of the pipeline.
        program: lowered, the last one or one to come.
        measured: when its instructions ran, if they have.
        topics: the lines of the report. Without them the page is for a notebook, and has no memory over time.
    """
    planned, predicted = compiled.planned, compiled.predict(program, measured)
    page = Page(
        view=stage_graph(planned.costed, planned.plan),
        model=type(compiled.captured.model).__name__,
        schedule=str(options.schedule),
        microbatches=len(program.microbatches) or options.microbatches,
        cluster=planned.cluster,
        timelines={PREDICTED: predicted, **({MEASURED: measured} if measured is not None else {})},
        memory=compiled.memory,
    )
    if topics is None:
        return page
    costed, plan, cluster = planned.costed, planned.plan, planned.cluster
    levels = memory_levels(costed, plan, program, predicted, planned.work, cluster, compiled.buffer_bytes)
    return replace(page, levels=levels, topics=topics)
