"""``Page``: what the report page shows of a pipeline or of a plan. ``html`` draws it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pipecompile.ir.cluster import Cluster
from pipecompile.ir.instruction import Backward, Forward
from pipecompile.ir.timeline import Timeline
from pipecompile.ir.units import seconds_text
from pipecompile.planning.memory import Memory
from pipecompile.render.stage_graph import StageGraph

MOST_DEVICES = 8  # that are listed
APART = 5.0  # times as long, a timeline leaves nothing to see of another one on its axis
PREDICTED, MEASURED = "predicted", "measured"


@dataclass(frozen=True, slots=True)
class Level:
    """The bytes that a rank holds for a while, in seconds from the start of the timeline."""

    start: float
    end: float
    nbytes: int
    words: str  # what happens meanwhile


@dataclass(frozen=True)
class Page:
    """What a report page shows. Only ``view`` is always known.

    Attributes:
        view: the stages.
        model: the name of the model.
        schedule: its name.
        microbatches: per step.
        cluster: the devices, by rank, with their memory.
        timelines: of one program, by ``PREDICTED`` and ``MEASURED``.
        memory: the predicted peak of each stage and rank.
        levels: the predicted bytes of each rank over the predicted timeline.
        topics: facts in words, by topic, as in ``Report``.
    """

    view: StageGraph
    model: str = ""
    schedule: str = ""
    microbatches: int = 0
    cluster: Cluster | None = None
    timelines: Mapping[str, Timeline] = field(default_factory=dict)
    memory: Memory | None = None
    levels: tuple[tuple[Level, ...], ...] = ()
    topics: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def heading(self) -> str:
        """``"GPT2LMHeadModel in 4 stages, 1f1b"``."""
        count = len(self.view.stages)
        split = f"{count} pipeline stage{'s' if count != 1 else ''}"
        return ", ".join(filter(None, [f"{self.model} in {split}" if self.model else split, self.schedule]))

    @property
    def steps(self) -> dict[str, str]:
        """The seconds and the bubble of the program, by the name of its timeline."""
        return {name: _step(timeline) for name, timeline in self.timelines.items()}

    @property
    def is_on_one_axis(self) -> bool:
        """Whether the timelines are of lengths that one time axis can show."""
        lengths = [timeline.makespan for timeline in self.timelines.values()]
        return not lengths or max(lengths) <= APART * min(lengths)

    @property
    def part(self) -> str:
        """What of a step the program is: ``"step"``, or ``"forward"`` or ``"backward"`` alone."""
        kinds = {type(span.instruction) for timeline in self.timelines.values() for span in timeline.spans}
        if Backward not in kinds and Forward in kinds:
            return "forward"
        return "backward" if Forward not in kinds and Backward in kinds else "step"

    @property
    def costs(self) -> str:
        """Where the costs come from."""
        costed = self.view.costed
        return costed.origin if costed.measured else f"{costed.origin}, not measured"

    def device(self, rank: int) -> str:
        """The device of a rank: ``"cuda:0"``; empty if it is not known."""
        return "" if self.cluster is None else self.cluster.devices[rank].name

    def limit(self, rank: int) -> int | None:
        """The memory of the device of a rank in bytes, if it is known."""
        return None if self.cluster is None else self.cluster.devices[rank].memory

    @property
    def devices(self) -> str:
        """The devices in the order of ranks: ``"4x cpu"``, ``"cuda:0, cuda:1"``, ``"cuda:0 … cuda:63 (64)"``."""
        names = [self.device(rank) for rank in range(self.view.plan.num_ranks if self.cluster else 0)]
        if len(names) > 1 and len(set(names)) == 1:
            return f"{len(names)}x {names[0]}"
        return ", ".join(names) if len(names) <= MOST_DEVICES else f"{names[0]} … {names[-1]} ({len(names)})"


def _step(timeline: Timeline) -> str:
    ranks = sorted({span.rank for span in timeline.spans})
    if len(ranks) < timeline.num_ranks:  # the others are in other processes
        return f"{seconds_text(timeline.makespan)} on rank {', '.join(map(str, ranks))} of {timeline.num_ranks}"
    return f"{seconds_text(timeline.makespan)}, bubble {timeline.bubble:.0%}"
