"""Schedules that no merge of queues gives: each rank runs a few phases, which repeat a short word.

    Phase(3, "F0 F1")      F0 F1 F0 F1 F0 F1, each with the next microbatch of its chunk

The letters are F, B (with the gradients of weights), I (a B without them) and W (the oldest that waits; "W1": the
oldest of chunk 1). The phases of ZB-V and DualPipe-V are those for at least 2p - 1 and 2p microbatches. With fewer, the
computations of microbatches that do not exist are left out.

Sources: ZB-V, Zero Bubble (Qi et al., ICLR 2024), section 6; DualPipe-V, DeepSeek-V3 (2024), section 3.2.1, and the
V variant of DeepSeek's DualPipe repository. On both, torch's generators agree, rank by rank.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import cycle, islice

from pipecompile.errors import ProgramError
from pipecompile.schedule.order import KINDS, Op, Order, W, check_microbatches
from pipecompile.schedule.shape import Shape, v_shape


@dataclass(frozen=True, slots=True)
class Phase:
    """A word of computations, and how often it repeats."""

    times: int
    word: str


PhasesOf = Callable[[int, int, int], Iterable[Phase]]  # from a rank, the number of ranks, and of microbatches


def zb_v(rank: int, p: int, n: int) -> Iterator[Phase]:
    """ZB-V: no bubble by span where F, B and W take equally long, with the memory of 1F1B."""
    n = max(n, 2 * p - 1)
    yield Phase(2 * (p - rank) - 1, "F0")
    yield Phase(rank, "F1 F0")
    yield Phase(p - rank, "F1 I1 W1")
    yield Phase(n - 2 * p + rank + 1, "F0 I0 W0 F1 I1 W1")
    yield Phase(p - rank - 1, "I0 W0 F1 I1 W1")
    yield Phase(rank, "I0 I1")
    yield Phase(p - rank, "I0 W0")
    yield Phase(rank, "W1")
    yield Phase(rank, "W0")


def dualpipe_v(rank: int, p: int, n: int) -> Iterator[Phase]:
    """DualPipe-V: a Forward of one chunk next to a Backward of the other, which devices may overlap."""
    n = max(n, 2 * p)
    yield Phase(2 * (p - 1 - rank), "F0")
    yield Phase(rank + 1, "F0 F1")
    yield Phase(p - 1 - rank, "I1 W F1")
    yield Phase(n - 2 * p + rank + 1, "F0 B1 F1 B0")
    yield Phase(p - 1 - rank, "B1 F1 B0")
    turns = list(islice(cycle("10"), 2 * (rank + 1)))
    yield Phase(1, " ".join(f"B{chunk}" for chunk in turns[: rank + 1]))
    yield Phase(1, " ".join(f"I{chunk}" for chunk in turns[rank + 1 :]))
    yield Phase(p - 1 - rank, "W I0")
    yield Phase(rank + 1, "W")


def in_phases(phases_of: PhasesOf, num_ranks: int, num_microbatches: int) -> Order:
    """The order of phases on a V shape.

    Raises:
        InputError: there is no rank or no microbatch.
        ProgramError: a computation is left out.
    """
    check_microbatches(num_microbatches)
    shape = v_shape(num_ranks)
    rows = []
    for rank in range(num_ranks):
        ops = _spell(phases_of(rank, num_ranks, num_microbatches), shape, rank)
        rows.append([op for op in ops if op.microbatch < num_microbatches])
    return Order.of(shape, num_microbatches, rows)


def _spell(phases: Iterable[Phase], shape: Shape, rank: int) -> Iterator[Op]:
    count: Counter[tuple[str, int]] = Counter()
    waiting: dict[Op, None] = {}  # the oldest is first
    of_chunk: dict[int, deque[Op]] = defaultdict(deque)  # the same
    for phase in phases:
        for token in phase.word.split() * phase.times:
            letter, chunk = token[0], int(token[1:] or -1)
            if letter == "W":
                op = next(iter(waiting if chunk < 0 else of_chunk[chunk]), None)
                if op is None:
                    continue  # a rank of one has nothing to wait for
                of_chunk[shape.chunk_of[op.stage]].popleft()
                del waiting[op]
                yield op
                continue
            letter, is_split = ("B", True) if letter == "I" else (letter, False)
            stage = shape.stages_of[rank][chunk]
            op = Op(KINDS.index(letter), stage, count[letter, chunk])
            count[letter, chunk] += 1
            yield op
            if is_split:
                weight = Op(W, stage, op.microbatch)
                waiting[weight] = None
                of_chunk[chunk].append(weight)
    if waiting:
        raise ProgramError(f"the phases of rank {rank} leave {next(iter(waiting))} out; add a W at the end")
