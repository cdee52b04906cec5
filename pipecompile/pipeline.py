"""``Pipeline``: what a split model adds to the model, and the calls that run it."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipecompile.capture.state.caches import given_back
from pipecompile.capture.state.model_state import named_tensors
from pipecompile.compiler.batches import Batches, refuse_meta
from pipecompile.compiler.map_loader import Calls, mapped
from pipecompile.compiler.options import Options
from pipecompile.compiler.replan import others, replan
from pipecompile.compiler.run_batch import run_batch
from pipecompile.compiler.surroundings import Substituted
from pipecompile.compiler.told_options import told_replan
from pipecompile.distributed.grad_scaler import GradScaler
from pipecompile.distributed.processes import Processes
from pipecompile.distributed.share import Share
from pipecompile.distributed.worker import is_lost
from pipecompile.errors import ExecutionError, InputError, PipecompileError
from pipecompile.ir.graph import CostedGraph
from pipecompile.ir.plan import Plan
from pipecompile.ir.plan_options import PlanOptions
from pipecompile.materialize.absent import NO_VALUES, Absent
from pipecompile.materialize.fill import fill
from pipecompile.ops.phases import phase
from pipecompile.ops.torch_internals import _disable_dynamo
from pipecompile.pipeline_view import PipelineView
from pipecompile.runtime import steps
from pipecompile.runtime.batch import Batch
from pipecompile.runtime.rerun import STOPPED
from pipecompile.runtime.session import Session
from pipecompile.runtime.substituted import called_with
from pipecompile.verify.results import Verification
from pipecompile.verify.verify import Subject, verify


class Pipeline(PipelineView):
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
        self.share = None if processes is None else Share(model, processes, options.fully_shard)
        session = Session(devices, options.optimizer, processes)
        batches = Batches(model, tuple(devices), options, session.peers, self.share)
        super().__init__(model, devices, batches, session)
        self.absent = absent
        batches.takes_meta = absent is not None
        self.before_close: list[Callable[[], object]] = []

    def refuse_inside(self) -> None:
        """Raises ``ReentryError`` if the present thread is in a call."""
        with self._session.turn.taken(again=False):
            return

    # Calls

    def prepare(self, *args: Any, **kwargs: Any) -> None:
        """Captures, profiles and splits the model for a call, without running the call."""
        with self._session.turn.taken(again=False), self._recorded():
            batch = self._batches.of(args, kwargs)
            if self.share is not None or (self.absent is not None and self.absent.entries is not None):
                self._fill(batch)
            if self.share is not None and self.share.divides:  # before optimizers are made
                self._proofs.look(batch, self._calls)
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
            self._proofs.look(batch, self._calls)
            return batch

    def _run_one(self, batch: Batch, arguments: tuple[tuple[Any, ...], dict[str, Any]]) -> Any:
        with self._session.turn.taken(again=False):
            return given_back(arguments, self._output(batch))

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        batch = self._batches.of(args, kwargs)
        if self._learning.look():
            self._proofs.forget()
            batch = self._batches.of(args, kwargs)
        self._fill(batch)
        self._proofs.look(batch, self._calls)
        if self.share is not None:
            self.share.settle()
        return given_back((args, kwargs), self._output(batch))

    def _output(self, batch: Batch) -> Any:
        """Runs a batch that has been verified; returns the model's output."""
        try:
            with phase("step") if self._calls == 0 else nullcontext():
                given = run_batch(self._session, batch, self.options, self.model.training)
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

    def verify(self, *args: Any, **kwargs: Any) -> Verification:
        """Compares the pipeline with the unsplit model, on this call and on fresh inputs of this and of another shape.

        Compares loss, outputs, every gradient by name and buffers, in training and evaluation. Does not step, and
        leaves the model unchanged. The stages of an asynchronous schedule are run with a flush, since their weights lag
        by design.
        """
        self._refuse_several("verified after compile()")
        self._refuse_absent()
        batches = self._batches.copied()  # later calls do not use its captures
        subject = Subject(
            model=self.model,
            loss_fn=self.options.loss_fn,
            batch=batches.of,
            schedule=lambda plan, count: batches.options.policy.with_flush(plan, count),  # its first capture may choose
            microbatches=self.microbatches,
            loss=self.options.loss_output,
            devices=self.devices,
            batching=self.options.batching,
        )
        with self._session.turn.taken(again=False):
            return verify(subject, args, kwargs)

    def replan(
        self,
        plan: PlanOptions | None = None,
        costs: str | Path | CostedGraph | None = None,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
    ) -> Plan:
        """Makes a new plan, by default from the stage times of the last training step, and switches to it.

        Parameters move to the devices of their new stages. The state of an existing optimizer is not moved: with more
        than one kind of device, load its ``state_dict`` into itself to move it.

        In several processes, all of them call this between two steps. Parameters, buffers, gradients and the state of
        the optimizers move to the processes of their new stages; optimizers stay the same objects, with other
        parameters in their groups. A loss from before cannot be differentiated afterwards.

        Args:
            plan: replaces ``plan`` of ``compile``.
            costs: saved costs or a ``CostedGraph``, instead of the times of the last step.
            optimizer: in several processes, that of this process's parameters, or all of them; () if there is none.

        Raises:
            InputError: the pipeline has no plan or its optimizers step inside it; without ``costs``, the last call did
                not measure a training step on the planned capture; or ``plan`` or ``costs`` do not fit the model. In
                several processes also: no optimizer was passed, or optimizers, ``plan`` or ``costs`` differ between
                them, or their state cannot move.
            PlanError: no plan satisfies ``plan``; the pipeline keeps its present plan.
        """
        with self._session.turn.taken(again=False):
            optimizers = _every(optimizer, self.share is not None)
            if self.share is not None:
                self._refuse_absent()
                self.share.refuse_move()
                self.share.processes.same_options(told_replan(plan, costs), "replan()")
            options, compiled = replan(self._batches, self._session, plan, costs)
            if self.share is None:
                self._batches.replace_first(options, compiled)
            else:
                captures, rest = others(self._batches, compiled)
                self.share.move((compiled, *rest), optimizers)
                self._batches.adopt(options, captures, compiled)
                self._session.moves += 1
            self._learning.forget()
            self._proofs.forget()
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
            self.share.close()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            self.close()
            return
        found = error
        if self.share is not None:
            found = self.share.processes.failure(error)  # the others learn why this one does not come
        with suppress(PipecompileError):  # of a checkpoint that is being written: the first error is the one to raise
            self.close()
        if self.share is not None and self.share.processes.failed_elsewhere and is_lost(error):
            raise found from error  # of a collective of the script's own, in which a rank that has failed is missing

    def copied(self, memo: dict[int, Any]) -> Pipeline:
        """A pipeline of a copy of the model, with the same placement; it captures the copy at its first call.

        Args:
            memo: the memo of ``copy.deepcopy``.

        Raises:
            PipecompileError: the pipeline is asynchronous; the state of its optimizers cannot be copied.
        """
        self._refuse_copies("copied", "compile copy.deepcopy(pipe.pipeline.model)")
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
        self._refuse_copies("pickled", "save pipe.state_dict()")
        return Pipeline, (self.model, self.devices, replace(self.options, found=""))

    def _refuse_copies(self, done: str, instead: str) -> None:
        self._refuse_several(done)
        self._refuse_absent()
        if self._session.optimizer is not None:
            raise PipecompileError(
                f"a pipeline with schedule={self.schedule!r} cannot be {done}, because the state of the optimizers "
                f"inside it would be lost; call flush(), then {instead}"
            )

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

    def grad_scaler(self, **options: Any) -> torch.amp.GradScaler:
        """A ``torch.amp.GradScaler`` that finds the infinite gradients of the whole model, in all processes.

        Args:
            options: of ``torch.amp.GradScaler``, but for its device.

        Returns:
            The scaler. All processes must make the same calls of it.
        """
        if self.share is None:
            return torch.amp.GradScaler(self.devices[0].type, **options)
        return GradScaler(self.share.processes, **options)

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


def _every(
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None, several_processes: bool
) -> Sequence[torch.optim.Optimizer]:
    """The optimizers that ``replan`` got."""
    if not several_processes:
        if optimizer is not None:
            raise InputError("replan(optimizer=) is for several processes (mesh=); in one process, leave it out")
        return []
    found = [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else optimizer
    if not isinstance(found, Sequence) or not all(isinstance(each, torch.optim.Optimizer) for each in found):
        raise InputError(
            f"replan() over several processes moves the state of optimizers between them, but got optimizer="
            f"{optimizer!r:.80}; pass that of this process, a list of all if they are several, or () if there is none"
        )
    return found
