"""Peak memory of each stage in bytes, by kind.

    parameters    its own, and tied copies
    gradients     of trainable parameters, from the first Backward after a Step or Update, or the first BackwardWeight
    optimizer     optimizer state of trainable parameters; only the owner of a tied parameter has it
    versions      other weights than the newest that Forwards or Backwards still use (see ``weight_versions``)
    activations   kept from Forward to Backward, for every microbatch in flight, and not while they are on the host; of
                  a split Backward, what its BackwardWeight needs: inputs of functions, and gradients of their outputs
    waiting       values and gradients of other stages, from their arrival to the end of the Backward; gradients of tied
                  parameters (those of replicas included), to the Reduce
    outputs       the model's outputs, per microbatch until the step ends, and then joined
    working       temporaries of one Forward or Backward (see ``stage_memory``), or of an optimizer step
    buffers       as given
    tail          for what is computed once from the whole batch, as given; in several processes each computes it, and
                  has the outputs that others share

Everything is derived from a Program, independent of the schedule. With a timeline, a value waits from its arrival to
the end of its Backward. Without one, ``waiting`` is an upper bound: a value that stage u has sent waits at its reader
while its microbatch is in flight at u, so as many values wait as u has microbatches in flight (or the reader's share of
them, if it has replicas), and a gradient may wait for each microbatch in flight.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Container, Mapping, Sequence, Set
from dataclasses import dataclass, fields, replace
from typing import Literal

from pipecompile.ir.graph import CostedGraph
from pipecompile.ir.instruction import (
    Backward,
    BackwardWeight,
    Fetch,
    Forward,
    Instruction,
    Step,
    Update,
)
from pipecompile.ir.json_io import Json
from pipecompile.ir.plan import Plan, members
from pipecompile.ir.program import Program
from pipecompile.ir.timeline import Timeline
from pipecompile.ir.weight_versions import Away, Stash, stash_at_start, versions
from pipecompile.planning.stage_memory import Load, load


@dataclass(frozen=True, slots=True)
class Bytes:
    """The bytes that one stage holds at one moment, by kind."""

    parameters: int = 0
    gradients: int = 0
    optimizer: int = 0
    versions: int = 0
    activations: int = 0
    waiting: int = 0
    outputs: int = 0
    working: int = 0
    buffers: int = 0
    tail: int = 0

    @property
    def total(self) -> int:
        return sum(nbytes for _, nbytes in self.by_kind())

    @property
    def of_rows(self) -> int:
        """The bytes that grow with the rows of a microbatch."""
        return self.activations + self.waiting + self.outputs + self.working

    def by_kind(self) -> list[tuple[str, int]]:
        return [(kind, getattr(self, kind)) for kind in KINDS]


How = Literal["single", "foreach", "fused"]
STEP_COPIES = 2  # temporary copies of one parameter in a step: Adam computes its denominator in two operations
KINDS = tuple(field.name for field in fields(Bytes))


@dataclass(frozen=True)
class Memory(Json):
    """Peak memory of each stage and of each rank."""

    stages: tuple[Bytes, ...]
    ranks: tuple[int, ...]  # peak of all its stages together, which need not peak at the same time

    def __str__(self) -> str:
        kinds = [kind for kind in KINDS if any(getattr(stage, kind) for stage in self.stages)]
        rows = [["", *kinds, "all"]]
        for index, stage in enumerate(self.stages):
            rows.append([f"stage {index}", *(f"{getattr(stage, kind):,}" for kind in kinds), f"{stage.total:,}"])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows)


@dataclass(frozen=True, slots=True)
class TailBytes:
    """What is computed once from the whole batch holds, on the device of the last stage.

    Attributes:
        values: bytes of what it gets from the stages and of what it computes.
        weights: bytes of each weight that it works with, by name; one that the stage reads too is there once.
    """

    values: int = 0
    weights: tuple[tuple[str, int], ...] = ()

    def beside(self, names: Container[str]) -> int:
        """The bytes beside a stage with these parameters."""
        return self.values + sum(nbytes for name, nbytes in self.weights if name not in names)


NO_TAIL = TailBytes()


def memory(
    costed: CostedGraph,
    plan: Plan,
    program: Program,
    optimizer_state: float = 2.0,
    buffers: Sequence[int] = (),
    tail: TailBytes = NO_TAIL,
    step: How = "single",
    timeline: Timeline | None = None,
) -> Memory:
    """The memory of training with a program.

    Args:
        costed: the model with its costs.
        plan: the stages.
        program: bare or lowered; its plan can be any plan with the same stages.
        optimizer_state: bytes per byte of trainable parameters; 2 for Adam.
        buffers: bytes of buffers of each stage.
        tail: what the last stage holds for what is computed once from the whole batch.
        step: how the optimizer updates parameters: one by one ("single", two copies of one), all at once ("foreach", a
            copy of all, torch's way on CUDA), or in one kernel ("fused", no copy).
        timeline: of the program, simulated or measured; without it ``waiting`` is an upper bound.
    """
    stages = stage_states(costed, plan, program, optimizer_state, buffers, tail, step, timeline)
    on_rank: list[list[StageState]] = [[] for _ in program.ranks]
    for state, rank in zip(stages, program.plan.rank_of, strict=True):
        on_rank[rank].append(state)
    ranks = [sum(state.total for state in mine) for mine in on_rank]
    for rank, (row, mine) in enumerate(zip(program.ranks, on_rank, strict=True)):
        for i in row:
            if isinstance(i, Forward | Backward | BackwardWeight | Step | Update | Fetch):
                stages[i.stage].do(i)
                others = sum(state.total for state in mine if state is not stages[i.stage])
                ranks[rank] = max(ranks[rank], others + stages[i.stage].latest)
        ranks[rank] = max(ranks[rank], at_the_end(mine))
    return Memory(tuple(state.most for state in stages), tuple(ranks))


def at_the_end(mine: Sequence[StageState]) -> int:
    """The peak bytes of the stages of one rank after their last instructions: one optimizer steps for all of them."""
    ends = [(state.end(), state.how) for state in mine]
    working = [held.working for held, _ in ends]
    one_by_one = any(how == "single" for _, how in ends)
    return sum(held.total - held.working for held, _ in ends) + (max(working) if one_by_one else sum(working))


def stage_states(
    costed: CostedGraph,
    plan: Plan,
    program: Program,
    optimizer_state: float,
    buffers: Sequence[int],
    tail: TailBytes,
    step: How,
    timeline: Timeline | None,
) -> list[StageState]:
    """What each stage holds before its first instruction. Arguments are those of ``memory``."""
    in_flight, away = versions(program).in_flight, Away(program)
    clock = None if timeline is None else _Clock(program, timeline)
    stages, count = [], len(program.microbatches)
    for stage, stash in enumerate(stash_at_start(program)):
        work = load(costed, plan, stage)
        held, trainable, owned = _parameters(costed, plan, stage)
        fixed = Bytes(
            parameters=held,
            optimizer=round(optimizer_state * sum(owned)),
            waiting=sum(tied.nbytes * len(tied.followers) for tied in plan.tied if tied.owner == stage),
            buffers=buffers[stage] if buffers else 0,
            tail=_tail_bytes(plan, stage, tail.beside(_read(costed, plan, stage)), count),
        )
        copies = {"single": STEP_COPIES * max(owned, default=0), "foreach": sum(owned), "fused": 0}[step]
        waiting = _Bound(work, plan, stage, in_flight) if clock is None else clock.waiting(work, plan, stage)
        stages.append(StageState(stage, work, fixed, trainable, copies, step, stash, waiting, program.updated, away))
    return stages


def _tail_bytes(plan: Plan, stage: int, tail: int, microbatches: int) -> int:
    """The bytes for the whole batch that a stage holds: the last one, or in several processes the last of each rank."""
    last = plan.num_stages - 1
    if stage == last or not plan.made:
        return tail if stage == last else 0
    rank = plan.rank_of[stage]
    if rank in plan.rank_of[stage + 1 :]:
        return 0
    others = {plan.rank_of[made.stage] for made in plan.made} - {rank}
    return max(tail, sum(plan.shared_bytes(other, microbatches) for other in others))


def _read(costed: CostedGraph, plan: Plan, stage: int) -> set[str]:
    """The parameters that a stage reads."""
    return {name for i in members(costed.graph, plan, stage) for name in costed.graph.nodes[i].parameters}


def _parameters(costed: CostedGraph, plan: Plan, stage: int) -> tuple[int, int, list[int]]:
    """Bytes of a stage's parameters, of its trainable ones, and of each trainable one that it owns."""
    names = _read(costed, plan, stage)
    mine = [parameter.spec for parameter in costed.graph.parameters if parameter.name in names]
    trained = [spec.nbytes for spec in mine if spec.requires_grad]
    followed = {tied.parameter for tied in plan.tied if stage in tied.followers}
    owned = [p.spec.nbytes for p in costed.graph.parameters if p.name in names - followed and p.spec.requires_grad]
    return sum(spec.nbytes for spec in mine), sum(trained), owned


def _once(nbytes: Mapping[int, int], plan: Plan) -> dict[int, int]:
    """Bytes by stage, with replicas counted once: a microbatch comes from one of them, and goes to one."""
    return {plan.replica_of[stage]: n for stage, n in nbytes.items()}


class _Bound:
    """An upper bound of the waiting bytes, for any timing."""

    def __init__(self, work: Load, plan: Plan, stage: int, in_flight: Sequence[int]) -> None:
        counts = {c.source: plan.shared(c, in_flight[c.source]) for c in plan.incoming[stage]}
        self.received = sum(work.received[source] * count for source, count in counts.items())
        self.returned = sum(_once(work.returned, plan).values())

    def reach(self, i: Instruction) -> None:
        """Called when the stage reaches an instruction."""

    def nbytes(self, count: int) -> int:
        """Waiting bytes with ``count`` microbatches in flight."""
        return self.received + count * self.returned


class _Clock:
    """When each instruction of a program ends, and the microbatches that each stage runs."""

    def __init__(self, program: Program, timeline: Timeline) -> None:
        self.ends = {span.instruction: span.end for span in timeline.spans}
        self.forward: list[set[int]] = [set() for _ in range(program.plan.num_stages)]
        self.backward: list[set[int]] = [set() for _ in range(program.plan.num_stages)]
        for i in program.instructions:
            if isinstance(i, Forward):
                self.forward[i.stage].add(i.microbatch)
            elif isinstance(i, Backward):
                self.backward[i.stage].add(i.microbatch)
        for i in program.carried:
            if isinstance(i, Forward):
                self.forward[i.stage].add(i.microbatch)

    def waiting(self, work: Load, plan: Plan, stage: int) -> _Arrivals:
        """What waits in a stage."""
        arrivals = [
            (nbytes, sorted(self.ends.get(Forward(plan.runner(source, k), k), 0.0) for k in self.forward[stage]))
            for source, nbytes in _once(work.received, plan).items()
        ] + [
            (nbytes, sorted(self.ends.get(Backward(plan.runner(target, k), k), 0.0) for k in self.backward[stage]))
            for target, nbytes in _once(work.returned, plan).items()
        ]
        return _Arrivals(self.ends, arrivals)


class _Arrivals:
    """The waiting bytes by a timeline: what has arrived when an instruction ends, minus what is no longer needed."""

    def __init__(self, ends: Mapping[Instruction, float], arrivals: Sequence[tuple[int, list[float]]]) -> None:
        self.ends, self.arrivals = ends, arrivals
        self.until, self.done, self.last = 0.0, 0, False

    def reach(self, i: Instruction) -> None:
        self.done += self.last
        self.until, self.last = self.ends[i], isinstance(i, Backward)

    def nbytes(self, count: int) -> int:
        return sum(nbytes * max(0, bisect_right(times, self.until) - self.done) for nbytes, times in self.arrivals)


class StageState:
    """The memory of one stage while its instructions are processed."""

    def __init__(
        self,
        index: int,
        work: Load,
        fixed: Bytes,
        trainable: int,
        step: int,
        how: How,
        stash: Stash,
        waiting: _Bound | _Arrivals,
        updated: Set[Step],
        away: Away,
    ) -> None:
        self.index, self.work, self.fixed, self.trainable, self.step = index, work, fixed, trainable, step
        self.how = how
        self.stash, self.waiting, self.updated, self.away = stash, waiting, updated, away
        self.gradients = 0  # bytes
        self.made = 0  # microbatches whose outputs exist
        self.always = fixed.total
        self.most = self.now
        self.latest = self.total  # the peak bytes during the last instruction
        self.peak = self.latest

    @property
    def now(self) -> Bytes:
        """The bytes held between two instructions."""
        count = len(self.stash.in_flight)
        return replace(
            self.fixed,
            gradients=self.gradients,
            versions=self.trainable * (self.stash.live - 1),
            activations=count * self.work.saved + len(self.stash.held) * self.work.left - self.on_host,
            waiting=self.fixed.waiting + self.waiting.nbytes(count),
            outputs=self.made * self.work.outputs,
        )

    @property
    def total(self) -> int:
        """The bytes of ``now``, which large programs ask for at each instruction."""
        count = len(self.stash.in_flight)
        return (
            self.always
            + self.gradients
            + self.trainable * (self.stash.live - 1)
            + count * self.work.saved
            + len(self.stash.held) * self.work.left
            + self.waiting.nbytes(count)
            + self.made * self.work.outputs
            - self.on_host
        )

    @property
    def on_host(self) -> int:
        """The bytes of its activations that are on the host."""
        return self.away.count(self.index) * self.work.movable

    def do(self, i: Forward | Backward | BackwardWeight | Step | Update | Fetch) -> None:
        """Processes an instruction; ``latest`` is the peak during it."""
        self.away.reach(i)  # of all stages, which share it
        if isinstance(i, Fetch):
            self.latest = 0
            self._reach(0)
            return
        self.waiting.reach(i)
        self.latest = 0
        match i:
            case Forward():
                self._reach(self.work.forward)
                self.made += 1
            case BackwardWeight():
                self._reach(self.work.weights if self.gradients == self.trainable else self.work.first_weights)
                self.gradients = self.trainable
            case Backward(_, microbatch) if microbatch in self.stash.split:
                self.gradients = max(self.gradients, self.trainable - self.work.queued)
                self._reach(self.work.split_backward)
            case Backward() if self.gradients == self.trainable:
                self._reach(self.work.backward)
            case Backward():
                self._reach(self.work.first_backward)
                self.gradients = self.trainable
            case Step() | Update():
                self._reach(0)
        self.stash.do(i)
        if isinstance(i, Update | Step) and i not in self.updated:  # weights still in use are copied before it begins
            self._reach(self.step)
            self.gradients = 0
        self._reach(0)

    def _reach(self, working: int) -> None:
        """Notes what is held now, with ``working`` bytes beside it."""
        total = self.total + working
        self.latest = max(self.latest, total)
        if total > self.peak:
            self.peak, self.most = total, replace(self.now, working=working)

    def end(self) -> Bytes:
        """Ends the step: outputs are joined, and the optimizer steps if it has not yet."""
        joined = self.now.outputs * (1 + (self.made > 1))
        last = replace(self.now, outputs=joined, working=self.step * (self.gradients > 0))
        self.most = max(self.most, last, key=lambda held: held.total)
        return last
