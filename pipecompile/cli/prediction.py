"""What ``pipecompile plan`` shows of a plan: tables and the predicted time of a step, as text or as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.text import Text

from pipecompile.ir.json_io import converter
from pipecompile.ir.plan_quality import known
from pipecompile.ir.program import Program
from pipecompile.ir.timeline import Timeline
from pipecompile.ir.units import seconds_text
from pipecompile.planning.joint_choice import told
from pipecompile.planning.memory import Memory
from pipecompile.planning.planned import Planned
from pipecompile.planning.predict import predict
from pipecompile.planning.schedule_choice import microbatches_text
from pipecompile.render.memory_levels import memory_levels
from pipecompile.render.page import PREDICTED, Page
from pipecompile.render.stage_graph import StageGraph, stage_graph
from pipecompile.render.table import memory_table, table
from pipecompile.schedule import SCHEDULES


@dataclass(frozen=True)
class Prediction:
    """A plan with the memory and the time of a step that are predicted from it.

    Args:
        planned: the plan.
        schedule: the name of the schedule.
        view: the stages.
        memory: the peak memory in training.
        timeline: the step.
        program: what was simulated.
        model: the name of the model.
        topics: facts on its capture, in words.
    """

    planned: Planned
    schedule: str
    view: StageGraph
    memory: Memory
    timeline: Timeline
    program: Program
    model: str = ""
    topics: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @classmethod
    def of(
        cls, planned: Planned, schedule: str, model: str = "", topics: Mapping[str, Sequence[str]] | None = None
    ) -> Prediction:
        """The prediction for a schedule, by its name."""
        program = SCHEDULES[schedule].program(planned.plan, planned.work.microbatches)
        timeline = predict(program, planned.costed, planned.cluster)
        return cls(
            planned=planned,
            schedule=schedule,
            view=stage_graph(planned.costed, planned.plan),
            memory=planned.memory(),
            timeline=timeline,
            program=program,
            model=model,
            topics=topics or {},
        )

    @property
    def page(self) -> Page:
        """What the report page shows of it."""
        it = self.planned
        return Page(
            view=self.view,
            model=self.model,
            schedule=self.schedule,
            microbatches=it.work.microbatches,
            cluster=it.cluster,
            timelines={PREDICTED: self.timeline},
            memory=self.memory,
            levels=memory_levels(it.costed, it.plan, self.program, self.timeline, it.work, it.cluster),
            topics={**self.topics, "plan": [known(it.plan.quality)], "replicas": [*map(str, it.candidates)]},
        )

    def print_to(self, console: Console) -> None:
        """Prints the tables and the prediction."""
        console.print(table(self.view, console.width))
        console.print(memory_table(self.memory, self.planned.plan, self.planned.cluster))
        console.print(self._step())
        for line in self._comparison():
            console.print(Text(line))

    def facts(self) -> dict[str, Any]:
        """The same as JSON: seconds and bytes per microbatch, except those of ``step``."""
        work, plan = self.planned.work, self.planned.plan
        quality = plan.quality
        return {
            "schedule": self.schedule,
            "microbatches": work.microbatches,
            "costs": self.planned.costed.origin,
            "balance": self.view.balance,
            "step": {
                "seconds": self.timeline.makespan,
                "bubble": self.timeline.bubble,
                "peak_bytes": list(self.memory.ranks),
            },
            "plan": quality
            and {"bottleneck": quality.bottleneck, "lower_bound": quality.lower_bound, "proven": quality.proven},
            "stages": [self._stage(index) for index in range(plan.num_stages)],
            "channels": [{"source": it.source, "target": it.target, "bytes": it.nbytes} for it in plan.channels],
            "tied": [{"parameter": it.parameter, "stages": it.stages, "bytes": it.nbytes} for it in plan.tied],
            "cluster": converter.unstructure(self.planned.cluster),
            "candidates": [
                {"replicas": it.replicas, "seconds": it.seconds, "refused": it.refused}
                for it in self.planned.candidates
            ],
            "schedules": [
                {
                    "schedule": it.schedule,
                    "stages_per_rank": it.per_rank,
                    "microbatches": it.microbatches,
                    "seconds": it.seconds,
                    "peak_bytes": it.peak_bytes,
                    "recomputed": it.recomputed,
                    "offloaded": it.offloaded,
                    "refused": it.refused,
                    "least": it.least,
                }
                for it in self.planned.weighed
            ],
        }

    def _stage(self, index: int) -> dict[str, Any]:
        stage, memory, plan = self.view.stages[index], self.memory.stages[index], self.planned.plan
        halves = self.planned.stage_halves[index]
        return {
            "stage": index,
            "rank": stage.rank,
            "modules": list(stage.blocks),
            "num_parameters": stage.num_parameters,
            "forward": stage.cost.forward,
            "backward": stage.cost.backward,
            "split": {"forward": halves.forward, "backward": halves.backward, "weights": halves.weights},
            "parameter_bytes": stage.cost.parameter_bytes,
            "saved_bytes": stage.cost.saved_bytes,
            "bytes_in": stage.bytes_in,
            "bytes_out": stage.bytes_out,
            "recomputed": index in plan.recomputed,
            "offloaded": index in plan.offloaded,
            "replica_of": plan.replica_of[index],
            "memory": {**dict(memory.by_kind()), "all": memory.total},
        }

    def _step(self) -> Text:
        microbatches = self.planned.work.microbatches
        alone, step = microbatches * self.planned.costed.seconds, self.timeline.makespan
        times = f" (speedup {alone / step:.2f}x)" if step else ""
        what = f"{self.schedule}, {microbatches_text(microbatches)}"
        return Text.assemble(
            f"plan: {known(self.planned.plan.quality)}\n{what}: predicted step ",
            (seconds_text(step), "bold"),
            f", bubble {self.timeline.bubble:.1%}\none device: {seconds_text(alone)}{times}",
        )

    def _comparison(self) -> Iterator[str]:
        """The candidates that were compared to choose the number of devices per stage, or the schedule."""
        if self.planned.candidates:
            yield "devices per stage; the step includes sending new weights to replicas:"
            yield from map(str, self.planned.candidates)
        if self.planned.weighed:
            yield "schedules, with the runtime's time for each computation, and for backwards that are split:"
            yield from told(self.planned.weighed)
