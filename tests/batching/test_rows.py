"""How a batch is divided into microbatches, and one of several parts likewise."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipecompile.batching import Rows

SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=4)


@given(SIZES, st.integers(1, 9))
def test_each_part_is_divided_by_itself(sizes: list[int], microbatches: int) -> None:
    rows = Rows.of_parts(sizes, microbatches)
    assert rows.by_part.counts == tuple(sizes)
    for part, size in enumerate(sizes):
        assert rows.counts[rows.microbatches_of(part)] == Rows.of(size, microbatches).counts
    assert sum(rows.weights) == pytest.approx(1)


@given(SIZES, st.integers(1, 9))
def test_equal_rows_are_as_many_as_each_part_allows(sizes: list[int], microbatches: int) -> None:
    rows = Rows.of_parts(sizes, microbatches)
    equal = rows.equal()
    (size,) = set(equal.counts)
    assert equal.by_part.counts == tuple(sizes)
    fitting = [s for s in range(1, max(sizes) + 1) if all(n % s == 0 for n in sizes)]
    allowed = [s for s in fitting if all(n // s <= min(n, microbatches) for n in sizes)]
    assert size == min(allowed, default=max(fitting))


@given(st.integers(1, 60), st.integers(1, 9))
def test_one_part_is_a_batch(batch: int, microbatches: int) -> None:
    rows = Rows.of(batch, microbatches)
    assert rows.by_part.counts == (batch,)
    assert rows.equal().counts == Rows.of_parts([batch], microbatches).equal().counts
    assert batch % len(rows.equal()) == 0
