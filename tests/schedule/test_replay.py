import random

import pytest

from pipecompile.errors import DeadlockError, InputError, ProgramError
from pipecompile.ir.plan import Plan
from pipecompile.schedule.catalog import RECIPES
from pipecompile.schedule.job import job_of
from pipecompile.schedule.list_schedule import list_schedule
from pipecompile.schedule.order import B, F, Op, Order, W
from pipecompile.schedule.policy import merge, one_f_one_b, zb_h1, zb_h2
from pipecompile.schedule.replay import replay
from pipecompile.schedule.shape import Shape, chain, looped, shape_of, v_shape
from pipecompile.schedule.stage_costs import StageCosts, no_cap

BRANCHES = Shape(tuple(range(8)), ((0, 1), (1, 2), (2, 3), (0, 4), (4, 5), (5, 6), (3, 7), (6, 7)))
UNET = Shape(tuple(range(8)), (*((s, s + 1) for s in range(7)), *((s, 7 - s) for s in range(3))))


def ones(shape, transfer=0.0):
    return StageCosts(*[(1.0,) * shape.num_stages] * 3, (transfer,) * len(shape.edges))


def tick_by_tick(order, costs):
    """Start of each computation and arrival of each transfer, found by running a clock; all times are integers."""
    shape, arrived = order.shape, {}
    queues = [list(order.ops(rank)) for rank in range(shape.num_ranks)]
    outgoing = [[] for _ in queues]
    running, sending, starts = [None] * len(queues), [None] * len(queues), {}
    weights = {op for queue in queues for op in queue if op.kind == W}

    def ready(op):
        if op.kind == W:
            return True
        sources = [s for s, t in shape.edges if t == op.stage] if op.kind == F else []
        sources += [t for s, t in shape.edges if s == op.stage] if op.kind == B else []
        return all((op.kind, source, op.microbatch, op.stage) in arrived for source in sources)

    now = 0
    while any(queues) or any(running):
        changed = True
        while changed:
            changed = False
            for rank, queue in enumerate(queues):
                if running[rank] and running[rank][1] == now:
                    op = running[rank][0]
                    running[rank], changed = None, True
                    readers = [t for s, t in shape.edges if s == op.stage and op.kind == F]
                    readers += [s for s, t in shape.edges if t == op.stage and op.kind == B]
                    for index, edge in enumerate(shape.edges):
                        for reader in readers:
                            if set(edge) == {op.stage, reader}:
                                if shape.rank_of[reader] == rank:
                                    arrived[op.kind, op.stage, op.microbatch, reader] = now
                                else:
                                    outgoing[rank].append((op, reader, costs.transfer[index]))
                if sending[rank] and sending[rank][1] == now:
                    op, reader = sending[rank][0]
                    arrived[op.kind, op.stage, op.microbatch, reader] = now
                    sending[rank], changed = None, True
                if not sending[rank] and outgoing[rank]:
                    op, reader, seconds = outgoing[rank].pop(0)
                    sending[rank], changed = ((op, reader), now + seconds), True
                if not running[rank] and queue and ready(queue[0]):
                    op = queue.pop(0)
                    seconds = (costs.f, costs.b, costs.w)[op.kind][op.stage]
                    if op.kind == B and Op(W, *op[1:]) not in weights:
                        seconds += costs.w[op.stage]
                    starts[op] = now
                    running[rank], changed = (op, now + seconds), True
        now += 1
        assert now < 10_000
    return starts


@pytest.mark.parametrize("seed", range(12))
def test_times_are_those_of_a_clock(seed):
    draw = random.Random(seed)
    shape = draw.choice([chain(3), BRANCHES, UNET, looped(3, 2), v_shape(3)])
    times = [tuple(draw.randint(1, 5) for _ in range(shape.num_stages)) for _ in range(3)]
    costs = StageCosts(*times, tuple(draw.randint(0, 6) for _ in shape.edges))
    n = draw.randint(1, 5)
    job = job_of(shape, n, costs, no_cap(shape))
    bare = list_schedule(job, [draw.randint(1, 4) for _ in range(shape.num_stages)])
    rows = []
    for row in bare:
        ops = [Order(shape, n, ()).op(code) for code in row]
        for op in [op for op in ops if op.kind == B and draw.random() < 0.7]:
            ops.insert(draw.randint(ops.index(op) + 1, len(ops)), Op(W, *op[1:]))
        rows.append(ops)
    order = Order.of(shape, n, rows)
    run, expected = replay(order, costs), tick_by_tick(order, costs)
    assert {order.op(code): run.start[code] for row in order.rows for code in row} == expected
    assert run.makespan == max(run.end) - min(start for start in run.start if start >= 0)


def test_span_and_makespan_are_two_metrics():
    run = replay(RECIPES["zb-v"].order(4, 8), ones(v_shape(4)))
    assert (run.span, run.makespan) == (48, 51)
    assert (run.span_rate, run.makespan_rate) == (0, 3 / 51)


def test_a_stage_graph_has_the_bubble_of_its_depth_and_a_line_that_of_its_length():
    for policy, metric, bubble, peak in (
        (one_f_one_b, "makespan", 12, (5, 4, 3, 2, 4, 3, 2, 1)),
        (zb_h1, "makespan", 4, (5,) * 8),
        (zb_h2, "span", 0, (9,) * 8),
    ):
        run = replay(merge(policy(BRANCHES, 16), BRANCHES, 16), ones(BRANCHES))
        assert getattr(run, metric) - 48 == bubble
        assert run.peaks == peak
    line = replay(merge(one_f_one_b(chain(8), 16), chain(8), 16), ones(chain(8)))
    skips = replay(merge(one_f_one_b(UNET, 16), UNET, 16), ones(UNET))
    assert line.makespan - 48 == skips.makespan - 48 == 21


def test_a_rank_sends_one_result_at_a_time():
    fan = Shape((0, 1, 2), ((0, 1), (0, 2)))
    order = Order.of(fan, 1, [[Op(k, s, 0) for k in (F, B)] for s in range(3)])
    run = replay(order, ones(fan, transfer=4.0))
    assert [run.start[stage] for stage in range(3)] == [0, 5, 9]
    late = replay(order, StageCosts.uniform(fan, 1, 1, 1, 4.0, queued=0.0))
    half = replay(order, StageCosts.uniform(fan, 1, 1, 1, 4.0, queued=0.5))
    assert [late.start[2], half.start[2]] == [5, 7]


def test_a_deadlock_says_what_each_rank_waits_for():
    rows = [[Op(F, 0, 0), Op(B, 0, 0), Op(F, 0, 1), Op(B, 0, 1)], [Op(F, 1, 0), Op(F, 1, 1), Op(B, 1, 1), Op(B, 1, 0)]]
    order = Order.of(chain(2), 2, rows)
    with pytest.raises(DeadlockError, match=r"(?s)rank 0 waits at 0B0 for 1B0.*rank 1 waits at 1F1 for 0F1"):
        replay(order, ones(chain(2)))


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([[Op(F, 0, 0)], [Op(F, 1, 0), Op(B, 1, 0)]], "0B0 is missing"),
        ([[Op(B, 0, 0), Op(F, 0, 0)], [Op(F, 1, 0), Op(B, 1, 0)]], "0B0 is before 0F0"),
        ([[Op(F, 0, 0), Op(W, 0, 0), Op(B, 0, 0)], [Op(F, 1, 0), Op(B, 1, 0)]], "0W0 is before 0B0"),
        ([[Op(F, 0, 0), Op(F, 0, 0)], []], "0F0 occurs twice"),
        ([[Op(F, 1, 0)], []], "1F0 is on rank 0, but stage 1 is on 1"),
        ([[Op(F, 2, 0)], []], "2F0 does not exist"),
        ([[Op(F, 0, 1)], []], "0F1 does not exist"),
        ([[]], "1 rows, but the shape has 2 ranks"),
    ],
)
def test_an_order_that_is_not_one_is_refused_with_its_computation(rows, words):
    with pytest.raises(ProgramError, match=words):
        Order.of(chain(2), 1, rows)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: chain(0), "at least one rank"),
        (lambda: Shape((0, 2), ()), "each rank from 0 needs a stage"),
        (lambda: Shape((0, 1), ((1, 0),)), "must lead to a later"),
        (lambda: Shape((0, 1), ((0, 1), (0, 1))), "must not occur twice"),
        (lambda: StageCosts((1.0,), (-1.0,), (1.0,)), "b=-1.0 is not a time"),
        (lambda: StageCosts((1.0,), (1.0,), (float("nan"),)), "w=nan is not a time"),
        (lambda: StageCosts((1.0,), (1.0,), (1.0, 1.0)), "one entry per stage"),
        (lambda: StageCosts((1.0,), (1.0,), (1.0,), (), (1.0,), (0.0,), (0.0,)), "does not return to what it was"),
        (lambda: StageCosts((1.0,), (1.0,), (1.0,), (), (1.0,), (-2.0,), (1.0,)), "F must not free, and W not add"),
        (lambda: StageCosts.uniform(chain(2), 1, 1, 1, queued=2.0), "queued=2.0 must be a part"),
        (lambda: RECIPES["1f1b"].order(2, 0), "num_microbatches must be at least 1"),
        (lambda: replay(RECIPES["1f1b"].order(2, 1), ones(chain(3))), "costs of 3 stages for 2"),
        (lambda: shape_of(Plan.chain(2, replicas=(2, 1))), "replicas run only"),
    ],
)
def test_bad_input_is_refused(make, words):
    with pytest.raises(InputError, match=words):
        make()


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("p", [1, 2, 5])
def test_every_schedule_runs_with_any_number_of_microbatches(name, p):
    recipe = RECIPES[name]
    for n in (1, 2, 3, 7, 11):
        order = recipe.order(p, n)
        assert replay(order, ones(order.shape)).makespan >= 3 * n * len(order.shape.stages_of[0])
