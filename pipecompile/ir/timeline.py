"""When each instruction ran, in a simulation or a measured run."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from pipecompile.ir.instruction import Fetch, Instruction, Offload, Recv, Send


@dataclass(frozen=True, slots=True)
class Span:
    """One instruction on one rank, in seconds from the start of the program."""

    rank: int
    instruction: Instruction
    start: float
    end: float

    @property
    def seconds(self) -> float:
        return self.end - self.start


@dataclass(frozen=True)
class Timeline:
    """When each instruction ran or will run, by rank and start.

        >>> from pipecompile.ir.instruction import Forward
        >>> spans = (Span(0, Forward(0, 0), 0.0, 1.0), Span(1, Forward(1, 0), 1.0, 2.0))
        >>> timeline = Timeline(spans, num_ranks=2)
        >>> timeline.makespan, timeline.busy(0), timeline.bubble
        (2.0, 1.0, 0.5)

    Attributes:
        spans: the instructions with their starts and ends, in seconds.
        num_ranks: the number of ranks, those without instructions too.
        peak_bytes: the peak memory of each rank in bytes, or empty if it is not known.
        sent_bytes: the bytes that each rank has sent to others, 0 for ranks of other processes, or empty if they are
            not known.
    """

    spans: tuple[Span, ...]
    num_ranks: int
    peak_bytes: tuple[int, ...] = ()
    sent_bytes: tuple[int, ...] = ()

    @cached_property
    def makespan(self) -> float:
        """Seconds from the first start to the last end."""
        if not self.spans:
            return 0.0
        return max(span.end for span in self.spans) - min(span.start for span in self.spans)

    def busy(self, rank: int) -> float:
        """Seconds in which a rank computes, without transfers and copies."""
        return self._busy.get(rank, 0.0)

    @cached_property
    def _busy(self) -> dict[int, float]:
        found: dict[int, float] = {}
        for span in self.spans:
            if not isinstance(span.instruction, Send | Recv | Offload | Fetch):
                found[span.rank] = found.get(span.rank, 0.0) + span.seconds
        return found

    @property
    def bubble(self) -> float:
        """The fraction of the makespan in which ranks are idle, averaged over all ranks."""
        total = self.makespan * self.num_ranks
        return 1 - sum(map(self.busy, range(self.num_ranks))) / total if total else 0.0

    def __str__(self) -> str:
        lines = [f"{self.makespan:.6g} s, bubble {self.bubble:.1%}"]
        for span in self.spans:
            lines.append(f"  rank {span.rank}  {span.start:.6g} - {span.end:.6g}  {span.instruction}")
        return "\n".join(lines)
