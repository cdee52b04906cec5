"""Links a program: finds, once for each instruction, what it reads, what it makes, and what runs it.

The program stays the data that everybody reads. A rank's thread runs the linked form: a flat list, in which nothing is
left to look up in the plan.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import assert_never

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
    Send,
    Step,
    readers,
    reads,
)
from pipecompile.ops.accelerators import Mark
from pipecompile.ops.torch_internals import _RecordFunctionFast
from pipecompile.runtime.lane import Lane, Values
from pipecompile.runtime.runner import Microbatch, Runner
from pipecompile.runtime.tied import reduced, refreshed
from pipecompile.runtime.transport import Transport

Content = Values | Callable[[], Values]  # or a function that waits for them
Act = Callable[[Mapping[int, Microbatch], Mapping[int, Values]], Mapping[int, Values]]


@dataclass(frozen=True, slots=True)
class Row:
    """What the instructions of one rank work on.

    Attributes:
        lane: of the rank.
        mailbox: results that its instructions still read, by the text of the transfer: "0F3>1".
        microbatches: by number.
    """

    lane: Lane
    mailbox: dict[str, Content]
    microbatches: Mapping[int, Microbatch]


@dataclass(frozen=True, slots=True)
class Linked:
    """An instruction with the function that runs it.

    Attributes:
        run: Returns the marks at which the instruction begins, with its operands ready, and ends.
        recorded: A context in which torch.profiler shows it as "stage 1 1F0".
    """

    instruction: Instruction
    run: Callable[[Row], tuple[Mark, Mark]]
    recorded: _RecordFunctionFast


def link(
    program: Program, runners: Mapping[int, Runner], transport: Transport, ranks: Sequence[int]
) -> dict[int, tuple[Linked, ...]]:
    """The rows of a lowered program for some of its ranks.

    Args:
        runners: by stage, those of these ranks.
        transport: carries results between ranks.
    """
    plan = program.plan
    return {
        rank: tuple(_linked(i, plan, runners, transport) for i in program.ranks[rank])
        for rank in ranks
        if rank < len(program.ranks)  # a plan may not use the last ones
    }


def _linked(i: Instruction, plan: Plan, runners: Mapping[int, Runner], transport: Transport) -> Linked:
    return Linked(i, _bound(i, plan, runners, transport), _RecordFunctionFast(f"stage {i.stage} {i}"))


def _bound(
    i: Instruction, plan: Plan, runners: Mapping[int, Runner], transport: Transport
) -> Callable[[Row], tuple[Mark, Mark]]:
    match i:
        case Send():
            return _sending(i, transport)
        case Recv():
            return _receiving(i, transport)
        case Forward() | Backward() | Reduce() | Step() | Refresh():
            return _computing(i, plan, _act(i, plan, runners[i.stage]))
        case _:
            assert_never(i)


def _sending(i: Send, transport: Transport) -> Callable[[Row], tuple[Mark, Mark]]:
    place = str(i)

    def run(row: Row) -> tuple[Mark, Mark]:
        sent = transport.send(i, _open(row.mailbox.pop(place)))
        return sent.began, sent.ended

    return run


def _receiving(i: Recv, transport: Transport) -> Callable[[Row], tuple[Mark, Mark]]:
    place = str(Send(i.result, i.target))

    def run(row: Row) -> tuple[Mark, Mark]:
        row.mailbox[place] = transport.recv(i)
        mark = row.lane.mark()
        return mark, mark

    return run


def _computing(i: Compute, plan: Plan, act: Act) -> Callable[[Row], tuple[Mark, Mark]]:
    sources = [(result.stage, str(Send(result, i.stage))) for result in reads(i, plan)]
    targets = [] if isinstance(i, Step) else [(reader, str(Send(i, reader))) for reader in readers(i, plan)]

    def run(row: Row) -> tuple[Mark, Mark]:
        mailbox = row.mailbox
        received = {stage: _open(mailbox.pop(place)) for stage, place in sources}
        began = row.lane.mark()
        results = act(row.microbatches, received)
        for reader, place in targets:
            mailbox[place] = results[reader]
        return began, row.lane.mark()

    return run


def _act(i: Compute, plan: Plan, runner: Runner) -> Act:
    """What a computation does with the microbatches and what it has received; returns its results by reader."""
    match i:
        case Forward(_, number):
            return lambda microbatches, received: runner.forward(microbatches[number], received)
        case Backward(_, number):
            return lambda microbatches, received: runner.backward(microbatches[number], received)
        case Reduce(stage, number):
            last = plan.last_run(stage, number)  # None: the stage has not run, and has no gradients
            if last is None:
                return lambda microbatches, received: reduced(stage, plan, {}, received)
            return lambda microbatches, received: reduced(
                stage, plan, microbatches[last].versions[stage].leaves, received
            )
        case Refresh(stage, _):
            return lambda microbatches, received: refreshed(stage, plan, runner.weights.current.leaves, received)
        case Step():

            def step(microbatches: Mapping[int, Microbatch], received: Mapping[int, Values]) -> Mapping[int, Values]:
                runner.step(tuple(microbatches.values()))
                return {}

            return step
        case _:
            assert_never(i)


def _open(content: Content) -> Values:
    return content() if callable(content) else content
