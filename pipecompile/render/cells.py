"""The content shared by all drawings of a timeline: cells for computations, wires for transfers, and labels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import floor, log10

from pipecompile.ir.instruction import (
    Backward,
    BackwardWeight,
    Compute,
    Copy,
    Fetch,
    Forward,
    Offload,
    Recv,
    Reduce,
    Refresh,
    Send,
    Share,
    Step,
    Update,
)
from pipecompile.ir.timeline import Span, Timeline
from pipecompile.ir.units import bytes_text, seconds_text

LETTERS = {
    Forward: "F",
    Backward: "B",
    BackwardWeight: "W",
    Reduce: "R",
    Step: "S",
    Update: "U",
    Refresh: "P",
    Share: "A",
}
COPIES = {Offload: "H", Fetch: "G"}
KINDS = {
    "F": "forward",
    "B": "backward",
    "W": "weights",
    "R": "reduce",
    "S": "step",
    "U": "update",
    "P": "refresh",
    "A": "share",
}
COPY_KINDS = {"H": "to host", "G": "from host"}
SHADES = {  # for even and odd microbatches, so that neighbors need no border; white text is readable on each
    "F": ("#2f7ed8", "#225fa6"),
    "B": ("#d1571c", "#a8441a"),
    "W": ("#a86b00", "#855500"),
    "R": ("#0f7f74", "#0b625a"),
    "S": ("#7a4fb5", "#5f3b91"),
    "U": ("#a0468f", "#7d3670"),
    "P": ("#66707a", "#4d565e"),
    "A": ("#b0415a", "#8c3247"),
    "H": ("#3d8b3d", "#2f6d2f"),
    "G": ("#8a8f1f", "#6b6f17"),
}


@dataclass(frozen=True, slots=True)
class Cell:
    """A computation with a duration, in seconds from the start of the timeline."""

    rank: int
    kind: str  # F, B, W, R, S, U, P or A; H or G of copies
    label: str  # "F0"; "2F0" if a rank runs several stages
    start: float
    end: float
    shade: str
    words: str  # full description


@dataclass(frozen=True, slots=True)
class Wire:
    """A transfer, in seconds from the start of the timeline."""

    source: int  # rank
    target: int  # rank
    start: float
    end: float
    words: str


def cells(timeline: Timeline) -> list[Cell]:
    """The computations, by rank and start, without those of zero duration."""
    several, zero = _several(timeline), start_of(timeline)
    return [
        _cell(i, span, zero, several)
        for span in sorted(timeline.spans, key=lambda span: (span.rank, span.start))
        if span.seconds > 0 and not isinstance(i := span.instruction, Send | Recv | Offload | Fetch)
    ]


def copies(timeline: Timeline) -> list[Cell]:
    """The copies of activations to the host and back, by rank and start. They overlap with computations."""
    several, zero = _several(timeline), start_of(timeline)
    return [
        _cell(i, span, zero, several)
        for span in sorted(timeline.spans, key=lambda span: (span.rank, span.start))
        if span.seconds > 0 and isinstance(i := span.instruction, Offload | Fetch)
    ]


def _several(timeline: Timeline) -> bool:
    """Whether a rank runs several stages."""
    of_ranks = Send | Recv | Share  # which ranks may have of a stage that they do not run
    ranks = {(s.rank, s.instruction.stage) for s in timeline.spans if not isinstance(s.instruction, of_ranks)}
    return len(ranks) > len({rank for rank, _ in ranks})


def _cell(i: Compute | Copy, span: Span, zero: float, several: bool) -> Cell:
    kind = COPIES[type(i)] if isinstance(i, Offload | Fetch) else LETTERS[type(i)]
    label = f"{i.stage if several else ''}{kind}{i.microbatch}"
    what = f"copy {word_of(kind)}" if kind in COPY_KINDS else word_of(kind)
    words = f"{i}: {what} of stage {i.stage}, microbatch {i.microbatch}; {_when(span, zero)}"
    shade = SHADES[kind][i.microbatch % 2]
    begin, end = span.start - zero, span.end - zero
    return Cell(rank=span.rank, kind=kind, label=label, start=begin, end=end, shade=shade, words=words)


def wires(timeline: Timeline) -> Iterator[Wire]:
    """The transfers, each from the start of its Send to the end of its Recv."""
    received = {span.instruction: span for span in timeline.spans if isinstance(span.instruction, Recv)}
    zero = start_of(timeline)
    for span in timeline.spans:
        if isinstance(i := span.instruction, Send) and (half := received.get(Recv(i.result, i.target))):
            to = "" if isinstance(i.result, Share) else f"stage {i.target} on "
            words = f"{i}: to {to}rank {half.rank}; {_when(Span(0, i, span.start, half.end), zero)}"
            begin, end = span.start - zero, max(span.start, half.end) - zero  # a measured Recv may be posted earlier
            yield Wire(source=span.rank, target=half.rank, start=begin, end=end, words=words)


def start_of(timeline: Timeline) -> float:
    return min((span.start for span in timeline.spans), default=0.0)


def drawn_kinds(timeline: Timeline) -> list[str]:
    """The kinds of computations and copies with a cell, in the order of the legend."""
    drawn = {cell.kind for cell in (*cells(timeline), *copies(timeline))}
    return [kind for kind in (*KINDS, *COPY_KINDS) if kind in drawn]


def word_of(kind: str) -> str:
    """What the letter of a cell stands for."""
    return KINDS.get(kind) or COPY_KINDS[kind]


def summary(timeline: Timeline) -> str:
    """``"makespan 33.0 s · bubble 27.3 %"``."""
    return f"makespan {seconds_text(timeline.makespan)} · bubble {timeline.bubble:.1%}".replace("%", " %")


def busy_text(timeline: Timeline, rank: int) -> str:
    return f"{timeline.busy(rank) / (timeline.makespan or 1.0):.0%}".replace("%", " %")


def peak_text(timeline: Timeline, rank: int) -> str:
    """The peak memory of a rank; empty if it is not known."""
    return bytes_text(timeline.peak_bytes[rank]) if any(timeline.peak_bytes) else ""


def ticks(makespan: float, most: int) -> list[float]:
    """Round times for an axis, from 0 to the makespan, in at most ``most`` steps."""
    if makespan <= 0:
        return [0.0]
    rough = makespan / max(1, most)
    power = 10.0 ** floor(log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))
    return [step * n for n in range(int(makespan / step + 1e-9) + 1)]


def _when(span: Span, zero: float) -> str:
    return (
        f"{seconds_text(span.start - zero)} to {seconds_text(span.end - zero)}, duration {seconds_text(span.seconds)}"
    )
