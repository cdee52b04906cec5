"""Timelines as a trace for Perfetto and chrome://tracing: one process per timeline, one above the other.

    predicted   rank 0            F0 F1 .  B0 .  B1
                rank 0 transfers     -  -
                rank 0 to host       -
                rank 0 from host           -
                rank 1               F0 B0 F1 B1
    measured    rank 0            F0  F1  . B0 .  B1

Each timeline starts at 0. Times are microseconds, as the format wants them.

Source: Trace Event Format (Google, 2016), complete events and metadata.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from pipecompile.ir.instruction import Compute, Copy, Fetch, Offload, Recv, Send
from pipecompile.ir.timeline import Timeline
from pipecompile.render.cells import COPIES, COPY_KINDS, KINDS, LETTERS, start_of

MICROSECONDS = 1e6
_APART = (Send, Offload, Fetch)  # in lines of their own, since they overlap with computations


def trace(timelines: Mapping[str, Timeline]) -> str:
    """The JSON of timelines by name, such as ``{"predicted": ..., "measured": ...}``, in this order."""
    events = [event for place, item in enumerate(timelines.items()) for event in _events(place, *item)]
    return json.dumps({"displayTimeUnit": "ms", "traceEvents": events})


def _events(process: int, name: str, timeline: Timeline) -> Iterator[dict[str, Any]]:
    yield _metadata("process_name", process, 0, name=name)
    yield _metadata("process_sort_index", process, 0, sort_index=process)
    for rank in range(timeline.num_ranks):
        kinds = {type(s.instruction) for s in timeline.spans if s.rank == rank}
        for thread, words, kind in (
            (_thread(rank), f"rank {rank}", None),
            (_thread(rank, Send), f"rank {rank} transfers", Send),
            (_thread(rank, Offload), f"rank {rank} to host", Offload),
            (_thread(rank, Fetch), f"rank {rank} from host", Fetch),
        ):
            if kind is None or kind in kinds:
                yield _metadata("thread_name", process, thread, name=words)
                yield _metadata("thread_sort_index", process, thread, sort_index=thread)
    zero = start_of(timeline)
    for span in timeline.spans:
        i = span.instruction
        if isinstance(i, Recv):
            continue  # its Send is drawn
        facts = {"stage": i.stage, "microbatch": i.result.microbatch if isinstance(i, Send) else i.microbatch}
        yield {
            "name": str(i),
            "cat": _category(i),
            "ph": "X",
            "ts": (span.start - zero) * MICROSECONDS,
            "dur": span.seconds * MICROSECONDS,
            "pid": process,
            "tid": _thread(span.rank, type(i)),
            "args": facts,
        }


def _thread(rank: int, kind: type | None = None) -> int:
    """The number of the line in which a rank's instructions of a kind are."""
    return 4 * rank + (1 + _APART.index(kind) if kind in _APART else 0)


def _category(i: Compute | Send | Copy) -> str:
    if isinstance(i, Send):
        return "transfer"
    return f"copy {COPY_KINDS[COPIES[type(i)]]}" if isinstance(i, Offload | Fetch) else KINDS[LETTERS[type(i)]]


def _metadata(kind: str, process: int, thread: int, **arguments: str | int) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": process, "tid": thread, "args": arguments}
