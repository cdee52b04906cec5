"""Extends an order of a few microbatches to many, by repeating a part of its steady state.

In a steady state, each rank runs as many computations of each kind and stage in a while as in the next. A *window* is a
part of each row, at about the same time on all ranks, with ``step`` computations of each kind and stage. It is repeated
as often as needed, each time with the next microbatches, and what follows has higher numbers:

    rank 0   F0 F1 [B0 F2] B1 F3 B2 B3          ->  F0 F1 [B0 F2] [B1 F3] B2 F4 B3 B4
    rank 1      F0 [B0 F1] B1 F2 B2 F3 B3       ->     F0 [B0 F1] [B1 F2] B2 F3 B3 F4 B4

Memory is that of the order, since a window adds as much as it frees. A search in a short order finds in one place what
it would have to find in each period of a long one; the bubble of both ends is the same, so its rate is smaller.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from pipecompile.schedule.order import Order, Rows

STEPS = (1, 2, 3, 4, 6, 12)  # microbatches of a window
# where a window of each of these is looked for, in microbatches from the middle: near it, then further away
PLACES = sorted(range(-15, 16), key=lambda place: max(2, abs(place)))


def shorter(num_microbatches: int, least: int) -> int | None:
    """A number of microbatches of at least ``least`` from which all windows lead to this one; None: none is smaller."""
    most = max(STEPS)
    found = least + (num_microbatches - least) % most
    return found if found < num_microbatches else None


def extended(order: Order, starts: Sequence[float], num_microbatches: int) -> Iterator[Rows]:
    """The rows of orders of more microbatches, one for each step that has a window; if it is no period, they may wait
    forever, or need more memory.

    Args:
        order: with a W for every B.
        starts: of each code of the order.
        num_microbatches: of the orders to make.
    """
    more = num_microbatches - order.num_microbatches
    begin = min(starts[row[0]] for row in order.rows)
    span = max(starts[row[-1]] for row in order.rows) - begin
    period = span / order.num_microbatches
    for step in STEPS:
        if more % step or 2 * step > order.num_microbatches:
            continue
        for place in PLACES:
            at = begin + span / 2 + (place - step / 2) * period
            windows = [window for row in order.rows if (window := _window(order, row, starts, at, step)) is not None]
            if len(windows) == len(order.rows):
                both = zip(order.rows, windows, strict=True)
                yield [_repeated(order, row, first, last, step, num_microbatches) for row, (first, last) in both]
                break


def _window(order: Order, row: Sequence[int], starts: Sequence[float], at: float, step: int) -> tuple[int, int] | None:
    """The places of a row between which there are ``step`` computations of each kind and stage; None if there are not.

    Args:
        at: seconds at which it begins.
    """
    n = order.num_microbatches
    first = next((place for place, code in enumerate(row) if starts[code] >= at), len(row))
    kinds = len({code // n for code in row})
    last = first + step * kinds
    count = Counter(code // n for code in row[first:last])
    return (first, last) if len(count) == kinds and set(count.values()) == {step} else None


def _repeated(order: Order, row: Sequence[int], first: int, last: int, step: int, n: int) -> list[int]:
    """A row with the part from ``first`` to ``last`` as often as more microbatches need, with ascending numbers."""
    few = order.num_microbatches
    times = 1 + (n - few) // step
    kinds = [code // few for code in (*row[:first], *list(row[first:last]) * times, *row[last:])]
    count: Counter[int] = Counter()
    codes = []
    for kind in kinds:
        codes.append(kind * n + count[kind])
        count[kind] += 1
    return codes
