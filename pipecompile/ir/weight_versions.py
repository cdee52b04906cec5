"""Weight versions of a program: the version that each Forward uses, and the number that a stage holds.

A Forward uses the version that is the number of the Steps of its stage so far: where they stand decides. A Backward
needs the weights of its Forward, so a version is live while it is the latest, while a microbatch that used it is in
flight, and while it waits: an Update has made it, and its Step is still to come. This covers all schedules. Those that
step after the flush hold one version. PipeDream, which steps after each Backward, holds ``depth`` versions (stage s of
a chain: stages - s). With vertical sync, every stage uses the version of the first one, and holds as many as it.

    1F1B, rank 0 of 2:       0F0 0F1 0B0 0B1 0S1              used: 0 0      live: 1
    PipeDream, rank 0 of 2:  0F0 0F1 0B0 0S0 0F2 0B1 ...      used: 0 0 1    live: 2
               rank 1 of 2:  1F0 1B0 1S0 1F1 1B1 1S1 1F2 ...  used: 0 1 2    live: 1
    vertical sync, rank 1:   1F0 1B0 1U0 1F1 1S0 1B1 1U1 ...  used: 0 0 1    live: 2

Source: PipeDream (Narayanan et al., SOSP 2019), section 3.3, weight stashing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from pipecompile.ir.instruction import Backward, BackwardWeight, Fetch, Forward, Instruction, Offload, Step, Update
from pipecompile.ir.program import Program


@dataclass(slots=True)
class Stash:
    """The weight versions that one stage holds, as its instructions are processed in order.

    A BackwardWeight needs what its Forward saved, but no weights.
    """

    latest: int = 0  # that Forwards use
    made: int = 0  # by the last Update or Step
    in_flight: dict[int, int] = field(default_factory=dict)  # microbatch -> version that its Forward used
    split: frozenset[int] = frozenset()  # microbatches with a BackwardWeight
    held: set[int] = field(default_factory=set)  # microbatches between their Backward and BackwardWeight

    def do(self, i: Instruction) -> None:
        match i:
            case Forward(_, microbatch):
                self.in_flight[microbatch] = self.latest
            case Backward(_, microbatch):
                self.in_flight.pop(microbatch, None)
                if microbatch in self.split:
                    self.held.add(microbatch)
            case BackwardWeight(_, microbatch):
                self.held.discard(microbatch)
            case Update():
                self.made += 1
            case Step():
                self.latest += 1
                self.made = max(self.made, self.latest)

    @property
    def live(self) -> int:
        """The number of versions held, including the latest and those that wait for their Steps."""
        return len({*range(self.latest, self.made + 1), *self.in_flight.values()})


class Away:
    """The microbatches of each stage whose activations are on the host, as the rows of a program are processed.

    Args:
        program: of which carried Offloads have ended.
    """

    def __init__(self, program: Program) -> None:
        self.ended_before = program.ended_before
        self.by_stage: dict[int, set[int]] = {}
        for i in program.carried:
            if isinstance(i, Offload) and Fetch(i.stage, i.microbatch) not in program.carried:
                self._leave(i)

    def reach(self, i: Instruction) -> list[int]:
        """Called when a rank reaches an instruction; returns the stages of which some have left."""
        ended = self.ended_before.get(i, ())
        for each in ended:
            self._leave(each)
        if isinstance(i, Fetch):
            self.by_stage[i.stage].remove(i.microbatch)
        return [each.stage for each in ended]

    def count(self, stage: int) -> int:
        """The number of microbatches of a stage that are away."""
        return len(self.by_stage.get(stage, ()))

    def _leave(self, i: Offload) -> None:
        self.by_stage.setdefault(i.stage, set()).add(i.microbatch)


@dataclass(frozen=True)
class Versions:
    """The version that each Forward uses. For each stage, the most live versions, and the latest one at the end.

    ``in_flight`` is the most microbatches of each stage that have run forward but not backward.
    """

    used: Mapping[Forward, int]  # carried Forwards included
    live: tuple[int, ...]
    latest: tuple[int, ...]
    in_flight: tuple[int, ...]

    def __str__(self) -> str:
        lines = []
        for stage, (live, latest) in enumerate(zip(self.live, self.latest, strict=True)):
            used = sorted((i.microbatch, version) for i, version in self.used.items() if i.stage == stage)
            table = " ".join(f"F{microbatch}:{version}" for microbatch, version in used)
            lines.append(f"stage {stage}: {table}; at most {live} live, {latest} at the end")
        return "\n".join(lines)


def versions(program: Program, before: Versions | None = None) -> Versions:
    """The versions of a program that continues from the versions ``before``.

    Without ``before``, the version at the start is the largest of the program's ``lags`` in the stage: 0 without any.
    """
    stashes = stash_at_start(program, before)
    used = {Forward(stage, k): v for stage, stash in enumerate(stashes) for k, v in stash.in_flight.items()}
    live = [stash.live for stash in stashes]
    in_flight = [len(stash.in_flight) for stash in stashes]
    for i, stash in walk(program, stashes):
        live[i.stage] = max(live[i.stage], stash.live)
        in_flight[i.stage] = max(in_flight[i.stage], len(stash.in_flight))
        if isinstance(i, Forward):
            used[i] = stash.in_flight[i.microbatch]
    return Versions(used, tuple(live), tuple(stash.latest for stash in stashes), tuple(in_flight))


def delays(program: Program) -> dict[int, int]:
    """By stage, the most updates by which weights are newer than those whose gradients update them.

    Stages that the program does not update are left out.
    """
    used = versions(program).used
    found: dict[int, int] = {}
    for i, stash in walk(program, stash_at_start(program)):
        if isinstance(i, Update) or (isinstance(i, Step) and i not in program.updated):
            last = program.plan.last_run(i.stage, i.microbatch)
            if last is not None and (forward := Forward(i.stage, last)) in used:
                found[i.stage] = max(found.get(i.stage, 0), stash.made - 1 - used[forward])
    return found


def stash_at_start(program: Program, before: Versions | None = None) -> list[Stash]:
    """The versions that each stage holds when the program starts."""
    lags = dict(program.lags)
    latest = [0] * program.plan.num_stages if before is None else [*before.latest]
    for forward, lag in lags.items() if before is None else ():
        latest[forward.stage] = max(latest[forward.stage], lag)
    split: list[set[int]] = [set() for _ in latest]
    for each in program.split:
        split[each.stage].add(each.microbatch)
    stashes = [Stash(version, version, split=frozenset(mine)) for version, mine in zip(latest, split, strict=True)]
    for i in program.carried:
        if isinstance(i, Update):
            stashes[i.stage].made += 1
    for i in sorted((i for i in program.carried if isinstance(i, Forward)), key=lambda i: i.microbatch):
        stashes[i.stage].in_flight[i.microbatch] = (
            latest[i.stage] - lags.get(i, 0) if before is None else before.used[i]
        )
    return stashes


def lags_after(found: Versions, carried: Iterable[Instruction]) -> frozenset[tuple[Forward, int]]:
    """How many Steps came after each carried Forward, for a program that continues from the versions ``found``."""
    forwards = [i for i in carried if isinstance(i, Forward)]
    return frozenset((i, found.latest[i.stage] - found.used[i]) for i in forwards)


def walk(program: Program, stashes: list[Stash]) -> Iterator[tuple[Instruction, Stash]]:
    """Yields the instructions rank by rank, each with the versions that its stage holds after it."""
    for i in program.instructions:
        stashes[i.stage].do(i)
        yield i, stashes[i.stage]
