"""Executes programs in one process, with one thread per rank; each rank executes its own row of instructions.

The executor does not know schedules: an instruction means the same in every program. Programs are validated before, so
that they cannot deadlock. A failure in one rank stops all ranks and is raised in the caller.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import wait
from contextvars import copy_context
from dataclasses import dataclass
from typing import assert_never

import torch
from torch import Tensor

from pipecompile.capture.locks import Turn, busy, waited_for
from pipecompile.errors import ExecutionError, PipecompileError
from pipecompile.ir.plan import Plan
from pipecompile.ir.program import (
    Backward,
    Compute,
    Forward,
    Instruction,
    Program,
    Recv,
    Reduce,
    Refresh,
    Result,
    Send,
    Step,
    followers,
    readers,
    reads,
)
from pipecompile.ir.timeline import Span, Timeline
from pipecompile.ops.accelerators import Mark, seconds_between
from pipecompile.runtime.ambient import Ambient
from pipecompile.runtime.lane import Callers, Lane, Values
from pipecompile.runtime.notes import Notes, RowNotes
from pipecompile.runtime.out_of_memory import OutOfMemoryError
from pipecompile.runtime.runner import Microbatch, Runner
from pipecompile.runtime.transport import Aborted, Transport

Mailbox = dict[tuple[Result, int], Values | Callable[[], Values]]


@dataclass(frozen=True, slots=True)
class RowRun:
    """When one rank has run its row, by marks of its own lane.

    Attributes:
        start: seconds from the start of the program, by the host's clock, at the mark ``first``.
        spans: each instruction with the marks of its begin, with its operands ready, and of its end.
    """

    start: float
    first: Mark
    spans: Sequence[tuple[Instruction, Mark, Mark]]

    def seconds(self, mark: Mark) -> float:
        """The time of a mark, from the start of the program."""
        return self.start + seconds_between(self.first, mark)


def timeline_of(rows: Mapping[int, RowRun], num_ranks: int) -> Timeline:
    """The measured timeline of a program. Waits until its work on accelerators has run.

    Args:
        rows: by rank, those that this process has run.
    """
    spans = [
        Span(rank, instruction, row.seconds(began), row.seconds(ended))
        for rank, row in rows.items()
        for instruction, began, ended in row.spans
    ]
    return Timeline(tuple(sorted(spans, key=lambda span: (span.rank, span.start))), num_ranks)


class Executor:
    """Runs programs over the stages of one plan. Results that the next program reads stay in the mailboxes.

    Args:
        runners: by stage, those of this process.
        lanes: by rank, those of this process.
        transport: carries results between ranks.
        callers: the streams of the threads that run programs.
        notes: what has run of the last programs.
    """

    def __init__(
        self,
        plan: Plan,
        runners: Mapping[int, Runner],
        lanes: Mapping[int, Lane],
        transport: Transport,
        callers: Callers,
        notes: Notes,
    ) -> None:
        self.plan = plan
        self.runners = runners
        self.lanes = lanes
        self.transport = transport
        self.callers = callers
        self.notes = notes
        self.mailboxes: dict[int, Mailbox] = {rank: {} for rank in lanes}

    def run(self, program: Program, microbatches: Mapping[int, Microbatch], ambient: Ambient) -> Mapping[int, RowRun]:
        """Runs a validated, lowered program.

        Args:
            microbatches: by number, those that the program uses; their outputs and gradients are stored in them.

        Returns:
            When each rank of this process has run its row, for ``timeline_of``.

        Raises:
            ExecutionError: a stage raised; the message names the stage, instruction, module and source line. Or a
                kernel failed that was queued before; the message names the instruction that probably did so.
        """
        self.transport.begin(microbatches)
        start = time.perf_counter()
        after = self.callers.events(t.device for m in microbatches.values() for t in m.inputs.values())
        modules = {stage: runner.stage.modules for stage, runner in self.runners.items()}
        rows = self.notes.begin(program, modules, self.lanes)
        jobs = {  # in the caller's context variables, which hold torch.compile's settings
            rank: self.lanes[rank].thread.submit(
                copy_context().run,
                self._run_rank,
                rank,
                row,
                microbatches,
                ambient,
                after,
                start,
                busy().turns,
                rows[rank],
            )
            for rank, row in enumerate(program.ranks)  # a plan may not use the last lanes
            if rank in self.lanes
        }
        try:
            wait(jobs.values())
        except BaseException:  # a keyboard interrupt: wake the ranks before raising it
            self.transport.abort()
            wait(jobs.values())
            self.reset()
            self._join_callers()
            raise
        failures = [error for error in (job.exception() for job in jobs.values()) if error is not None]
        if (stopped := self._join_callers()) is not None:
            failures.append(stopped)
        if not failures:
            return {rank: job.result() for rank, job in jobs.items()}
        self.reset()
        failure = self._explained([error for error in failures if not isinstance(error, Aborted)] or failures)
        if isinstance(failure, OutOfMemoryError) and failure.__cause__ is not None:
            traceback.clear_frames(failure.__cause__.__traceback__)  # they hold tensors
        try:
            raise failure
        finally:
            del failure, failures, stopped, jobs  # a cycle with this frame would hold tensors too

    def _join_callers(self) -> torch.AcceleratorError | None:
        """Makes the caller's streams wait for the lanes, after a failure too: what has been queued still runs.

        Returns:
            What a device raised that has failed.
        """
        try:
            self.callers.wait(self.lanes.values())
        except torch.AcceleratorError as error:
            return error
        return None

    def _explained(self, failures: Sequence[BaseException]) -> BaseException:
        """The first failure; of a kernel that was queued before, the error that says where."""
        late = [error for error in failures if isinstance(error.__cause__ or error, torch.AcceleratorError)]
        found = self.notes.explained(late, self.lanes.values()) if late else None
        if found is None:
            return failures[0]
        found.__cause__ = late[0].__cause__ or late[0]
        return found

    def reset(self) -> None:
        """Drops every microbatch in flight."""
        self.transport.reset()
        for mailbox in self.mailboxes.values():
            mailbox.clear()

    def _run_rank(
        self,
        rank: int,
        row: Sequence[Instruction],
        microbatches: Mapping[int, Microbatch],
        ambient: Ambient,
        after: Sequence[torch.Event],
        start: float,
        waiting: frozenset[Turn],
        notes: RowNotes,
    ) -> RowRun:
        lane = self.lanes[rank]
        began, first = time.perf_counter() - start, lane.mark()
        try:
            with waited_for(waiting), lane.entered(after), ambient.entered():
                lane.note(notes.places[0], lane.mark())
                spans = [(i, *self._do(i, lane, self.mailboxes[rank], microbatches, notes)) for i in row]
        except BaseException:
            self.transport.abort()
            raise
        return RowRun(began, first, spans)

    def _do(
        self, i: Instruction, lane: Lane, mailbox: Mailbox, microbatches: Mapping[int, Microbatch], notes: RowNotes
    ) -> tuple[Mark, Mark]:
        """Executes one instruction; returns the marks at which it begins, with its operands ready, and ends."""
        try:
            flag = notes.begin(i)
            match i:
                case Send():
                    sent = self.transport.send(i, _open(mailbox.pop((i.result, i.target))))
                    began, ended = sent.began, sent.ended
                case Recv():
                    mailbox[i.result, i.target] = self.transport.recv(i)
                    began = ended = lane.mark()
                case Forward() | Backward() | Reduce() | Step() | Refresh():
                    received = {r.stage: _open(mailbox.pop((r, i.stage))) for r in reads(i, self.plan)}
                    began = lane.mark()
                    self._compute(i, received, mailbox, microbatches)
                    ended = lane.mark()
                case _:
                    assert_never(i)
            if not isinstance(i, Recv):
                lane.note(flag, ended, is_copy=isinstance(i, Send))
            return began, ended
        except Aborted:
            raise
        except torch.OutOfMemoryError as error:
            raise self._out_of_memory(i, error, len(microbatches)) from error.__cause__ or error
        except PipecompileError as error:
            raise type(error)(f"stage {i.stage}, {i}: {error}") from error.__cause__
        except Exception as error:
            where = f"stage {i.stage}, {i}"
            raise ExecutionError(f"{where}: {type(error).__name__}: {error}") from error

    def _compute(
        self,
        i: Compute,
        received: Mapping[int, Values],
        mailbox: Mailbox,
        microbatches: Mapping[int, Microbatch],
    ) -> None:
        runner = self.runners[i.stage]
        results: Mapping[int, Values] = {}
        match i:
            case Forward(_, number):
                results = runner.forward(microbatches[number], received)
            case Backward(_, number):
                results = runner.backward(microbatches[number], received)
            case Reduce(stage, number):
                last = self.plan.last_run(stage, number)  # None: the stage has not run, and has no gradients
                leaves = {} if last is None else microbatches[last].versions[stage].leaves
                results = self._reduce(stage, leaves, received)
            case Refresh(stage, _):
                results = self._refresh(stage, received)
            case Step():
                runner.step(tuple(microbatches.values()))
            case _:
                assert_never(i)
        if not isinstance(i, Step):
            for reader in readers(i, self.plan):
                mailbox[i, reader] = results[reader]

    def _out_of_memory(self, i: Instruction, error: Exception, microbatches: int) -> OutOfMemoryError:
        """The error of a stage that does not fit, with what takes less memory."""
        seen = str(error) if isinstance(error, OutOfMemoryError) else f"{type(error).__name__}: {error}"
        again = i.stage in self.plan.recomputed
        remedies = [
            *([] if again else ["PlanOptions(recompute='always')"]),
            f"more than {microbatches} microbatches, which are smaller",
            "schedule='1f1b' in place of 'gpipe'",
            f"more than {self.plan.num_stages} stages",
        ]
        return OutOfMemoryError(f"stage {i.stage}, {i}: {seen}; what takes less memory: {', '.join(remedies)}")

    def _refresh(self, stage: int, received: Mapping[int, Values]) -> dict[int, Values]:
        """Copies the values of tied parameters: an owner returns its own for its followers, a follower takes them."""
        leaves = self.runners[stage].weights.current.leaves
        for owner, values in received.items():
            for name, value in zip(self._shared(owner, stage), values, strict=True):
                if value is not None:
                    leaves[name].data.copy_(value)
        return {
            follower: tuple(leaves[name].detach() for name in self._shared(stage, follower))
            for follower in followers(stage, self.plan)
        }

    def _shared(self, owner: int, follower: int) -> list[str]:
        return [tied.parameter for tied in self.plan.tied if tied.owner == owner and follower in tied.followers]

    def _reduce(self, stage: int, leaves: Mapping[str, Tensor], received: Mapping[int, Values]) -> dict[int, Values]:
        """Reduces gradients of tied parameters: an owner adds those of its followers, a follower returns its own."""
        results: dict[int, Values] = {}
        for tied in self.plan.tied:
            if stage in tied.followers:
                leaf = leaves.get(tied.parameter)
                results[tied.owner] = (*results.get(tied.owner, ()), None if leaf is None else leaf.grad)
                if leaf is not None:
                    leaf.grad = None
        for follower in sorted(followers(stage, self.plan), reverse=True):
            for name, gradient in zip(self._shared(stage, follower), received[follower], strict=True):
                leaf = leaves[name]
                if gradient is not None:
                    leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient
        return results


def _open(content: Values | Callable[[], Values]) -> Values:
    return content() if callable(content) else content
