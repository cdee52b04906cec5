"""Executes the rows of a program that are this process's: each in its rank's thread, or all in the calling thread.

The executor does not know schedules: an instruction means the same in every program. Programs are validated before, so
that they cannot deadlock. A failure in one rank stops all ranks and is raised in the caller.
"""

from __future__ import annotations

import time
import traceback
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import dataclass, field
from functools import partial

import torch

from pipecompile.capture.locks import Turn, busy, waited_for
from pipecompile.errors import ExecutionError, PipecompileError
from pipecompile.ir.instruction import Instruction
from pipecompile.ir.plan import Plan
from pipecompile.ir.program import Program, linearize
from pipecompile.ir.timeline import Span, Timeline
from pipecompile.ops.accelerators import Mark, seconds_between
from pipecompile.ops.casts import casts_kept
from pipecompile.ops.randomness import microbatch_seed, seed_microbatch
from pipecompile.runtime.ambient import Ambient
from pipecompile.runtime.lane import Callers, Lane
from pipecompile.runtime.link import Content, Linked, Row, link
from pipecompile.runtime.notes import Notes, RowNotes
from pipecompile.runtime.out_of_memory import OutOfMemoryError
from pipecompile.runtime.outputs import Outputs
from pipecompile.runtime.rank_thread import Job
from pipecompile.runtime.runner import Microbatch, Runner
from pipecompile.runtime.transport import Aborted, Transport

LINKED = 16  # programs that stay linked


@dataclass
class RankRun:
    """One rank on its way through its row.

    Attributes:
        linked: the row.
        row: what its instructions work on.
        notes: what has run.
        start, first: when it began, from the start of the program by the host's clock, and by the lane's own mark.
        spans: each instruction that has run, with the marks of its begin and its end.
    """

    linked: Sequence[Linked]
    row: Row
    notes: RowNotes
    start: float = 0.0
    first: Mark = 0.0
    spans: list[tuple[Instruction, Mark, Mark]] = field(default_factory=list)

    def begin(self, start: float) -> None:
        """Notes the time, in a program that started at ``start``."""
        self.start, self.first = time.perf_counter() - start, self.row.lane.mark()

    def settle(self) -> None:
        """Notes that what was queued before the row has run, once it has."""
        self.notes.ended(0, self.row.lane, self.row.lane.mark())

    def advance(self) -> None:
        """Runs the next instruction."""
        step = self.linked[len(self.spans)]
        self.notes.begun.append(step.instruction)
        with step.recorded:
            begins, ends = step.run(self.row)
        self.spans.append((step.instruction, begins, ends))
        if len(self.spans) == len(self.linked):
            self.row.end([*self.row.leaving])
        self.notes.ended(len(self.spans), self.row.lane, ends)


@dataclass(frozen=True, slots=True)
class Caller:
    """What the threads of ranks have from the thread that runs a program.

    Attributes:
        events: after all that it has queued on accelerators.
        start: of the program, by the host's clock.
        waiting: the turns that it holds.
    """

    events: Sequence[torch.Event]
    start: float
    waiting: frozenset[Turn]


@dataclass(frozen=True, slots=True)
class RowRun:
    """When one rank has run its row, by marks of its own lane.

    Attributes:
        start: seconds from the start of the program, by the host's clock, at the mark ``first``.
        spans: each instruction with the marks of its begin, with its operands ready, and of its end.
        sent_bytes: what it has sent to other ranks.
    """

    start: float
    first: Mark
    spans: Sequence[tuple[Instruction, Mark, Mark]]
    sent_bytes: int

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
    sent = tuple(rows[rank].sent_bytes if rank in rows else 0 for rank in range(num_ranks))
    return Timeline(tuple(sorted(spans, key=lambda span: (span.rank, span.start))), num_ranks, sent_bytes=sent)


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
        self.mailboxes: dict[int, dict[str, Content]] = {rank: {} for rank in lanes}
        self.linked: deque[tuple[Program, Mapping[int, Sequence[Linked]]]] = deque(maxlen=LINKED)
        self.running = False  # since a program began, until all its ranks have ended

    def run(
        self,
        program: Program,
        microbatches: Mapping[int, Microbatch],
        ambient: Ambient,
        here: bool = False,
        outputs: Outputs | None = None,
    ) -> Mapping[int, RowRun]:
        """Runs a validated, lowered program.

        Args:
            microbatches: by number, those that the program uses; their outputs and gradients are stored in them.
            ambient: the modes of the calling thread, for the threads of ranks.
            here: whether the calling thread runs all ranks.
            outputs: of the Shares.

        Returns:
            When each rank of this process has run its row, for ``timeline_of``.

        Raises:
            ExecutionError: a stage raised; the message names the stage, instruction, module and source line. Or a
                kernel failed that was queued before; the message names the instruction that probably did so.
        """
        if self.running:  # an interrupt has ended the wait for the ranks that another interrupt had stopped
            self.stop()
        self.transport.begin(microbatches)
        start = time.perf_counter()
        events = self.callers.events(t.device for m in microbatches.values() for t in m.inputs.values())
        caller = Caller(events, start, busy().turns)
        modules = {stage: runner.stage.modules for stage, runner in self.runners.items()}
        notes = self.notes.begin(program, modules, self.lanes)
        ranks = {
            rank: RankRun(linked, Row(self.lanes[rank], self.mailboxes[rank], microbatches, outputs), notes[rank])
            for rank, linked in self._linked(program).items()
        }
        self.running = True
        try:
            failures = self._run_here(program, ranks, caller) if here else self._run_in_threads(ranks, ambient, caller)
            stopped = self._join_callers()
            self.running = False
        except BaseException:  # a keyboard interrupt, between any two of these lines
            self.stop()
            self._join_callers()
            raise
        if stopped is not None:
            failures.append(stopped)
        if not failures:
            return {rank: RowRun(run.start, run.first, run.spans, sum(run.row.sent)) for rank, run in ranks.items()}
        self.reset()
        failure = self._explained([error for error in failures if not isinstance(error, Aborted)] or failures)
        if isinstance(failure, OutOfMemoryError) and failure.__cause__ is not None:
            traceback.clear_frames(failure.__cause__.__traceback__)  # they hold tensors
        try:
            raise failure
        finally:
            del failure, failures, stopped  # a cycle with this frame would hold tensors too

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

    def stop(self) -> None:
        """Ends the jobs of all ranks, and drops every microbatch in flight."""
        self.transport.abort()  # wakes them
        for lane in self.lanes.values():
            lane.thread.settle()
        self.reset()

    def reset(self) -> None:
        """Drops every microbatch in flight, when no rank runs."""
        self.transport.reset()
        for mailbox in self.mailboxes.values():
            mailbox.clear()
        self.running = False

    def _linked(self, program: Program) -> Mapping[int, Sequence[Linked]]:
        """The program's rows for the ranks of this process, linked once."""
        for known, rows in self.linked:
            if known is program:
                return rows
        rows = link(program, self.runners, self.transport, tuple(self.lanes))
        self.linked.append((program, rows))
        return rows

    def _run_in_threads(self, ranks: Mapping[int, RankRun], ambient: Ambient, caller: Caller) -> list[BaseException]:
        """Runs each rank in its thread; returns what they raised."""
        jobs: list[Job] = []
        for run in ranks.values():  # in the caller's context variables, which hold torch.compile's settings
            jobs.append(run.row.lane.thread.start(partial(copy_context().run, self._run_rank, run, ambient, caller)))
        for job in jobs:
            job.wait()
        return [job.error for job in jobs if job.error is not None]

    @casts_kept()
    def _run_rank(self, run: RankRun, ambient: Ambient, caller: Caller) -> None:
        run.begin(caller.start)
        with (
            self._stopping(run),
            waited_for(caller.waiting),
            run.row.lane.entered(caller.events),
            ambient.entered(),
        ):
            run.settle()
            for _ in run.linked:
                run.advance()

    @casts_kept()
    def _run_here(self, program: Program, ranks: Mapping[int, RankRun], caller: Caller) -> list[BaseException]:
        """Runs all ranks in the calling thread, instruction by instruction; returns what one raised."""
        seed = microbatch_seed()
        try:
            for run in ranks.values():
                run.begin(caller.start)
            if len(ranks) == 1:
                (run,) = ranks.values()
                with self._stopping(run), run.row.lane.entered(caller.events):
                    run.settle()
                    for _ in run.linked:
                        run.advance()
                return []
            for rank in _turns(program, ranks):
                run = ranks[rank]
                with self._stopping(run), run.row.lane.entered(() if run.spans else caller.events):
                    if not run.spans:
                        run.settle()
                    run.advance()
        except Exception as error:
            return [error]
        finally:
            seed_microbatch(seed)
        return []

    @contextmanager
    def _stopping(self, run: RankRun) -> Iterator[None]:
        """A context in which a failure of one rank stops all, with an error that names the instruction."""
        try:
            yield
        except BaseException as error:
            self.transport.abort()
            begun = run.notes.begun
            named = self._named(error, begun[-1], len(run.row.microbatches)) if begun else error
            try:
                raise named from named.__cause__
            finally:
                del named  # a cycle with this frame would hold tensors

    def _named(self, error: BaseException, i: Instruction, microbatches: int) -> BaseException:
        """An error of an instruction, with its name."""
        if isinstance(error, Aborted) or not isinstance(error, Exception):
            return error
        where = f"stage {i.stage}, {i}"
        if isinstance(error, torch.OutOfMemoryError) and i.stage in self.runners:
            named: PipecompileError = self._out_of_memory(i, error, microbatches)
            named.__cause__ = error.__cause__ or error
        elif isinstance(error, PipecompileError):
            named = type(error)(f"{where}: {error}")
            named.__cause__ = error.__cause__
        else:
            named = ExecutionError(f"{where}: {type(error).__name__}: {error}")
            named.__cause__ = error
        named.instruction = i
        return named

    def _out_of_memory(self, i: Instruction, error: Exception, microbatches: int) -> OutOfMemoryError:
        """The error of a stage that does not fit, with what takes less memory."""
        seen = str(error) if isinstance(error, OutOfMemoryError) else f"{type(error).__name__}: {error}"
        again, lane, runner = (
            i.stage in self.plan.recomputed,
            self.lanes[self.plan.rank_of[i.stage]],
            self.runners[i.stage],
        )
        is_flushed = runner.weights.optimizer is None  # a pipeline that stays full does not offload
        may_offload = lane.offloads and is_flushed and not again and i.stage not in self.plan.offloaded
        remedies = [
            *([] if again else ["PlanOptions(recompute='always')"]),
            *(["PlanOptions(offload='always')"] if may_offload else []),
            f"more than {microbatches} microbatches, which are smaller",
            "schedule='1f1b' in place of 'gpipe'",
            f"more than {self.plan.num_stages} stages",
        ]
        return OutOfMemoryError(f"stage {i.stage}, {i}: {seen}; what takes less memory: {', '.join(remedies)}")


def _turns(program: Program, ranks: Mapping[int, RankRun]) -> Iterator[int]:
    """The ranks of this process in an order in which one thread can run their rows; others run in other processes."""
    return (rank for rank, _ in linearize(program) if rank in ranks)
