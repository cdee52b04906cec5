"""Executes programs in one process, with one thread per rank; each rank executes its own row of instructions.

The executor does not know schedules: an instruction means the same in every program. Programs are validated before, so
that they cannot deadlock. A failure in one rank stops all ranks and is raised in the caller.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import wait
from typing import Any, assert_never

from torch import Tensor

from pipecompile.capture.locks import Turn, busy, waited_for
from pipecompile.errors import ExecutionError, PipecompileError
from pipecompile.ir.plan import Plan
from pipecompile.ir.program import (
    Backward,
    Forward,
    Instruction,
    Program,
    Recv,
    Reduce,
    Result,
    Send,
    Step,
    followers,
    readers,
    reads,
)
from pipecompile.ir.timeline import Span, Timeline
from pipecompile.runtime.ambient import Ambient
from pipecompile.runtime.lane import Lane, caller_event, caller_waits
from pipecompile.runtime.runner import Microbatch, Runner
from pipecompile.runtime.transport import Aborted, Transport, Values

Mailbox = dict[tuple[Result, int], Values | Callable[[], Values]]


class Executor:
    """Runs programs over the stages of one plan. Results that the next program reads stay in the mailboxes.

    Args:
        runners: one per stage.
        lanes: one per rank.
        transport: carries results between ranks.
    """

    def __init__(self, plan: Plan, runners: Sequence[Runner], lanes: Sequence[Lane], transport: Transport) -> None:
        self.plan = plan
        self.runners = runners
        self.lanes = tuple(lanes)
        self.transport = transport
        self.mailboxes: list[Mailbox] = [{} for _ in lanes]

    def run(self, program: Program, microbatches: Mapping[int, Microbatch], ambient: Ambient) -> Timeline:
        """Runs a validated, lowered program.

        Args:
            microbatches: by number, those that the program uses; their outputs and gradients are stored in them.

        Raises:
            ExecutionError: a stage raised; the message names the stage, instruction, module and source line.
        """
        start = time.perf_counter()
        event = caller_event(tuple(lane.device for lane in self.lanes))
        jobs = [
            self.lanes[rank].thread.submit(self._run_rank, rank, row, microbatches, ambient, event, start, busy().turns)
            for rank, row in enumerate(program.ranks)  # a plan may not use the last lanes
        ]
        try:
            wait(jobs)
        except BaseException:  # a keyboard interrupt: wake the ranks before raising it
            self.transport.abort()
            wait(jobs)
            self.reset()
            raise
        self._raise_failure([job.exception() for job in jobs])
        caller_waits(self.lanes)
        spans = [span for job in jobs for span in job.result()]
        return Timeline(tuple(sorted(spans, key=lambda s: (s.rank, s.start))), len(program.ranks))

    def reset(self) -> None:
        """Drops every microbatch in flight."""
        self.transport.reset()
        for mailbox in self.mailboxes:
            mailbox.clear()

    def _raise_failure(self, errors: Sequence[BaseException | None]) -> None:
        failures = [error for error in errors if error is not None]
        if not failures:
            return
        self.reset()
        raise next((error for error in failures if not isinstance(error, Aborted)), failures[0])

    def _run_rank(
        self,
        rank: int,
        row: Sequence[Instruction],
        microbatches: Mapping[int, Microbatch],
        ambient: Ambient,
        event: Any,
        start: float,
        waiting: frozenset[Turn],
    ) -> list[Span]:
        spans: list[Span] = []
        try:
            with waited_for(waiting), self.lanes[rank].entered(event), ambient.entered():
                for i in row:
                    began, ended = self._do(i, self.mailboxes[rank], microbatches)
                    spans.append(Span(rank, i, began - start, ended - start))
        except BaseException:
            self.transport.abort()
            raise
        return spans

    def _do(self, i: Instruction, mailbox: Mailbox, microbatches: Mapping[int, Microbatch]) -> tuple[float, float]:
        """Executes one instruction; returns the times at which it began, with its operands ready, and ended."""
        match i:
            case Send():
                began = time.perf_counter()
                self.transport.send(i, _open(mailbox.pop((i.result, i.target))))
            case Recv():
                began = time.perf_counter()
                mailbox[i.result, i.target] = self.transport.recv(i)
            case Forward() | Backward() | Reduce() | Step():
                received = {r.stage: _open(mailbox.pop((r, i.stage))) for r in reads(i, self.plan)}
                began = time.perf_counter()
                self._compute(i, received, mailbox, microbatches)
            case _:
                assert_never(i)
        return began, time.perf_counter()

    def _compute(
        self,
        i: Forward | Backward | Reduce | Step,
        received: Mapping[int, Values],
        mailbox: Mailbox,
        microbatches: Mapping[int, Microbatch],
    ) -> None:
        runner = self.runners[i.stage]
        results: Mapping[int, Values] = {}
        try:
            match i:
                case Forward(_, number):
                    results = runner.forward(microbatches[number], received)
                case Backward(_, number):
                    results = runner.backward(microbatches[number], received)
                case Reduce(stage, number):
                    last = self.plan.last_run(stage, number)  # None: the stage has not run, and has no gradients
                    leaves = {} if last is None else microbatches[last].versions[stage].leaves
                    results = self._reduce(stage, leaves, received)
                case Step():
                    runner.step(tuple(microbatches.values()))
                case _:
                    assert_never(i)
        except PipecompileError as error:
            raise type(error)(f"stage {i.stage}, {i}: {error}") from error.__cause__
        except Exception as error:
            where = f"stage {i.stage}, {i}"
            raise ExecutionError(f"{where}: {type(error).__name__}: {error}") from error
        if not isinstance(i, Step):
            for reader in readers(i, self.plan):
                mailbox[i, reader] = results[reader]

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
            shared = [t.parameter for t in self.plan.tied if t.owner == stage and follower in t.followers]
            for name, gradient in zip(shared, received[follower], strict=True):
                leaf = leaves[name]
                if gradient is not None:
                    leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient
        return results


def _open(content: Values | Callable[[], Values]) -> Values:
    return content() if callable(content) else content
