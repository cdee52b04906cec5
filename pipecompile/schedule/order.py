"""Orders: what each rank computes, one after the other, as integers.

    code = (kind * num_stages + stage) * num_microbatches + microbatch        kind: 0 is F, 1 is B, 2 is W

    kinds 3 and 4, H and G, are copies to the host and back (``copies``)

F is a Forward. B is a Backward: the gradients of inputs, and of weights unless the order has a W for the same stage and
microbatch. W is the gradient of weights. Integers make a simulation of a thousand ranks, and a search that simulates
thousands of orders, a matter of seconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pipecompile.errors import InputError, ProgramError
from pipecompile.schedule.shape import Shape

F, B, W, H, G = range(5)
KINDS = "FBWHG"
Rows = Sequence[Sequence[int]]


class Op(NamedTuple):
    """One computation, or a copy to the host or back; its text is ``2F0``: stage, kind, microbatch."""

    kind: int
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{KINDS[self.kind]}{self.microbatch}"


class Copying(NamedTuple):
    """A copy to the host or back, which stands before a computation of its rank, by its place in the row."""

    rank: int
    place: int
    op: Op


@dataclass(frozen=True)
class Order:
    """A row of codes per rank.

    Args:
        shape: the stages of each rank.
        num_microbatches: of a step.
        rows: the codes of computations.
        copies: what goes to the host and comes back; it takes no part in simulations of the order.

    Invariants, checked by ``validate``:
    1. each stage runs each microbatch forward and backward once, on its rank, and the W of it at most once;
    2. on a rank, F is before B of the same stage and microbatch, and B before W.

    That no rank waits forever is checked by ``replay``, and where copies stand by ``order_program``.
    """

    shape: Shape
    num_microbatches: int
    rows: tuple[tuple[int, ...], ...]
    copies: tuple[Copying, ...] = ()

    @staticmethod
    def of(shape: Shape, num_microbatches: int, rows: Iterable[Iterable[Op]]) -> Order:
        """The valid order of these computations.

        Raises:
            InputError: there is no microbatch.
            ProgramError: an invariant does not hold.
        """
        check_microbatches(num_microbatches)
        stages = shape.num_stages
        coded: list[tuple[int, ...]] = []
        copies: list[Copying] = []
        for rank, row in enumerate(rows):
            ops = tuple(row)
            for op in ops:
                if not (0 <= op.stage < stages and 0 <= op.microbatch < num_microbatches):
                    raise ProgramError(
                        f"{op} does not exist: there are {stages} stages and {num_microbatches} microbatches, from 0"
                    )
            codes: list[int] = []
            for op in ops:
                if op.kind in (H, G):
                    copies.append(Copying(rank, len(codes), op))
                else:
                    codes.append((op.kind * stages + op.stage) * num_microbatches + op.microbatch)
            coded.append(tuple(codes))
        order = Order(shape, num_microbatches, tuple(coded), tuple(copies))
        order.validate()
        return order

    def op(self, code: int) -> Op:
        rest, microbatch = divmod(code, self.num_microbatches)
        return Op(*divmod(rest, self.shape.num_stages), microbatch)

    def ops(self, rank: int) -> Iterator[Op]:
        """The computations and copies of a rank."""
        mine = [each for each in self.copies if each.rank == rank]
        for place, code in enumerate(self.rows[rank]):
            yield from (each.op for each in mine if each.place == place)
            yield self.op(code)
        yield from (each.op for each in mine if each.place == len(self.rows[rank]))

    def validate(self) -> None:
        """Raises ``ProgramError`` at the first invariant that does not hold."""
        shape, cells = self.shape, self.shape.num_stages * self.num_microbatches
        if len(self.rows) != shape.num_ranks:
            raise ProgramError(f"the order has {len(self.rows)} rows, but the shape has {shape.num_ranks} ranks")
        rank_of = [rank for _ in range(3) for rank in shape.rank_of for _ in range(self.num_microbatches)]
        done = bytearray(3 * cells)
        for rank, row in enumerate(self.rows):
            for code in row:
                if rank_of[code] != rank:
                    op = self.op(code)
                    raise ProgramError(f"{op} is on rank {rank}, but stage {op.stage} is on {rank_of[code]}")
                if done[code]:
                    raise ProgramError(f"{self.op(code)} occurs twice")
                if code >= cells and not done[code - cells]:
                    op, before = self.op(code), self.op(code - cells)
                    raise ProgramError(
                        f"{op} is before {before}, which it needs; put {before} before it on rank {rank}"
                    )
                done[code] = 1
        if (missing := done.find(0, 0, 2 * cells)) >= 0:
            raise ProgramError(f"{self.op(missing)} is missing: each stage runs each microbatch forward and backward")

    def __str__(self) -> str:
        return "\n".join(f"{rank}: {' '.join(map(str, self.ops(rank)))}" for rank in range(len(self.rows)))


def check_microbatches(num_microbatches: int) -> None:
    """Raises ``InputError`` if there is no microbatch."""
    if num_microbatches < 1:
        raise InputError(f"num_microbatches must be at least 1; got {num_microbatches}")
