"""Orders of a few microbatches, extended to many: valid, in the same memory, and as long as their periods say."""

from __future__ import annotations

from random import Random

import pytest
from long import LONG

from pipecompile.schedule import catalog
from pipecompile.schedule.catalog import FILLED, RECIPES, SHORT, searched
from pipecompile.schedule.extend import extended, shorter
from pipecompile.schedule.improve import improve
from pipecompile.schedule.job import job_of
from pipecompile.schedule.order import Order
from pipecompile.schedule.placements import Placements
from pipecompile.schedule.replay import peaks, replay
from pipecompile.schedule.shape import Shape, chain, looped, v_shape
from pipecompile.schedule.stage_costs import StageCosts, busy

SHAPES = (chain(3), chain(4), v_shape(2), v_shape(4), looped(2, 3))


def drawn(seed: int, shape: Shape) -> StageCosts:
    draw = Random(seed)
    times = [tuple(draw.choice([1.0, 2.0, draw.random()]) for _ in range(shape.num_stages)) for _ in range(3)]
    part = draw.choice([0.0, 0.5])
    return StageCosts(
        f=times[0],
        b=times[1],
        w=times[2],
        transfer=tuple(draw.choice([0.0, 0.2]) for _ in shape.edges),
        mem_f=(1.0,) * shape.num_stages,
        mem_b=(-part,) * shape.num_stages,
        mem_w=(part - 1,) * shape.num_stages,
    )


def rows_of(order: Order, costs: StageCosts, n: int) -> list[Order]:
    found = extended(order, replay(order, costs).start, n)
    return [Order(order.shape, n, tuple(map(tuple, rows))) for rows in found]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_extended_orders_are_valid_in_the_same_memory(shape: Shape, seed: int) -> None:
    costs = drawn(seed, shape)
    few = 4 * shape.num_ranks
    order = searched(shape, few, costs, shape.num_stages, passes=40)
    assert order is not None
    found = rows_of(order, costs, few + 24)
    for it in found:
        it.validate()
        assert peaks(it, costs) == pytest.approx(peaks(order, costs))
        numbers = [it.op(code) for row in it.rows for code in row]
        for kind in {(op.kind, op.stage) for op in numbers}:
            mine = [op.microbatch for op in numbers if (op.kind, op.stage) == kind]
            assert mine == list(range(few + 24))


@pytest.mark.parametrize("name", ["1f1b", "zb-h1", "zb-h2", "zb-v", "v-half", "v-min"])
def test_published_orders_extend_to_those_of_more_microbatches(name: str) -> None:
    recipe, ranks = RECIPES[name], 4
    shape = recipe.shape(ranks)
    costs = StageCosts.uniform(shape, 2.0, 2.0, 2.0)
    if name == "1f1b":  # whole backwards
        costs = StageCosts.uniform(shape, 2.0, 4.0, 0.0)
        order = searched(shape, 12, costs, 4.0, passes=40)
        assert order is not None
    else:
        order = recipe.order(ranks, 12)
    idle = replay(order, costs).span - max(busy(shape, costs, 12))
    found = rows_of(order, costs, 36)
    assert found
    spans = [replay(it, costs).span - max(busy(shape, costs, 36)) for it in found]
    assert min(spans) == pytest.approx(idle)


def test_a_window_that_is_no_period_may_wait_forever_and_is_not_taken() -> None:
    shape = chain(2)
    costs = StageCosts.uniform(shape, 1.0, 1.0, 1.0)
    rows = ["0F0 0F1 0F2 0B0 0W0 0B1 0W1 0F3 0B2 0W2 0B3 0W3", "1F0 1B0 1W0 1F1 1B1 1W1 1F2 1B2 1W2 1F3 1B3 1W3"]
    order = Order(shape, 4, tuple(tuple(map(_code, row.split())) for row in rows))
    order.validate()
    found = rows_of(order, costs, 16)
    assert found
    for it in found:
        it.validate()
        assert peaks(it, costs) == peaks(order, costs)
    placements = Placements(job_of(shape, 16, costs, (4.0, 4.0)), [it.rows for it in found])
    assert improve(placements, whole=[it.rows for it in found])


def _code(text: str) -> int:
    return ("FBW".index(text[1]) * 2 + int(text[0])) * 4 + int(text[2:])


@pytest.mark.parametrize(("n", "least"), [(128, 48), (64, 24), (49, 48), (48, 48), (10, 48), (60, 48)])
def test_a_shorter_order_leads_to_the_number_by_every_step(n: int, least: int) -> None:
    few = shorter(n, least)
    if few is None:
        assert n < least + 12
    else:
        assert least <= few < n
        assert (n - few) % 12 == 0


@pytest.mark.parametrize("seed", range(3))
def test_a_search_for_many_microbatches_is_no_worse_than_what_extends_one_for_few(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalog, "LONG", 500)
    shape, n, passes, cap = v_shape(3), 33, 60, 3.0
    draw = Random(seed)
    costs = StageCosts.uniform(shape, *(draw.uniform(1.0, 2.0) for _ in range(3)), 0.1, (1.0, -0.4, -0.6))
    few = shorter(n, FILLED * 3)
    assert few == 9
    short = searched(shape, few, costs, cap, SHORT * passes * n / few)
    assert short is not None
    long = searched(shape, n, costs, cap, passes)
    assert long is not None
    spans = [replay(it, costs).span for it in rows_of(short, costs, n)]
    assert spans
    assert min(spans) >= replay(long, costs).span - 1e-9
    assert replay(long, costs).peak <= cap + 1e-6


@pytest.mark.skipif(not LONG, reason="LONG=1 runs it")
def test_a_v_at_one_and_a_half_of_the_memory_is_no_worse_than_published() -> None:
    shape, cap = v_shape(16), 1.5 * 16 * 303104
    costs = StageCosts.uniform(shape, 28632, 28612, 19278, 1619, (303104, -172032, -131072), queued=0.0)
    order = searched(shape, 128, costs, cap, 1171)
    assert order is not None
    assert replay(order, costs).span_rate < 0.0025
    assert replay(order, costs).peak <= cap
