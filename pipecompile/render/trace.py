"""Timelines as a trace for Perfetto and chrome://tracing: one process per timeline, one above the other.

    predicted   rank 0            F0 F1 .  B0 .  B1
                rank 0 transfers     -  -
                rank 1               F0 B0 F1 B1
    measured    rank 0            F0  F1  . B0 .  B1

Each timeline starts at 0. Times are microseconds, as the format wants them.

Source: Trace Event Format (Google, 2016), complete events and metadata.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from pipecompile.ir.instruction import Recv, Send
from pipecompile.ir.timeline import Timeline
from pipecompile.render.cells import KINDS, LETTERS, start_of

MICROSECONDS = 1e6


def trace(timelines: Mapping[str, Timeline]) -> str:
    """The JSON of timelines by name, such as ``{"predicted": ..., "measured": ...}``, in this order."""
    events = [event for place, item in enumerate(timelines.items()) for event in _events(place, *item)]
    return json.dumps({"displayTimeUnit": "ms", "traceEvents": events})


def _events(process: int, name: str, timeline: Timeline) -> Iterator[dict[str, Any]]:
    yield _metadata("process_name", process, 0, name=name)
    yield _metadata("process_sort_index", process, 0, sort_index=process)
    for rank in range(timeline.num_ranks):
        for thread, words in ((2 * rank, f"rank {rank}"), (2 * rank + 1, f"rank {rank} transfers")):
            if thread % 2 == 0 or any(s.rank == rank and isinstance(s.instruction, Send) for s in timeline.spans):
                yield _metadata("thread_name", process, thread, name=words)
                yield _metadata("thread_sort_index", process, thread, sort_index=thread)
    zero = start_of(timeline)
    for span in timeline.spans:
        i = span.instruction
        if isinstance(i, Recv):
            continue  # its Send is drawn
        transfer = isinstance(i, Send)
        facts = {"stage": i.stage, "microbatch": i.result.microbatch if isinstance(i, Send) else i.microbatch}
        yield {
            "name": str(i),
            "cat": "transfer" if isinstance(i, Send) else KINDS[LETTERS[type(i)]],
            "ph": "X",
            "ts": (span.start - zero) * MICROSECONDS,
            "dur": span.seconds * MICROSECONDS,
            "pid": process,
            "tid": 2 * span.rank + transfer,
            "args": facts,
        }


def _metadata(kind: str, process: int, thread: int, **arguments: str | int) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": process, "tid": thread, "args": arguments}
