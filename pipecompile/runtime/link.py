"""Links a program: finds, once for each instruction, what it reads, what it makes, and what runs it.

The program stays the data that everybody reads. A rank's thread runs the linked form: a flat list, in which nothing is
left to look up in the plan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import assert_never

from pipecompile.ir.instruction import (
    Backward,
    BackwardWeight,
    Copy,
    Fetch,
    Forward,
    Instruction,
    Offload,
    OfStage,
    Recv,
    Reduce,
    Refresh,
    Send,
    Share,
    Step,
    Update,
)
from pipecompile.ir.plan import Plan
from pipecompile.ir.program import Program, readers, reads, transfer_to
from pipecompile.ops.accelerators import Mark
from pipecompile.ops.torch_internals import _RecordFunctionFast
from pipecompile.runtime.lane import Lane, Values
from pipecompile.runtime.offload import Leaving
from pipecompile.runtime.outputs import Outputs
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
        outputs: what Shares bring.
        sent: bytes of each transfer to another rank so far.
        leaving: activations on their way to the host.
    """

    lane: Lane
    mailbox: dict[str, Content]
    microbatches: Mapping[int, Microbatch]
    outputs: Outputs | None = None
    sent: list[int] = field(default_factory=list)
    leaving: dict[Offload, Leaving] = field(default_factory=dict)

    def end(self, offloads: Iterable[Offload]) -> None:
        """Waits for copies to the host, and frees what they have copied."""
        for each in offloads:
            if (leaving := self.leaving.pop(each, None)) is not None:
                leaving.end(self.lane)


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
    return {
        rank: tuple(_linked(i, program, runners, transport) for i in program.ranks[rank])
        for rank in ranks
        if rank < len(program.ranks)  # a plan may not use the last ones
    }


def _linked(i: Instruction, program: Program, runners: Mapping[int, Runner], transport: Transport) -> Linked:
    return Linked(i, _bound(i, program, runners, transport), _RecordFunctionFast(f"stage {i.stage} {i}"))


def _bound(
    i: Instruction, program: Program, runners: Mapping[int, Runner], transport: Transport
) -> Callable[[Row], tuple[Mark, Mark]]:
    match i:
        case Send():
            return _sending(i, transport)
        case Recv():
            return _receiving(i, transport)
        case Forward() | Backward() | BackwardWeight() | Reduce() | Step() | Update() | Refresh():
            ended = program.ended_before.get(i, ())
            return _computing(i, program.plan, _act(i, program, runners[i.stage]), ended)
        case Share():
            return _sharing(i, program.plan)
        case Offload() | Fetch():
            return _copying(i, runners[i.stage], program.ended_before.get(i, ()))
        case _:
            assert_never(i)


def _sending(i: Send, transport: Transport) -> Callable[[Row], tuple[Mark, Mark]]:
    place = str(i)

    def run(row: Row) -> tuple[Mark, Mark]:
        values = _open(row.mailbox.pop(place))
        real = (value for value in values if value is not None and not value.is_meta)
        row.sent.append(sum(value.numel() * value.element_size() for value in real))
        sent = transport.send(i, values)
        return sent.began, sent.ended

    return run


def _receiving(i: Recv, transport: Transport) -> Callable[[Row], tuple[Mark, Mark]]:
    place = str(Send(i.result, i.target))

    def run(row: Row) -> tuple[Mark, Mark]:
        row.mailbox[place] = transport.recv(i)
        mark = row.lane.mark()
        return mark, mark

    return run


def _copying(i: Copy, runner: Runner, ended: Sequence[Offload]) -> Callable[[Row], tuple[Mark, Mark]]:
    def run(row: Row) -> tuple[Mark, Mark]:
        row.end(ended)
        microbatch = row.microbatches[i.microbatch]
        if isinstance(i, Fetch):
            sent = runner.fetch(microbatch)
        elif (leaving := runner.offload(microbatch)) is not None:
            row.leaving[i], sent = leaving, leaving.sent
        else:
            sent = None
        mark = row.lane.mark() if sent is None else sent.began
        return mark, mark if sent is None else sent.ended

    return run


def _sharing(i: Share, plan: Plan) -> Callable[[Row], tuple[Mark, Mark]]:
    maker, sources = plan.rank_of[i.stage], [str(transfer_to(i, result)) for result in reads(i, plan)]
    targets = [str(Send(i, reader)) for reader in readers(i, plan)]

    def run(row: Row) -> tuple[Mark, Mark]:
        assert row.outputs is not None, "a program with Shares is run for its outputs"
        received = [_open(row.mailbox.pop(place)) for place in sources]
        began = row.lane.mark()
        for values in received:
            row.outputs.take(maker, values)
        values = received[0] if received else row.outputs.made(maker)
        for place in targets:
            row.mailbox[place] = values
        return began, row.lane.mark()

    return run


def _computing(i: OfStage, plan: Plan, act: Act, ended: Sequence[Offload]) -> Callable[[Row], tuple[Mark, Mark]]:
    sources = [(result.stage, str(transfer_to(i, result))) for result in reads(i, plan)]
    targets: list[tuple[int, str]] = []
    if not isinstance(i, Step | Update | BackwardWeight):
        targets = [(reader, str(Send(i, reader))) for reader in readers(i, plan)]

    def run(row: Row) -> tuple[Mark, Mark]:
        mailbox = row.mailbox
        row.end(ended)
        received = {stage: _open(mailbox.pop(place)) for stage, place in sources}
        began = row.lane.mark()
        results = act(row.microbatches, received)
        for reader, place in targets:
            mailbox[place] = results[reader]
        return began, row.lane.mark()

    return run


def _act(i: OfStage, program: Program, runner: Runner) -> Act:
    """What a computation does with the microbatches and what it has received; returns its results by reader."""
    plan = program.plan
    match i:
        case Forward(stage, number):
            splits = Backward(stage, number) in program.split
            leaves = Offload(stage, number) in program.offloaded
            return lambda microbatches, received: runner.forward(microbatches[number], received, splits, leaves)
        case Backward(_, number):
            return lambda microbatches, received: runner.backward(microbatches[number], received)
        case BackwardWeight(_, number):
            return _alone(lambda microbatches: runner.backward_weight(microbatches[number]))
        case Reduce(stage, number):
            last = plan.last_run(stage, number)  # None: the stage has not run, and has no gradients
            if last is None:
                return lambda microbatches, received: reduced(stage, plan, {}, received)
            return lambda microbatches, received: reduced(
                stage, plan, microbatches[last].versions[stage].leaves, received
            )
        case Refresh(stage, _):
            return lambda microbatches, received: refreshed(stage, plan, runner.weights.current.leaves, received)
        case Update():
            return _alone(lambda microbatches: runner.update(tuple(microbatches.values())))
        case Step():
            return _alone(lambda microbatches: runner.step(tuple(microbatches.values())))
        case _:
            assert_never(i)


def _alone(run: Callable[[Mapping[int, Microbatch]], None]) -> Act:
    """A computation that reads and makes nothing of other stages."""

    def act(microbatches: Mapping[int, Microbatch], received: Mapping[int, Values]) -> Mapping[int, Values]:
        run(microbatches)
        return {}

    return act


def _open(content: Content) -> Values:
    return content() if callable(content) else content
