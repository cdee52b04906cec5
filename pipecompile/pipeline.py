"""``Pipeline``: what a split model adds to the model: plan, stages, program, timeline and report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipecompile.capture.locks import CAPTURING, busy
from pipecompile.capture.loss import could_be_losses, find_loss
from pipecompile.capture.state.caches import given_back
from pipecompile.capture.state.model_state import named_tensors
from pipecompile.compiler.batches import Batches, refuse_meta
from pipecompile.compiler.compile_call import replanned
from pipecompile.compiler.learn import Learning
from pipecompile.compiler.map_loader import Calls, mapped
from pipecompile.compiler.metrics import metrics
from pipecompile.compiler.options import Options, read_costs
from pipecompile.compiler.plan_call import reused
from pipecompile.compiler.report import Report, describe, scheduled
from pipecompile.compiler.report_page import page_of
from pipecompile.compiler.summary import summary
from pipecompile.compiler.surroundings import Substituted
from pipecompile.distributed.processes import Processes
from pipecompile.distributed.share import Share
from pipecompile.errors import ExecutionError, InputError, PipecompileError
from pipecompile.ir.graph import CostedGraph
from pipecompile.ir.plan import Plan
from pipecompile.ir.plan_options import PlanOptions
from pipecompile.ir.program import Instruction, Program
from pipecompile.ir.timeline import Timeline
from pipecompile.materialize.absent import NO_VALUES, Absent
from pipecompile.materialize.fill import fill
from pipecompile.ops.accelerators import peak_memory
from pipecompile.ops.phases import Phases, phase
from pipecompile.ops.torch_internals import _disable_dynamo
from pipecompile.planning.calibration import corrected
from pipecompile.planning.memory import Memory
from pipecompile.render.html import write
from pipecompile.render.notebook import not_captured, page_html
from pipecompile.runtime import steps
from pipecompile.runtime.batch import Batch
from pipecompile.runtime.compiled import Compiled
from pipecompile.runtime.observers import unobserved
from pipecompile.runtime.rerun import STOPPED
from pipecompile.runtime.session import Session
from pipecompile.runtime.substituted import called_with
from pipecompile.verify.prove import due, first_microbatch, prove
from pipecompile.verify.results import Proof, Verification
from pipecompile.verify.side_by_side import Trial
from pipecompile.verify.verify import Subject, verify


class Pipeline:
    """A model split into stages on devices: ``pipe.pipeline`` of the module that ``compile`` returns.

    Attributes:
        devices: one per rank.
        share: what this process has of the model, if several processes run the ranks.
        before_close: called by ``close``, for what goes on beside the calls.
        absent: what fills the model, if it has no values yet.
    """

    def __init__(
        self,
        model: nn.Module,
        devices: Sequence[torch.device],
        options: Options,
        processes: Processes | None = None,
        absent: Absent | None = None,
    ) -> None:
        self._model = model
        self.devices = tuple(devices)
        self.share = None if processes is None else Share(model, processes, options.fully_shard)
        self.absent = absent
        self._session = Session(devices, options.optimizer, processes)
        self._batches = Batches(model, self.devices, options, self._session.peers, self.share)
        self._batches.takes_meta = absent is not None
        self._proofs: dict[tuple[int, bool], Proof] = {}  # by the identity of the capture, and whether it trained
        self._left_out: dict[tuple[int, bool], str] = {}  # why a capture was not compared
        self.before_close: list[Callable[[], object]] = []
        self._mapped: Counter[str] = Counter()  # batches of map() that ran alone, and why
        self._calls = 0
        self._phases = Phases()  # of the first call
        self._learning = Learning(self._batches, self._session)

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

    # Properties

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
        """The timeline of the last program, or of the schedule before the first call, predicted from the costs."""
        return self._capture_in_use.predict(self._last_or_next[0])

    @property
    def _last_or_next(self) -> tuple[Program, Timeline | None]:
        """The last program with its measured timeline; that of the schedule, if the present stages have not run."""
        compiled, program = self._capture_in_use, self._session.program
        if program is not None and program.plan is compiled.plan:
            return program, self._session.timeline
        bare = self.options.policy.program
        return compiled.program(lambda plan: bare(plan, self.microbatches), ("train", self.microbatches)), None

    @property
    def memory(self) -> Memory:
        """The predicted peak memory of each stage and rank in training."""
        return self._capture_in_use.memory

    @property
    def costs(self) -> CostedGraph:
        """The costs that the plan was made from; ``costs.save(path)`` keeps them for ``compile(..., costs=path)``."""
        return self._capture_in_use.planned.costed

    @property
    def report(self) -> Report:
        """Notes on what is specialized, approximated, kept whole or recomputed."""
        kinds = {True: "training", False: "evaluation"}
        found = describe(self._capture_in_use, self._session.timeline)
        unproven = [f"{kinds[trains]}: {it.note}" for (_, trains), it in self._proofs.items() if not it.rows]
        unproven += [f"{kinds[trains]}: {why}" for (_, trains), why in self._left_out.items()]
        return replace(
            found,
            warnings=(*found.warnings, *unproven),
            captures=tuple(f"{number}: {reason}" for number, reason in enumerate(self._batches.captures.reasons, 1)),
            verified=tuple(f"{kinds[trains]}: {said}" for (_, trains), said in (self._proofs | self._left_out).items()),
            timing=self._phases.timing,
            schedule=tuple(scheduled(self.options, self._capture_in_use)),
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
        return tuple(self._proofs.values())

    @property
    def versions(self) -> tuple[int, ...]:
        """For each stage, the largest number of weight versions alive at the same time."""
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

    def refuse_inside(self) -> None:
        """Raises ``ReentryError`` if the present thread is in a call."""
        with self._session.turn.taken(again=False):
            return

    @property
    def _capture_in_use(self) -> Compiled:
        compiled = self._batches.last or self._batches.first
        if compiled is None:
            raise PipecompileError(
                "the model has not been captured yet, it is captured at the first call; call the pipeline, or pass "
                "example_inputs= to compile()"
            )
        return compiled

    # Calls

    def prepare(self, *args: Any, **kwargs: Any) -> None:
        """Captures, profiles and splits the model for a call, without running the call."""
        with self._session.turn.taken(again=False), self._recorded():
            batch = self._batches.of(args, kwargs)
            if self.share is not None or (self.absent is not None and self.absent.entries is not None):
                self._fill(batch)
            if self.share is not None and self.share.divides:  # before optimizers are made
                self._prove(batch)
                self.share.settle()

    @_disable_dynamo
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs a call. Hooks on the model itself run only if ``runs_the_hooks``."""
        with self._session.turn.taken(again=False), self._recorded():
            try:
                return self._call(*args, **kwargs)
            except Substituted:
                if self.options.policy.is_asynchronous:
                    raise
                with self._learning.paused():
                    return called_with(self.model, self._batches.own, self._call, args, kwargs)

    def map(self, loader: Iterable[Any]) -> Iterator[Any]:
        """Runs the batches of a loader without gradients, and yields their outputs in order.

        Each batch is one microbatch, and the stages work on different batches at a time: an output comes when as many
        batches have followed as there are stages on the longest path, and the rest come when the loader has ended. If
        the forward writes state, which the next batch may read, batches run one after another, and
        ``report.mapped`` says why. Ends its threads when it ends, or is closed.

        Args:
            loader: yields dicts of keyword arguments, tuples or lists of positional ones, or tensors. The last batch
                may be smaller.

        Yields:
            What the model returns for each batch, in its present mode; tensors are on the devices of their stages.

        Raises:
            InputError, CaptureError, PlanError, ExactnessError, ExecutionError: as a call, with the number of the
                batch, which counts from 0. Or the model was changed while batches were in the pipeline.
        """
        self._refuse_several("mapped over a loader")
        if self._session.closed:
            raise ExecutionError("the pipeline has been closed, and its threads have ended; compile the model again")
        return mapped(
            Calls(
                read=self._read_one,
                alone=self._run_one,
                session=lambda: Session(self.devices, None),
                note=lambda why: self._mapped.update([why]),
            ),
            loader,
        )

    def _read_one(self, arguments: tuple[tuple[Any, ...], dict[str, Any]]) -> Batch:
        """A batch of one microbatch, whose capture is made and verified if need be."""
        with self._session.turn.taken(again=False):
            if self._batches.first is None:
                self._fill(self._batches.of(*arguments))
            batch = self._batches.of(*arguments, microbatches=1)
            self._prove(batch)
            return batch

    def _run_one(self, batch: Batch, arguments: tuple[tuple[Any, ...], dict[str, Any]]) -> Any:
        with self._session.turn.taken(again=False):
            return given_back(arguments, self._output(batch))

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        last, batch = self._batches.last, self._batches.of(args, kwargs)
        if self._learning.look(last):
            self._proofs.clear()
            batch = self._batches.of(args, kwargs)
        self._fill(batch)
        self._prove(batch)
        if self.share is not None:
            self.share.settle()
        return given_back((args, kwargs), self._output(batch))

    def _output(self, batch: Batch) -> Any:
        """Runs a batch that has been verified; returns the model's output."""
        try:
            with phase("step") if self._calls == 0 else nullcontext():
                given = self._run(batch)
        except STOPPED:
            with suppress(KeyError):  # tensors that a stopped call did not compute
                self._leave(batch, {})
            raise
        output = batch.rebuild(given)
        self._leave(batch, given)
        self._calls += 1
        return output

    def _recorded(self) -> AbstractContextManager[None]:
        """A context whose phases are recorded for the report, until the first call has returned."""
        return self._phases.recorded() if self._calls == 0 else nullcontext()

    def _leave(self, batch: Batch, given: Mapping[str, Tensor]) -> None:
        with self._batches.states.followed() if batch.compiled.captured.attributes.are_followed else nullcontext():
            batch.leave(given)

    def _prove(self, batch: Batch) -> None:
        """Compares the call with that of the unsplit model, if a comparison is due."""
        captured = batch.compiled.captured
        trains = torch.is_grad_enabled() and any(output.requires_grad for output in captured.results)
        key = (id(batch.compiled), trains)
        if not due(self.options.verify, self._calls, key in self._proofs):
            return
        if self.share is not None and self.share.is_settled:
            self._left_out[key] = "not compared: no process has the whole model"
            return
        policy = self.options.policy
        one = policy.updates_each and self.model.training
        trial = Trial(
            model=self.model,
            batch=first_microbatch(batch) if one else replace(batch, part=None),
            schedule=policy.with_flush,
            devices=self.devices,
            loss_fn=self.options.loss_fn,
            loss=self.options.loss_output,
            trains=trains,
            batching=self.options.batching,
        )
        with CAPTURING.taken(), unobserved(), phase("verify"):
            self._proofs[key] = self._session.peers.shared(lambda: prove(trial))

    def _run(self, batch: Batch) -> dict[str, Tensor]:
        captured = batch.compiled.captured
        loss = find_loss(captured, self.options.loss_output)
        policy = self.options.policy
        streams = policy.is_asynchronous and self.model.training
        trains = torch.is_grad_enabled() and any(output.requires_grad for output in captured.results)
        if trains and streams and loss is None:
            several = ", ".join(could_be_losses(captured))
            seen = f"outputs {several} could each be the loss" if several else "the model does not return a loss"
            remedy = "name it with loss_output=" if several else "pass labels to the call, or loss_fn= to compile()"
            raise InputError(f"schedule={self.schedule!r} needs the loss inside the pipeline, but {seen}; {remedy}")
        if trains and loss is None and batch.part is not None:
            raise InputError(
                "the mesh has the dimension 'data', but the model does not return a loss, and no process has the "
                "outputs of the whole batch to compute one; pass labels to the call, or loss_fn= to compile()"
            )
        return steps.run(self._session, batch, loss, policy.program, policy if streams else None)

    def verify(self, *args: Any, **kwargs: Any) -> Verification:
        """Compares the pipeline with the unsplit model, on this call and on fresh inputs of this and of another shape.

        Compares loss, outputs, every gradient by name and buffers, in training and evaluation. Does not step, and
        leaves the model unchanged. The stages of an asynchronous schedule are run with a flush, since their weights lag
        by design.
        """
        self._refuse_several("verified after compile()")
        self._refuse_absent()
        subject = Subject(
            model=self.model,
            loss_fn=self.options.loss_fn,
            batch=self._batches.copied().of,  # later calls do not use its captures
            schedule=self.options.policy.with_flush,
            microbatches=self.microbatches,
            loss=self.options.loss_output,
            devices=self.devices,
            batching=self.options.batching,
        )
        with self._session.turn.taken(again=False):
            return verify(subject, args, kwargs)

    def replan(self, plan: PlanOptions | None = None, costs: str | Path | CostedGraph | None = None) -> Plan:
        """Makes a new plan, by default from the stage times of the last training step, and switches to it.

        Parameters move to the devices of their new stages. The state of an existing optimizer is not moved: with more
        than one kind of device, load its ``state_dict`` into itself to move it.

        Args:
            plan: replaces ``plan`` of ``compile``.
            costs: saved costs or a ``CostedGraph``, instead of the times of the last step.

        Raises:
            InputError: the pipeline has no plan or its optimizers step inside it; without ``costs``, the last call did
                not measure a training step on the planned capture; or ``plan`` or ``costs`` do not fit the model.
            PlanError: no plan satisfies ``plan``; the pipeline keeps its present plan.
        """
        self._refuse_several("planned anew")
        with self._session.turn.taken(again=False):
            first, timeline = self._batches.first, self._session.timeline
            if self._session.optimizer is not None:
                raise InputError(
                    f"replan() cannot move the optimizers that step inside a pipeline with schedule={self.schedule!r}; "
                    f"pass costs=pipe.pipeline.costs to a new compile after flush()"
                )
            if first is None:
                raise InputError("replan() has no plan to replace; call the pipeline first")
            given = read_costs(costs)
            if isinstance(given, str):
                raise InputError(f"costs={given!r} needs a batch, which replan() does not have; pass saved costs")
            if given is None:
                times = first.times(timeline) if timeline is not None and self._batches.last is first else ()
                if not times:
                    raise InputError(
                        "replan() needs the stage times of a training step on the planned capture, which the last call "
                        "did not measure; run a training step like the first call, or pass costs="
                    )
                costed = corrected(first.planned.costed, first.plan, times)
            else:
                costed = reused(given, first.graph)
            options = replace(self.options, plan=plan or self.options.plan, costs=costed)
            options.check(self.model, len(self.devices))
            compiled = replanned(first, costed, options, self.devices)
            self._learning.forget()
            self._batches.replace_first(options, compiled)
            self._proofs.clear()
            self._session.forget()
            return self.plan

    def flush(self) -> None:
        """Drains an asynchronous pipeline: runs every microbatch in flight to its end, including its update."""
        with self._session.turn.taken(again=False):
            steps.flush(self._session)

    def close(self) -> None:
        """Ends the pipeline's threads. It cannot be called afterwards. ``with pipe.pipeline:`` closes it at the end.

        In several processes, all of them close it, and each waits for the others. A checkpoint that is being written is
        completed first.

        Raises:
            CheckpointError: it could not be written.
            InputError: another process makes one more call.
        """
        try:
            for finish in self.before_close:
                finish()
        finally:
            self._end()

    def _end(self) -> None:
        self._session.close()
        if self.share is not None:
            self.share.processes.close()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            self.close()
            return
        if self.share is not None:
            self.share.processes.failure(error)  # the others learn why this one does not come
        with suppress(PipecompileError):  # of a checkpoint that is being written: the first error is the one to raise
            self.close()

    def copied(self, memo: dict[int, Any]) -> Pipeline:
        """A pipeline of a copy of the model, with the same placement; it captures the copy at its first call.

        Args:
            memo: the memo of ``copy.deepcopy``.

        Raises:
            PipecompileError: the pipeline is asynchronous; the state of its optimizers cannot be copied.
        """
        self._refuse_several("copied")
        self._refuse_absent()
        if self._session.optimizer is not None:
            raise PipecompileError(
                f"a pipeline with schedule={self.schedule!r} cannot be copied, because the state of the optimizers "
                f"inside it would be lost; call flush(), then compile copy.deepcopy(pipe.pipeline.model)"
            )
        copy = Pipeline(deepcopy(self.model, memo), self.devices, self.options)
        copy._batches.placement = self._batches.first or self._batches.placement
        return copy

    def __deepcopy__(self, memo: dict[int, Any]) -> Pipeline:
        return self.copied(memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickles (``torch.save``) the model and the options; the loaded pipeline plans and captures at its first call.

        Raises:
            PipecompileError: the pipeline is asynchronous; the state of its optimizers would be lost.
        """
        self._refuse_several("pickled")
        self._refuse_absent()
        if self._session.optimizer is not None:
            raise PipecompileError(
                f"a pipeline with schedule={self.schedule!r} cannot be pickled, because the state of the optimizers "
                f"inside it would be lost; call flush(), then save pipe.state_dict()"
            )
        return Pipeline, (self.model, self.devices, self.options)

    # Several processes

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> Tensor:
        """``torch.nn.utils.clip_grad_norm_`` of the whole model: all processes get the norm of all gradients.

        Args:
            max_norm: the largest norm.
            norm_type: the order p of the norm.

        Returns:
            The norm before. All processes must call this.

        Raises:
            InputError: the stages step inside the pipeline.
        """
        if self.options.policy.is_asynchronous:
            raise InputError(
                f"schedule={self.schedule!r} has used the gradients, stage by stage, when a call returns, so the norm "
                f"of the whole model is never known; clip the gradients of each stage in its optimizer: "
                f"optimizer.register_step_pre_hook, in the function that is passed as optimizer="
            )
        if self.share is None:
            return torch.nn.utils.clip_grad_norm_(self.model.parameters(), max_norm, norm_type)
        return self.share.clip_grad_norm_(max_norm, norm_type)

    def _refuse_several(self, done: str) -> None:
        if self.share is not None:
            raise InputError(
                f"a pipeline of several processes cannot be {done}, because no process has the whole model; do it with "
                f"a pipeline of one process (devices= instead of mesh=)"
            )

    # Values

    def _fill(self, batch: Batch) -> None:
        """Gives a model that has no values yet those that this process keeps."""
        if self.absent is None:
            return
        if self.share is None:
            kept: Container[str] = dict(named_tensors(self.model))
        else:
            kept = self.share.held
        fill(self.absent, batch.compiled, kept, self._gathered)
        self.absent = None
        self._batches.takes_meta = False
        if self.share is not None:
            self.share.settle()
        refuse_meta(batch.call)

    def _gathered(self, said: str) -> Sequence[str]:
        return [said] if self.share is None else self.share.processes.all.gathered(said)

    def _refuse_absent(self) -> None:
        if self.absent is not None:
            raise InputError(NO_VALUES)
