"""What has run of the last programs, as devices note it themselves: where a device that failed has stopped.

A kernel runs after it is queued, so its error is raised late, by whatever next asks its device for something. Then the
device has stopped. It answers no more questions, not even whether an event has passed. But before, it has set a flag in
the host's memory after each instruction (``Lane.note``):

    queued by rank 1   | all before the program | 1F0 | 1F1 | 1B0 | 1F2
    flags              | set                    | set | set |     |         it has stopped in 1B0

A device may have run a little more than it has noted. So the instruction that queued the kernel is the one found, or
one soon after it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pipecompile.errors import ExecutionError
from pipecompile.ir.instruction import (
    Backward,
    BackwardWeight,
    Fetch,
    Forward,
    Instruction,
    Offload,
    Recv,
    Reduce,
    Refresh,
    Send,
    Share,
    Step,
    Update,
)
from pipecompile.ir.program import Program, dependencies
from pipecompile.ops.accelerators import Mark, has_failed, is_accelerator
from pipecompile.runtime.lane import Lane

PROGRAMS = 32  # that a host may be ahead of its devices


@dataclass(frozen=True)
class RowNotes:
    """What one rank has queued, and what has run of it.

    Attributes:
        begun: The instructions so far; the last one may be half queued.
        flags: One for all that was queued before the row, then one for each instruction; 1 if it has run.
        places: Each of them alone; an accelerator writes there.
        bytes: Their memory, for the host.
    """

    device: torch.device
    flags: Tensor
    places: Sequence[Tensor]
    bytes: memoryview
    begun: list[Instruction] = field(default_factory=list)

    @staticmethod
    def of(device: torch.device, row: Sequence[Instruction]) -> RowNotes:
        flags = torch.zeros(1 + len(row), dtype=torch.uint8, pin_memory=is_accelerator(device))
        places = torch.split(flags, 1) if is_accelerator(device) else ()
        return RowNotes(device, flags, places, flags.numpy().data)

    def ended(self, number: int, lane: Lane, mark: Mark) -> None:
        """Sets a flag once the work before a mark has run. A Recv runs nothing itself.

        Args:
            number: of the instruction, from 1; 0 for all that was queued before the row.
        """
        i = self.begun[-1] if number else None
        if not self.places or isinstance(i, Recv):
            self.bytes[number] = 1
        else:
            copies = {Send: lane.sends, Offload: lane.outward, Fetch: lane.inward}  # of which each has its stream
            lane.note(self.places[number], mark, copies.get(type(i)))

    @property
    def has_begun(self) -> bool:
        """Whether all that was queued before the row has run."""
        return bool(self.flags[0])

    @property
    def has_run(self) -> set[Instruction]:
        flags = zip(self.begun, self.flags[1:].tolist(), strict=False)
        return {i for i, flag in flags if flag and not isinstance(i, Recv)}


@dataclass(frozen=True)
class Stop:
    """The first computation of a rank that has not run, or the first copy.

    Attributes:
        modules: of its stage, in words.
        has_begun: whether all that was queued before its program has run.
        is_ready: whether all that it needs has run.
    """

    instruction: Instruction
    modules: str
    has_begun: bool
    is_ready: bool

    def __str__(self) -> str:
        return _in_words(self.instruction, self.modules)

    def says(self, error: BaseException) -> bool:
        """Whether the error was raised while this instruction was queued."""
        return str(error).startswith(f"stage {self.instruction.stage}, {self.instruction}:")


@dataclass(frozen=True)
class ProgramNotes:
    """What has run of a program.

    Attributes:
        modules: of each stage of this process, in words.
    """

    program: Program
    modules: Mapping[int, str]
    rows: Sequence[RowNotes]

    @property
    def has_run(self) -> bool:
        return all(bool(row.flags.all()) for row in self.rows)

    def stops(self, devices: Container[torch.device], kind: tuple[type, ...]) -> Iterator[Stop]:
        """The first instruction of a kind that has not run, of each rank on these devices."""
        done = self.program.carried.union(*(row.has_run for row in self.rows))
        for row in self.rows:
            left = [i for i in row.begun if isinstance(i, kind) and i not in done]
            if left and row.device in devices:
                needed = ((i, _sent(i)) for i in dependencies(left[0], self.program.plan))
                is_ready = all(i in done or sent in done for i, sent in needed)
                modules = self.modules.get(left[0].stage, "in another process")
                yield Stop(left[0], modules, row.has_begun, is_ready)


class Notes:
    """The notes of the last programs of a pipeline."""

    def __init__(self) -> None:
        self.programs: deque[ProgramNotes] = deque(maxlen=PROGRAMS)
        self.failed = False  # the last program: nothing will be noted any more

    def begin(self, program: Program, modules: Mapping[int, str], lanes: Mapping[int, Lane]) -> Mapping[int, RowNotes]:
        """Notes for a program that is about to run; forgets those that have run, or failed."""
        if self.failed:
            self.programs.clear()
            self.failed = False
        while self.programs and self.programs[0].has_run:
            self.programs.popleft()
        ranks = [rank for rank in lanes if rank < len(program.ranks)]
        rows = {rank: RowNotes.of(lanes[rank].device, program.ranks[rank]) for rank in ranks}
        self.programs.append(ProgramNotes(program, modules, [*rows.values()]))
        return rows

    def stops(self, devices: Container[torch.device]) -> Sequence[Stop]:
        """Where devices that have failed have stopped. Copies have a stream of their own."""
        found = [
            stop
            for kind in (
                (Send,),
                (Offload,),
                (Fetch,),
                (Forward, Backward, BackwardWeight, Reduce, Step, Update, Refresh, Share),
            )
            for stop in next(filter(None, ([*notes.stops(devices, kind)] for notes in self.programs)), ())
        ]
        return [stop for stop in found if stop.is_ready] or found

    def explained(self, errors: Sequence[BaseException], lanes: Iterable[Lane]) -> ExecutionError | None:
        """The error that says where a device has stopped; None if all devices still work.

        Args:
            errors: what was raised when that was noticed. The one that names the instruction best is passed on.
        """
        devices = failed(lanes)
        if not devices:
            return None
        self.failed = True
        which = " and ".join(map(str, devices))
        stops = self.stops(devices)
        error = next((error for error in errors if any(stop.says(error) for stop in stops)), errors[0])
        noticed = f"it was noticed {'in' if isinstance(error, ExecutionError) else 'by'} {str(error).splitlines()[0]}"
        if not stops:
            return ExecutionError(
                f"a kernel has failed on {which} outside the stages, whose own work there has all run; look at what "
                f"the caller queues, such as its loss and its optimizer; {noticed}"
            )
        places = " or ".join(map(str, stops))
        before = "" if all(stop.has_begun for stop in stops) else ", or in what was queued before it"
        return ExecutionError(
            f"a kernel has failed on {which}, in {places} or soon after{before}: kernels run later than they are "
            f"queued, and this is the first work that {which} has not noted as done; to see the source line, run with "
            f"kernels that run when they are queued (CUDA_LAUNCH_BLOCKING=1); {noticed}"
        )


def failed(lanes: Iterable[Lane]) -> list[torch.device]:
    """The devices that have failed. Does not wait."""
    return [device for device in dict.fromkeys(lane.device for lane in lanes) if has_failed(device)]


def _sent(needed: Instruction) -> Instruction:
    return Send(needed.result, needed.target) if isinstance(needed, Recv) else needed


def _in_words(i: Instruction, modules: str) -> str:
    match i:
        case Send(result, target):
            to = "rank" if isinstance(result, Share) else "stage"
            return f"the copy to {to} {target} from {_in_words(result, modules)}"
        case Recv(result, _):
            return _in_words(result, modules)
        case Forward(stage, microbatch):
            kind = "forward"
        case Backward(stage, microbatch):
            kind = "backward"
        case BackwardWeight(stage, microbatch):
            kind = "gradients of weights"
        case Reduce(stage, microbatch):
            kind = "sum of tied gradients"
        case Step(stage, microbatch):
            kind = "optimizer step"
        case Update(stage, microbatch):
            kind = "optimizer step for later forwards"
        case Refresh(stage, microbatch):
            kind = "copy of tied parameters"
        case Share(stage, microbatch):
            kind = "outputs for all ranks"
        case Offload(stage, microbatch):
            kind = "copy of activations to the host"
        case Fetch(stage, microbatch):
            kind = "copy of activations from the host"
    return f"stage {stage}, microbatch {microbatch}, {kind} ({i}, {modules})"
