"""``PipelineView``: what a pipeline shows of itself: its plan, its stages, and figures of the last call."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipecompile.capture.locks import busy
from pipecompile.compiler.batches import Batches
from pipecompile.compiler.learn import Learning
from pipecompile.compiler.metrics import metrics
from pipecompile.compiler.options import Options
from pipecompile.compiler.report import Report, describe, scheduled
from pipecompile.compiler.report_page import page_of
from pipecompile.compiler.summary import summary
from pipecompile.errors import PipecompileError
from pipecompile.ir.graph import CostedGraph
from pipecompile.ir.instruction import Instruction
from pipecompile.ir.plan import Plan
from pipecompile.ir.program import Program
from pipecompile.ir.timeline import Timeline
from pipecompile.ops.accelerators import peak_memory
from pipecompile.ops.phases import Phases
from pipecompile.planning.memory import Memory
from pipecompile.render.html import write
from pipecompile.render.notebook import not_captured, page_html
from pipecompile.runtime.compiled import Compiled
from pipecompile.runtime.session import Session
from pipecompile.verify.proofs import Proofs
from pipecompile.verify.results import Proof


class PipelineView:
    """The part of a ``Pipeline`` that looks: it runs no call, and makes no plan.

    Args:
        model: the unsplit model.
        devices: one per rank.
        batches: the captures of the pipeline.
        session: what runs them.
    """

    def __init__(self, model: nn.Module, devices: Sequence[torch.device], batches: Batches, session: Session) -> None:
        self._model = model
        self.devices = tuple(devices)
        self._session = session
        self._batches = batches
        self._proofs = Proofs(batches)
        self._learning = Learning(batches, session)
        self._mapped: Counter[str] = Counter()  # batches of map() that ran alone, and why
        self._calls = 0
        self._phases = Phases()  # of the first call

    def __repr__(self) -> str:
        compiled = self._batches.last or self._batches.first
        stages = "not captured yet" if compiled is None else f"stages={compiled.plan.num_stages}"
        return (
            f"Pipeline({type(self.model).__name__}, schedule={self.schedule!r}, microbatches={self.microbatches}, "
            f"devices=({', '.join(map(str, self.devices))}), {stages})"
        )

    def __str__(self) -> str:
        """The pipeline, its stages with what was predicted of them, and the last step, if its devices work."""
        compiled = self._batches.last or self._batches.first
        if compiled is None:
            return repr(self)
        figures = {} if self.stopped_at else self.metrics()
        return "\n  ".join([repr(self), *summary(compiled.planned, self.devices, figures)])

    def _repr_html_(self) -> str:
        """A table of the stages with predicted and measured steps, for notebooks."""
        if not len(self._batches.captures):
            return not_captured(repr(self))
        return page_html(page_of(self._capture_in_use, self.options, *self._last_or_next))

    @property
    def options(self) -> Options:
        """The options of ``compile``, with what ``replan`` has changed."""
        return self._batches.options

    @property
    def model(self) -> nn.Module:
        """The unsplit model, whose parameters the stages train."""
        return self._model

    @property
    def signature(self) -> Callable[..., Any]:
        """A callable with the signature of a call."""
        return self._batches.signature

    @property
    def runs_the_hooks(self) -> bool:
        """Whether stages run the hooks on the model itself, because its output is passed to ``loss_fn``."""
        return self.options.loss_fn is not None

    @property
    def schedule(self) -> str:
        """The name of the schedule; of "auto", the one that was chosen, once a call has been captured."""
        return str(self.options.schedule)

    @property
    def microbatches(self) -> int:
        """The number of microbatches of a batch; a batch with fewer rows has fewer."""
        return self.options.microbatches

    @property
    def plan(self) -> Plan:
        """The assignment of nodes to stages, available after the first capture."""
        return self._capture_in_use.plan

    @property
    def stages(self) -> tuple[torch.fx.GraphModule, ...]:
        """The stage modules; ``stages[i].code`` is Python code, and parameters have their names in the model."""
        return tuple(stage.module for stage in self._capture_in_use.stages)

    @property
    def program(self) -> Program | None:
        """The program of the last call, if any."""
        return self._session.program

    @property
    def timeline(self) -> Timeline | None:
        """The measured times of the instructions of the last call, if any."""
        return self._session.timeline

    @property
    def stopped_at(self) -> tuple[Instruction, ...]:
        """After a kernel has failed: the instructions at which its device has stopped. Does not wait.

        Empty if all devices work, or if all that the pipeline had queued has run.
        """
        return self._session.stopped_at

    @property
    def predicted(self) -> Timeline:
        """The timeline of the last program, or of the schedule before the first call, predicted from the costs.

        Steps of optimizers inside the pipeline take what those of the last program took; before the first call, what a
        step of the optimizer takes on parameters of their sizes.
        """
        compiled, costed = self._capture_in_use, self._learning.corrected
        used = compiled if costed is None else compiled.recosted(costed)
        return used.predict(*self._last_or_next)

    @property
    def _last_or_next(self) -> tuple[Program, Timeline | None]:
        """The last program with its measured timeline; that of the schedule, if the present stages have not run."""
        compiled, program = self._capture_in_use, self._session.program
        if program is not None and program.plan is compiled.plan:
            return program, self._session.timeline
        bare = self.options.policy.program
        count, shares = self.microbatches, self._session.peers.are_several
        return compiled.program(lambda plan: bare(plan, count), ("train", count, shares), shares), None

    @property
    def memory(self) -> Memory:
        """The predicted peak memory of each stage and rank in training."""
        return self._capture_in_use.memory

    @property
    def costs(self) -> CostedGraph:
        """The costs that the plan was made from; ``costs.save(path)`` keeps them for ``compile(..., costs=path)``.

        In several processes, corrected by the first training steps.
        """
        return self._learning.corrected or self._capture_in_use.planned.costed

    @property
    def report(self) -> Report:
        """Notes on what is specialized, approximated, kept whole or recomputed."""
        found = describe(self._capture_in_use, self._session.timeline)
        return replace(
            found,
            warnings=(*found.warnings, *self._proofs.missing),
            captures=tuple(f"{number}: {reason}" for number, reason in enumerate(self._batches.captures.reasons, 1)),
            verified=tuple(self._proofs.said),
            timing=self._phases.timing,
            schedule=tuple(scheduled(self.options, self._capture_in_use)),
            links=(*found.links, *self._session.peers.said),
            learned=tuple(self._learning.said),
            rerun=tuple(f"{why} (times: {count})" for why, count in self._session.repeated.items()),
            mapped=tuple(f"{why} (batches: {count})" for why, count in self._mapped.items()),
            observed=tuple(f"{who} (programs: {count})" for who, count in self._session.observed.items()),
        )

    def save_report(self, path: str | Path) -> None:
        """Writes a page about the plan and the last call: timelines, memory, stages, and the lines of ``report``.

        It is one HTML file of about 1.5 MB that loads nothing, with figures to zoom and to point at (docs/report.md).

        Args:
            path: the file, which is replaced if it exists.

        Raises:
            InputError: bokeh is not installed, or the file cannot be written.
            PipecompileError: the model has not been captured yet.
        """
        topics = self.report.said
        write(page_of(self._capture_in_use, self.options, *self._last_or_next, topics), path)

    def metrics(self) -> dict[str, float]:
        """The figures of the last step, for TensorBoard or any other logger. What is not known is absent.

        Reads times that the step has noted, so it costs nothing while a step runs. Waits until the step's work on
        accelerators has run, like ``timeline``: to keep them busy, log every few steps. In several processes, the
        figures are those of this process's ranks.

        Returns:
            Numbers by name, without nesting. Before the first call, the last two only.

            - ``step_seconds``: from the first start to the last end, without what the caller computes in between.
            - ``bubble``: the part of that time in which ranks are idle, from 0 to 1.
            - ``microbatches``: their number.
            - ``sent_bytes``: the bytes of values and gradients passed between ranks; ranks of one device pass them by
              reference.
            - ``stage_0_forward_seconds``, ``stage_0_backward_seconds`` and so on: the seconds of a stage in the step,
              all microbatches together. ``stage_0_other_seconds``: sums of tied gradients, optimizer steps inside the
              pipeline and copies of weights, of stages that have any.
            - ``cuda_0_peak_bytes`` and so on: the most bytes of tensors on a device since the process began, or since
              ``torch.accelerator.reset_peak_memory_stats``. Absent for the CPU.
            - ``captures``, ``reruns``: how often the model was captured, and calls were rerun, since ``compile``.

        Raises:
            ExecutionError: a kernel of the step has failed.
        """
        devices = dict.fromkeys(lane.device for lane in self._session.lanes.values())
        figures = metrics(
            self._session.programs,
            len(self._session.lanes),
            {str(device): peak_memory(device) for device in devices},
        )
        reruns = sum(self._session.repeated.values())
        return {**figures, "captures": float(self.captures), "reruns": float(reruns)}

    @property
    def captures(self) -> int:
        """The number of captures of the model."""
        return len(self._batches.captures)

    @property
    def calls(self) -> int:
        """The number of calls that have returned."""
        return self._calls

    @property
    def proofs(self) -> tuple[Proof, ...]:
        """The last comparison of each capture with the unsplit model, with and without gradients."""
        return tuple(self._proofs.made.values())

    @property
    def versions(self) -> tuple[int, ...]:
        """For each stage, the largest number of weight versions alive at the same time.

        Source: weight stashing, PipeDream (Narayanan et al., SOSP 2019), section 3.3.
        """
        return tuple(weights.peak for weights in self._session.weights.values())

    @property
    def optimizers(self) -> tuple[torch.optim.Optimizer, ...]:
        """For schedules that step inside the pipeline: the optimizers of the stages that this process runs."""
        return self._session.optimizers(self._capture_in_use) if self.options.policy.is_asynchronous else ()

    @property
    def is_in_flight(self) -> bool:
        """Whether microbatches of an asynchronous schedule wait for their backwards, until the next call or flush."""
        return bool(self._session.stream.carried)

    @property
    def is_inside(self) -> bool:
        """Whether this thread runs the model's own Python in a call: in a capture or a comparison."""
        return self._session.turn in busy().holds

    @property
    def _capture_in_use(self) -> Compiled:
        compiled = self._batches.last or self._batches.first
        if compiled is None:
            raise PipecompileError(
                "the model has not been captured yet, it is captured at the first call; call the pipeline, or pass "
                "example_inputs= to compile()"
            )
        return compiled
