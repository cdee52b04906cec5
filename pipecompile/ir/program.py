"""Programs: an ordered tuple of instructions per rank, the dependencies between them, and their text form.

A program is *bare* as a schedule writes it (without transfers) and *lowered* once ``lower`` has inserted them. Bubbles
are not part of a program: they are a property of a ``Timeline``.

``dependencies`` is the single definition of what must run before what. The validator, the simulator, the lowering and
the executor all use it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import assert_never

from pipecompile.errors import DeadlockError, ProgramError
from pipecompile.ir.between_stages import Tied
from pipecompile.ir.instruction import (
    Backward,
    BackwardWeight,
    Compute,
    Fetch,
    Forward,
    Instruction,
    Offload,
    Recv,
    Reduce,
    Refresh,
    Result,
    Send,
    Share,
    Step,
    Update,
    parse,
)
from pipecompile.ir.plan import Plan
from pipecompile.ir.row_checks import check_complete, check_offloads, check_shares, check_updates
from pipecompile.ir.tree import children, parent


@dataclass(frozen=True)
class Program:
    """The instructions of each rank, in order.

        >>> from pipecompile.ir.plan import Plan
        >>> program = Program.parse("0: 0F0 0F1 0B0 0B1\\n1: 1F0 1B0 1F1 1B1", Plan.chain(2))
        >>> program.microbatches
        (0, 1)
        >>> print(program)
        0: 0F0 0F1 0B0 0B1
        1: 1F0 1B0 1F1 1B1

    Attributes:
        plan: the stages, and the ranks that they are on.
        ranks: a row of instructions for each rank.
        carried: instructions of earlier programs whose results this one reads: those of a pipeline that is not drained
            between calls, or of a forward pass whose backward pass is a separate program.
        lags: how many Steps of its stage came after each carried Forward; none, for those that it leaves out.

    Invariants, checked by ``validate``:

    1. there is a row per rank, each instruction occurs once, on the rank of its stage, and a microbatch runs on its
       replica (``Plan.runner``); ranks without a stage have rows if they get outputs (Share);
    2. what a computation reads is in the program or carried;
    3. in a lowered program every Send has a Recv and every Recv a Send;
    4. gradients are complete where they are read: no Backward or BackwardWeight comes after a Reduce, Step or Update of
       its stage that includes its microbatch;
    5. the Steps of a stage come in the order of its Updates, and each Update before its Step;
    6. what a Forward saves leaves its device once at most, and is back for the Backward: after the Forward an Offload,
       then a Fetch, after the Offload has ended (``ended_before``), then the Backward;
    7. outputs are shared with all ranks: a Share after the Forwards that make them, and one on each other rank;
    8. ``linearize`` reaches the end: no rank waits forever.

    Source: a Backward and its BackwardWeight, Zero Bubble (Qi et al., ICLR 2024), section 2; Steps of several versions
    of the weights, PipeDream (Narayanan et al., SOSP 2019), section 3.3.
    """

    plan: Plan
    ranks: tuple[tuple[Instruction, ...], ...]
    carried: frozenset[Instruction] = frozenset()
    lags: frozenset[tuple[Forward, int]] = frozenset()

    @cached_property
    def lowered(self) -> bool:
        """Whether the program contains transfers."""
        return any(isinstance(i, Send | Recv) for i in self.instructions)

    @cached_property
    def instructions(self) -> tuple[Instruction, ...]:
        """The instructions of all ranks, one rank after another."""
        return tuple(i for row in self.ranks for i in row)

    @cached_property
    def split(self) -> frozenset[Backward]:
        """The Backwards that leave the gradients of weights to a BackwardWeight."""
        return frozenset(Backward(i.stage, i.microbatch) for i in self.instructions if isinstance(i, BackwardWeight))

    @cached_property
    def updated(self) -> frozenset[Step]:
        """The Steps whose weights an Update makes before, in this program or in an earlier one."""
        both = (*self.carried, *self.instructions)
        return frozenset(Step(i.stage, i.microbatch) for i in both if isinstance(i, Update))

    @cached_property
    def offloaded(self) -> frozenset[Offload]:
        """The Offloads of this program and of those that it continues."""
        return frozenset(i for i in (*self.carried, *self.instructions) if isinstance(i, Offload))

    @cached_property
    def ended_before(self) -> Mapping[Instruction, tuple[Offload, ...]]:
        """By computation or Fetch, the Offloads that end before it: those with a computation of their rank in between.

        Others end with the program.
        """
        found: dict[Instruction, tuple[Offload, ...]] = {}
        for row in self.ranks:
            begun: list[Offload] = []  # and no computation since
            under_way: list[Offload] = []  # during the last computation
            for i in row:
                if isinstance(i, Offload):
                    begun.append(i)
                elif isinstance(i, Forward | Backward | BackwardWeight | Fetch):
                    if under_way:
                        found[i], under_way = tuple(under_way), []
                    if not isinstance(i, Fetch):
                        begun, under_way = [], begun
        return found

    @cached_property
    def microbatches(self) -> tuple[int, ...]:
        """The microbatches that this program runs forward, ascending."""
        return tuple(sorted({i.microbatch for i in self.instructions if isinstance(i, Forward)}))

    def row_of(self, stage: int) -> tuple[Instruction, ...]:
        """The computations of one stage, in order."""
        row = self.ranks[self.plan.rank_of[stage]]
        return tuple(i for i in row if not isinstance(i, Send | Recv | Offload | Fetch) and i.stage == stage)

    def validate(self) -> None:
        """Raises ``ProgramError`` at the first invariant that does not hold."""
        ranks = max((self.plan.num_ranks, *(i.ranks for i in self.instructions if isinstance(i, Share))))
        if len(self.ranks) != ranks:
            having = "its outputs go to" if ranks > self.plan.num_ranks else "the plan has"
            raise ProgramError(f"the program has {len(self.ranks)} rows, but {having} {ranks} ranks")
        for rank, row in enumerate(self.ranks):
            for i in row:
                if i.stage >= self.plan.num_stages or rank_of(i, self.plan) != rank:
                    reason = "is for another rank" if isinstance(i, Share) else f"does not run stage {i.stage}"
                    raise ProgramError(f"{i} is on rank {rank}, which {reason}")
                if isinstance(i, Forward | Backward | BackwardWeight | Offload | Fetch) and not self.plan.runs(
                    i.stage, i.microbatch
                ):
                    raise ProgramError(
                        f"{i} is on the wrong one of the replicas {self.plan.replicas[i.stage]}: microbatch "
                        f"{i.microbatch} belongs to stage {self.plan.runner(i.stage, i.microbatch)}"
                    )
        present = Counter(self.instructions)
        for i, count in present.items():
            if count > 1 or i in self.carried:
                raise ProgramError(f"{i} occurs {count + (i in self.carried)} times (carried instructions included)")
        for i in self.instructions:
            if isinstance(i, Recv) and Send(i.result, i.target) not in present:
                raise ProgramError(f"{i} waits for {Send(i.result, i.target)}, which is not in the program")
            if isinstance(i, Send) and Recv(i.result, i.target) not in present:
                raise ProgramError(f"{i} needs {Recv(i.result, i.target)}, which is not in the program")
        for row in self.ranks:
            check_complete(row)
        check_updates(self.instructions, self.carried)
        for row in self.ranks:
            check_offloads(row, self.carried, self.ended_before)
        check_shares(self.ranks, self.plan)
        for _ in linearize(self):
            pass

    def __str__(self) -> str:
        return "\n".join(f"{rank}: {' '.join(map(str, row))}" for rank, row in enumerate(self.ranks))

    @staticmethod
    def parse(text: str, plan: Plan, carried: Iterable[Instruction] = ()) -> Program:
        """Reads the text of ``str(program)``.

        Args:
            text: a line per rank: its number, a colon, and its instructions, such as ``0: 0F0 0F0>1``.
            plan: the stages that the instructions are of.
            carried: instructions of earlier programs whose results this one reads.

        Raises:
            ProgramError: a line has no rank, or a word is not an instruction.
        """
        rows: dict[int, tuple[Instruction, ...]] = {}
        for line in filter(None, map(str.strip, text.splitlines())):
            rank, colon, words = line.partition(":")
            if not colon or not rank.strip().isdigit():
                raise ProgramError(f"{line!r} must start with a rank and a colon")
            rows[int(rank)] = tuple(map(parse, words.split()))
        if sorted(rows) != list(range(len(rows))):
            raise ProgramError(f"ranks must be consecutive from 0; got rows for the ranks {sorted(rows)}")
        return Program(plan, tuple(rows[rank] for rank in sorted(rows)), frozenset(carried))


def rank_of(i: Instruction, plan: Plan) -> int:
    """The rank of an instruction."""
    match i:
        case Share():
            return i.rank
        case Send():
            return rank_of(i.result, plan)
        case Recv():
            return target_of(i, plan)
        case _:
            return plan.rank_of[i.stage]


def target_of(i: Send | Recv, plan: Plan) -> int:
    """The rank that a transfer goes to."""
    return i.target if isinstance(i.result, Share) else plan.rank_of[i.target]


def reads(i: Compute, plan: Plan) -> Iterator[Result]:
    """The results of other stages, or of other ranks, that a computation reads."""
    match i:
        case Forward(stage, microbatch):
            for source in plan.sources(stage, microbatch):
                yield Forward(source, microbatch)
        case Backward(stage, microbatch):
            for target in plan.targets(stage, microbatch):
                yield Backward(target, microbatch)
        case Reduce(stage, microbatch):
            for follower in followers(stage, plan, trained=True):
                yield Reduce(follower, microbatch)
        case Refresh(stage, microbatch):
            for owner in owners(stage, plan):
                yield Refresh(owner, microbatch)
        case Share(stage, microbatch, rank, ranks):
            if rank != (root := plan.rank_of[stage]):
                yield Share(stage, microbatch, parent(rank, root, ranks), ranks)
        case Step() | Update() | BackwardWeight():
            return
        case _:
            assert_never(i)


def readers(result: Result, plan: Plan) -> tuple[int, ...]:
    """The stages that read a result, ascending."""
    match result:
        case Forward(stage, microbatch):
            return plan.targets(stage, microbatch)
        case Backward(stage, microbatch):
            return plan.sources(stage, microbatch)
        case Reduce(stage, _):
            return owners(stage, plan, trained=True)
        case Refresh(stage, _):
            return followers(stage, plan)
        case Share(stage, _, rank, ranks):
            return tuple(children(rank, plan.rank_of[stage], ranks))
        case _:
            assert_never(result)


def sends(result: Result, plan: Plan) -> tuple[Send, ...]:
    """The Sends that bring a result to its readers on other ranks."""
    every, here = (Send(result, to) for to in readers(result, plan)), rank_of(result, plan)
    return tuple(send for send in every if target_of(send, plan) != here)


def transfer_to(i: Compute, result: Result) -> Send:
    """The Send of a result to a computation that reads it, or what its value is called if both are on one rank."""
    return Send(result, i.rank if isinstance(i, Share) else i.stage)


def owners(stage: int, plan: Plan, trained: bool = False) -> tuple[int, ...]:
    """The stages that own a tied parameter, or a trained one, of which ``stage`` holds a tied copy."""
    return tuple(sorted({tied.owner for tied in _tied(plan, trained) if stage in tied.followers}))


def followers(stage: int, plan: Plan, trained: bool = False) -> tuple[int, ...]:
    """The stages that hold a tied copy of a parameter, or of a trained one, that ``stage`` owns."""
    return tuple(sorted({s for tied in _tied(plan, trained) if tied.owner == stage for s in tied.followers}))


def is_tied(stage: int, plan: Plan, trained: bool = False) -> bool:
    """Whether a stage holds a tied parameter, or a trained one, whose gradients are summed."""
    return any(stage in tied.stages for tied in _tied(plan, trained))


def _tied(plan: Plan, trained: bool) -> Iterator[Tied]:
    return (tied for tied in plan.tied if tied.is_trained or not trained)


def dependencies(i: Instruction, plan: Plan) -> Iterator[Instruction]:
    """The instructions that must run before ``i``, besides those before it on its own rank.

    A result from another rank is read from its Recv. A bare program has no transfers: there ``linearize`` takes the
    result itself instead of its Recv.
    """
    match i:
        case Send(result, _):
            yield result
        case Recv(result, target):
            yield Send(result, target)
        case Share():
            if i.rank == plan.rank_of[i.stage]:
                for stage in sorted({i.stage, *plan.makers(i.rank)}):
                    if (last := plan.last_run(stage, i.microbatch)) is not None:
                        yield Forward(stage, last)
            yield from (Recv(result, i.rank) for result in reads(i, plan))
        case Offload(stage, microbatch):
            yield Forward(stage, microbatch)
        case Fetch(stage, microbatch):
            yield Offload(stage, microbatch)
        case Forward() | Backward() | BackwardWeight() | Reduce() | Step() | Update() | Refresh():
            if isinstance(i, Backward):
                yield Forward(i.stage, i.microbatch)
            if isinstance(i, BackwardWeight):
                yield Backward(i.stage, i.microbatch)
            if isinstance(i, Step | Update) and is_tied(i.stage, plan, trained=True):
                yield Reduce(i.stage, i.microbatch)
            elif isinstance(i, Reduce | Step | Update) and (last := plan.last_run(i.stage, i.microbatch)) is not None:
                yield Backward(i.stage, last)
            for result in reads(i, plan):
                near = plan.rank_of[result.stage] == plan.rank_of[i.stage]
                yield result if near else Recv(result, i.stage)
        case _:
            assert_never(i)


def linearize(program: Program) -> Iterator[tuple[int, Instruction]]:
    """Yields ``(rank, instruction)`` in an order that respects every row and every dependency.

    Raises:
        DeadlockError: no rank can continue; the message lists what each rank waits for.
    """
    done: set[Instruction] = set(program.carried)
    position = [0] * len(program.ranks)
    progress = True
    while progress:
        progress = False
        for rank, row in enumerate(program.ranks):
            while position[rank] < len(row) and _is_ready(row[position[rank]], program, done):
                i = row[position[rank]]
                position[rank] += 1
                done.add(i)
                progress = True
                yield rank, i
    if stuck := [
        (rank, row[p]) for rank, (row, p) in enumerate(zip(program.ranks, position, strict=True)) if p < len(row)
    ]:
        waits = "".join(
            f"\n  rank {rank} waits at {i} for {', '.join(map(str, _missing(i, program, done)))}" for rank, i in stuck
        )
        raise DeadlockError(f"no rank can continue:{waits}")


def _is_ready(i: Instruction, program: Program, done: set[Instruction]) -> bool:
    return next(_missing(i, program, done), None) is None


def _missing(i: Instruction, program: Program, done: set[Instruction]) -> Iterator[Instruction]:
    for needed in dependencies(i, program.plan):
        if isinstance(needed, Recv) and not program.lowered:
            needed = needed.result
        if needed not in done:
            yield needed
