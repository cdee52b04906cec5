"""Instructions of ranks, and their text form.

    Forward(stage, microbatch)     2F0     runs the stage on one microbatch
    Backward(stage, microbatch)    2B0     computes the gradients of its inputs and weights; without those of weights,
                                           if the program has a BackwardWeight for them
    BackwardWeight(stage, ...)     2W0     computes the gradients of weights, any time after the Backward
    Reduce(stage, microbatch)      2R7     sends or sums the gradients of tied parameters up to microbatch 7
    Step(stage, microbatch)        2S7     later Forwards use the weights that the optimizer makes with the gradients up
                                           to microbatch 7; it makes them now, unless an Update has made them before
    Update(stage, microbatch)      2U7     the optimizer makes these weights, which no Forward uses before the Step
    Refresh(stage, microbatch)     2P0     sends or takes the values of tied parameters, before microbatch 0
    Share(stage, microbatch, ...)  2A7@0/4 brings the outputs up to microbatch 7 that the rank of the stage makes to
                                           rank 0, one of 4 in as many processes; at the stage's own rank, joins them
    Send(result, target)           0F3>2   sends the result of a computation to a stage on another rank
    Recv(result, target)           2<0F3   the matching receive, with the same fields
                                           (of a Share: to a rank, which may have no stage)
    Offload(stage, microbatch)     2H0     begins to copy to the host what the Forward has saved for the Backward, while
                                           the rank runs its next Forward, Backward or BackwardWeight; what comes after
                                           that one, a Fetch too, waits for the copy, and the device's memory is free
    Fetch(stage, microbatch)       2G0     begins to copy it back; the Backward waits for that

The notation of computations follows torch.distributed.pipelining where the two overlap.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from pipecompile.errors import ProgramError


@dataclass(frozen=True, slots=True)
class Forward:
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}F{self.microbatch}"


@dataclass(frozen=True, slots=True)
class Backward:
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}B{self.microbatch}"


@dataclass(frozen=True, slots=True)
class BackwardWeight:
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}W{self.microbatch}"


@dataclass(frozen=True, slots=True)
class Reduce:
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}R{self.microbatch}"


@dataclass(frozen=True, slots=True)
class Step:
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}S{self.microbatch}"


@dataclass(frozen=True, slots=True)
class Update:
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}U{self.microbatch}"


@dataclass(frozen=True, slots=True)
class Refresh:
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}P{self.microbatch}"


@dataclass(frozen=True, slots=True)
class Share:
    stage: int  # the last one of its rank that makes outputs
    microbatch: int
    rank: int
    ranks: int  # in all

    def __str__(self) -> str:
        return f"{self.stage}A{self.microbatch}@{self.rank}/{self.ranks}"


@dataclass(frozen=True, slots=True)
class Offload:
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}H{self.microbatch}"


@dataclass(frozen=True, slots=True)
class Fetch:
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}G{self.microbatch}"


Result = Forward | Backward | Reduce | Refresh | Share  # what other stages can read


@dataclass(frozen=True, slots=True)
class Send:
    result: Result
    target: int  # stage; of a Share, rank

    @property
    def stage(self) -> int:
        return self.result.stage

    def __str__(self) -> str:
        return f"{self.result}>{self.target}"


@dataclass(frozen=True, slots=True)
class Recv:
    result: Result
    target: int  # stage; of a Share, rank

    @property
    def stage(self) -> int:
        return self.result.stage if isinstance(self.result, Share) else self.target

    def __str__(self) -> str:
        return f"{self.target}<{self.result}"


OfStage = Forward | Backward | BackwardWeight | Reduce | Step | Update | Refresh  # run by the stage
Compute = OfStage | Share
Copy = Offload | Fetch
Instruction = Compute | Send | Recv | Copy

_KINDS: dict[str, type[OfStage | Copy]] = {
    "F": Forward,
    "B": Backward,
    "W": BackwardWeight,
    "R": Reduce,
    "S": Step,
    "U": Update,
    "P": Refresh,
    "H": Offload,
    "G": Fetch,
}
_TEXT = re.compile(
    r"(?:(?P<receiver>\d+)<)?(?P<stage>\d+)(?:(?P<kind>[FBWRSUPHG])(?P<microbatch>\d+)"
    r"|A(?P<shared>\d+)@(?P<rank>\d+)/(?P<ranks>\d+))(?:>(?P<target>\d+))?"
)


def parse(text: str) -> Instruction:
    """The instruction whose ``str`` is ``text``.

    Raises:
        ProgramError: the text is not an instruction.
    """
    match = _TEXT.fullmatch(text)
    if match is None or (match["receiver"] and match["target"]):
        raise ProgramError(f"{text!r} is not an instruction; write one such as 2F0, 2B0, 2W0, 2R0, 2S0, 0F3>2 or 2<0F3")
    compute: Compute | Copy
    if match["kind"] is None:
        compute = Share(*(int(match[field]) for field in ("stage", "shared", "rank", "ranks")))
    else:
        compute = _KINDS[match["kind"]](int(match["stage"]), int(match["microbatch"]))
    if not (match["receiver"] or match["target"]):
        return compute
    if isinstance(compute, Step | Update | BackwardWeight | Offload | Fetch):
        kind = f"{'an' if isinstance(compute, Update | Offload) else 'a'} {type(compute).__name__}"
        raise ProgramError(f"{text!r}: {kind} has no result to send or receive")
    if match["receiver"]:
        return Recv(compute, int(match["receiver"]))
    return Send(compute, int(match["target"]))
