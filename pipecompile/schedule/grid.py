"""Orders as text: grids that people write, and the CSV files of torch.distributed.pipelining.

    0: 0F0 0F1 .   0B0 .   0B1        a line per rank, a word per computation: stage, kind, microbatch
    1: .   1F0 1B0 1F1 1B1 .          dots are for the eye: an order has no times

The kinds are F, B, I and W. B computes all gradients, unless there is a W for it; I is a B that must have one. H copies
what an F has saved to the host's memory, and G copies it back before the B:

    0: 0F0 0H0 0F1 0F2 0G0 0B0 0B1 0B2

Where each rank has one stage, words may leave it out: ``F0``. A bar or comma between words is allowed, and so is a
comment, from ``#`` to the end of its line.

torch's files have a line per rank and a cell per computation or pause. They may hold transfers and other work
(``0SEND_F0``, ``1UNSHARD``, ``0REDUCE_GRAD``), which are left out: they follow from the order. An overlapped pair,
``(3F1;0B2)OVERLAP_F_B``, is read as its computations one after the other.
"""

from __future__ import annotations

import csv
import io
import re
import warnings
from collections.abc import Iterable, Sequence

from pipecompile.errors import ProgramError
from pipecompile.schedule.order import B, F, G, H, Op, Order, W
from pipecompile.schedule.replay import replay
from pipecompile.schedule.shape import Shape
from pipecompile.schedule.stage_costs import StageCosts

_WORD = re.compile(r"(?P<stage>\d*)(?P<kind>[FBIWHG])(?P<microbatch>\d+)")
_LABEL = re.compile(r"\s*(?:rank\s*)?(?P<rank>\d+)\s*:", re.IGNORECASE)
_PAIR = re.compile(r"\((?P<inside>[^()]*)\)OVERLAP_F_B")
_NO_COMPUTATION = re.compile(r"\d+(UNSHARD|RESHARD|REDUCE_GRAD|(SEND|RECV)_[FB])\d*")
KIND = {"F": F, "B": B, "I": B, "W": W, "H": H, "G": G}

Word = tuple[str, str, int, str]  # stage or nothing, kind, microbatch, and the whole word


def read_grid(text: str, shape: Shape | None = None) -> Order:
    """The order that a grid draws.

    Args:
        shape: by default a chain of all stages in the text, each on the rank of its line.

    Raises:
        ProgramError: the text is not a grid, or the order is not valid; the message has the word or the computation.
        DeadlockError: no rank could continue.
    """
    bare = (line.partition("#")[0] for line in text.splitlines())
    lines = [line for line in bare if line.strip()]
    rows = []
    for number, line in enumerate(lines):
        label = _LABEL.match(line)
        if label and int(label["rank"]) != number:
            raise ProgramError(f"line {line!r} is for rank {label['rank']}, but it is in the place of rank {number}")
        words = re.split(r"[\s|,]+", line[label.end() :] if label else line)
        rows.append([_word(word) for word in words if word.strip(".")])
    return _order(rows, shape)


def write_grid(order: Order) -> str:
    """The grid of an order, drawn as if F, B and W took one unit of time each (and a B that does both, two).

    Copies stand in the cell of the computation that they are before.
    """
    split = any(op.kind == W for rank in range(len(order.rows)) for op in order.ops(rank))
    start = replay(order, _units(order.shape, float(split))).start
    cells = [{round(start[code]): str(order.op(code)) for code in row} for row in order.rows]
    for rank, place, op in reversed(order.copies):
        row = order.rows[rank]
        tick = round(start[row[place]]) if place < len(row) else 1 + max(cells[rank], default=-1)
        cells[rank][tick] = f"{op} {cells[rank].get(tick, '')}".strip()
    width = max(len(word) for row in cells for word in row.values())
    columns = range(1 + max(tick for row in cells for tick in row))
    lines = (" ".join(row.get(tick, ".").ljust(width) for tick in columns).rstrip(" .") for row in cells)
    return "\n".join(f"{rank}: {line}" for rank, line in enumerate(lines))


def read_torch_csv(text: str, shape: Shape | None = None) -> Order:
    """The order in a file of torch.

    torch 2.13 lists the last rank of its 1F1B as F1 B0 F2 B1 ... though microbatch n does not exist; its runtime does
    F0 B0 F1 B1. Such a row is read as what runs, with a warning.

    Raises:
        ProgramError: a cell is not an action of torch, or the order is not valid.
        DeadlockError: no rank could continue.
    """
    rows = []
    for cells in csv.reader(io.StringIO(text)):
        words = []
        for cell in map(str.strip, cells):
            pair = _PAIR.fullmatch(cell)
            for word in pair["inside"].split(";") if pair else [cell]:
                if word and not _NO_COMPUTATION.fullmatch(word):
                    words.append(_word(word.strip()))
        rows.append(words)
    while rows and not rows[-1]:
        rows.pop()
    return _order(_repaired(rows), shape)


def write_torch_csv(order: Order) -> str:
    """The order as a file that torch's ``_load_csv`` reads (``compute_only``): I where there is a W, B where not.

    Raises:
        ProgramError: it copies activations to the host, for which torch's files have no word.
    """
    if order.copies:
        raise ProgramError(
            f"{order.copies[0].op} copies activations to the host, for which torch's files have no word; write a grid "
            f"as text, or leave the copies out"
        )
    present = {order.op(code) for row in order.rows for code in row}
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    for rank in range(len(order.rows)):
        writer.writerow([_torch_word(op, present) for op in order.ops(rank)])
    return out.getvalue()


def _torch_word(op: Op, present: set[Op]) -> str:
    is_split = op.kind == B and op._replace(kind=W) in present
    return f"{op.stage}I{op.microbatch}" if is_split else str(op)


def _word(word: str) -> Word:
    match = _WORD.fullmatch(word)
    if match is None:
        raise ProgramError(f"{word!r} is not a computation; write one such as 2F0, 2B0, 2I0 or 2W0, or . for a pause")
    return match["stage"], match["kind"], int(match["microbatch"]), word


def _order(rows: Sequence[Sequence[Word]], shape: Shape | None) -> Order:
    words = [(rank, *word) for rank, row in enumerate(rows) for word in row]
    if not words:
        raise ProgramError("the text has no computation; write a line per rank with words such as 0F0 and 0B0")
    named = {bool(stage) for _, stage, *_ in words}
    if len(named) > 1:
        raise ProgramError("some words name their stage and some do not; write all as 2F0, or all as F0")
    for rank, row in enumerate(rows):
        if not row:
            raise ProgramError(f"rank {rank} has no computation; write words such as {rank}F0, or leave out its line")
    for rank, _, _, k, word in words:
        if k >= len(words):  # of which each microbatch has two or more
            raise ProgramError(
                f"{word} of rank {rank} is of microbatch {k}, but there are {len(words)} computations in all; number "
                f"microbatches from 0, without gaps"
            )
    ops = [[Op(KIND[kind], int(stage or rank), k) for stage, kind, k, _ in row] for rank, row in enumerate(rows)]
    shape = _chain(ops) if shape is None else shape
    order = Order.of(shape, 1 + max(op.microbatch for row in ops for op in row), ops)
    whole = {op for row in ops for op in row}
    for rank, stage, kind, k, word in words:
        if kind == "I" and Op(W, int(stage or rank), k) not in whole:
            raise ProgramError(f"{word} has no W: write {word.replace('I', 'W')} after it, or B for both")
    replay(order, _units(shape))
    return order


def _chain(rows: Iterable[Iterable[Op]]) -> Shape:
    rank_of: dict[int, int] = {}
    for rank, row in enumerate(rows):
        for op in row:
            if rank_of.setdefault(op.stage, rank) != rank:
                raise ProgramError(f"{op} is on rank {rank}, but stage {op.stage} is on rank {rank_of[op.stage]} too")
    if sorted(rank_of) != list(range(len(rank_of))):
        raise ProgramError(f"stages must be consecutive from 0; the text has {sorted(rank_of)}")
    edges = tuple((stage, stage + 1) for stage in range(len(rank_of) - 1))
    return Shape(tuple(rank_of[stage] for stage in range(len(rank_of))), edges)


def _repaired(rows: list[list[Word]]) -> list[list[Word]]:
    """The rows, with the last one of torch's 1F1B as it runs."""
    if not rows:
        return rows
    *others, last = rows
    n = len(last) // 2
    listed = [(kind, k) for _, kind, k, _ in last]
    torch_lists = [pair for k in range(n) for pair in (("F", k + 1), ("B", k))]
    if not last or listed != torch_lists or any(k >= n for row in others for _, _, k, _ in row):
        return rows
    warnings.warn(
        f"rank {len(others)} lists F1 to F{n}, as torch's 1F1B does, though its runtime runs F0 to F{n - 1}: read so",
        stacklevel=3,
    )
    runs = [(stage, kind, k - (kind == "F"), word) for stage, kind, k, word in last]
    return [*others, runs]


def _units(shape: Shape, weights: float = 1.0) -> StageCosts:
    ones = (1.0,) * shape.num_stages
    return StageCosts(ones, ones, (weights,) * shape.num_stages)
