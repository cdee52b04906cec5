"""The figures of a step for a logger: a flat dict from names to numbers, from its measured timelines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pipecompile.ir.instruction import Backward, BackwardWeight, Fetch, Forward, Offload, Recv, Send, Share
from pipecompile.ir.timeline import Timeline


def metrics(programs: Sequence[Timeline], ranks: int, peaks: Mapping[str, int | None]) -> dict[str, float]:
    """The figures of a step. What is not known is absent.

    Args:
        programs: the timelines of the step: one, or one of its forwards and one of its backwards.
        ranks: how many ranks they are of.
        peaks: bytes by the name of a device, or None where the device does not tell.

    Returns:
        ``step_seconds``: from the first start to the last end of each program, without what the caller computes.
        ``bubble``: the part of that time in which ranks are idle, from 0 to 1.
        ``microbatches``: their number.
        ``sent_bytes``: the values and gradients passed between ranks.
        ``stage_0_forward_seconds``, ``stage_0_backward_seconds``, ...: all microbatches together; gradients of weights
        count as backward.
        ``stage_0_other_seconds``, ...: sums of tied gradients, optimizer steps and copies of weights, if there are any.
        ``cuda_0_peak_bytes``, ...: of each device.
    """
    spans = [span for program in programs for span in program.spans]
    if not spans:
        return {}
    seconds = sum(program.makespan for program in programs)
    found: dict[str, float] = {"step_seconds": seconds}
    if seconds:
        busy = sum(span.seconds for span in spans if not isinstance(span.instruction, Send | Recv | Offload | Fetch))
        found["bubble"] = 1 - busy / (seconds * ranks)
    found["microbatches"] = float(len({_microbatch(span.instruction) for span in spans} - {None}))
    if all(program.sent_bytes for program in programs):
        found["sent_bytes"] = float(sum(sum(program.sent_bytes) for program in programs))
    stages: dict[str, float] = {}
    for span in sorted(spans, key=lambda span: span.instruction.stage):
        if kind := _kind(span.instruction):
            name = f"stage_{span.instruction.stage}_{kind}_seconds"
            stages[name] = stages.get(name, 0.0) + span.seconds
    known = {f"{name.replace(':', '_')}_peak_bytes": float(n) for name, n in peaks.items() if n is not None}
    return found | stages | known


def _microbatch(i: object) -> int | None:
    return i.microbatch if isinstance(i, Forward | Backward) else None


def _kind(i: object) -> str:
    match i:
        case Forward():
            return "forward"
        case Backward() | BackwardWeight():
            return "backward"
        case Send() | Recv() | Offload() | Fetch() | Share():
            return ""
    return "other"
