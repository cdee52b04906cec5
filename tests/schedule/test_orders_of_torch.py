"""The orders equal those of the installed torch's own generators, rank by rank."""

from itertools import product
from types import SimpleNamespace

import pytest
from torch.distributed.pipelining import schedules as torch_schedules

from pipecompile.schedule.catalog import RECIPES
from pipecompile.schedule.grid import read_torch_csv, write_torch_csv
from pipecompile.schedule.order import B, Op, W
from pipecompile.schedule.policy import breadth_first, interleaved, interleaved_zb, merge
from pipecompile.schedule.shape import looped

RANKS, MICROBATCHES = (1, 2, 3, 4, 6, 8), (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32)


def computations(actions):
    """The words of a rank, overlapped pairs one after the other."""
    flat = []
    for action in actions:
        if action is not None:
            flat += action.sub_actions or (action,)
    return [str(action) for action in flat if action.is_compute_op]


def words(order, rank):
    present = {order.op(code) for row in order.rows for code in row}
    return [
        f"{op.stage}I{op.microbatch}" if op.kind == B and Op(W, op.stage, op.microbatch) in present else str(op)
        for op in order.ops(rank)
    ]


def single(kind, p, n):
    listed = kind._get_pipeline_order(SimpleNamespace(_num_stages=p, _n_microbatches=n))
    return [computations(listed[rank]) for rank in range(p)]


def several(kind, p, n, v):
    rounds = max(1, n // p)
    schedule = SimpleNamespace(
        _stages=[None] * v,
        n_local_stages=v,
        num_stages=v * p,
        pp_group_size=p,
        _n_microbatches=n,
        microbatches_per_round=n // rounds,
    )
    return [computations(kind._calculate_single_rank_operations(schedule, rank)) for rank in range(p)]


@pytest.mark.parametrize("p", RANKS)
def test_gpipe_and_1f1b_equal_torch_but_for_the_last_rank_that_torch_lists_wrongly(p):
    for n in MICROBATCHES:
        gpipe = RECIPES["gpipe"].order(p, n)
        assert [words(gpipe, rank) for rank in range(p)] == single(torch_schedules.ScheduleGPipe, p, n)
        if n >= p:  # below, torch lists Forwards that do not exist on other ranks too
            one, listed = RECIPES["1f1b"].order(p, n), single(torch_schedules.Schedule1F1B, p, n)
            assert [words(one, rank) for rank in range(p - 1)] == listed[:-1]
            assert f"{p - 1}F{n}" in listed[-1]


@pytest.mark.parametrize(("p", "v"), [*product((2, 3, 4, 8), (1, 2, 3, 4)), (1, 2), (6, 2)])
def test_schedules_with_several_chunks_equal_torch(p, v):
    shape = looped(p, v)
    compared = 0
    for n in MICROBATCHES:
        bfs = merge(breadth_first(shape, n), shape, n)
        assert [words(bfs, rank) for rank in range(p)] == several(torch_schedules.ScheduleLoopedBFS, p, n, v)
        if n % max(1, n // p):
            continue  # torch refuses
        for policy, kind in (
            (interleaved, torch_schedules.ScheduleInterleaved1F1B),
            (interleaved_zb, torch_schedules.ScheduleInterleavedZeroBubble),
        ):
            order = merge(policy(shape, n), shape, n)
            assert [words(order, rank) for rank in range(p)] == several(kind, p, n, v), (kind, n)
            compared += 1
    assert compared >= 10


@pytest.mark.parametrize("p", RANKS)
def test_v_shapes_equal_torch(p):
    for n in MICROBATCHES:
        zb_v, dualpipe_v = RECIPES["zb-v"].order(p, n), RECIPES["dualpipe-v"].order(p, n)
        expected = several(torch_schedules.ScheduleZBVZeroBubble, p, n, 2)
        assert [words(zb_v, rank) for rank in range(p)] == expected
        if n >= 2 * p:  # torch refuses fewer
            expected = several(torch_schedules.ScheduleDualPipeV, p, n, 2)
            assert [words(dualpipe_v, rank) for rank in range(p)] == expected


@pytest.mark.parametrize("name", RECIPES)
def test_torch_reads_what_is_written_and_what_torch_writes_is_read(name, tmp_path):
    order = RECIPES[name].order(4, 9)
    path = tmp_path / "order.csv"
    path.write_text(write_torch_csv(order))
    reader = SimpleNamespace(pipeline_order={}, _validate_and_set_stage_mapping=lambda actions: None)
    torch_schedules.PipelineScheduleMulti._load_csv(reader, path)
    assert [computations(reader.pipeline_order[rank]) for rank in range(4)] == [words(order, r) for r in range(4)]
    torch_schedules.PipelineScheduleMulti._dump_csv(reader, path)
    assert read_torch_csv(path.read_text(), order.shape) == order


def test_a_listing_of_torch_with_an_overlap_and_other_work_is_read():
    listed = several(torch_schedules.ScheduleDualPipeV, 3, 8, 2)
    actions = torch_schedules.ScheduleDualPipeV._calculate_single_rank_operations(
        SimpleNamespace(_n_microbatches=8, pp_group_size=3), 0
    )
    assert any("OVERLAP_F_B" in str(action) for action in actions)
    lines = []
    for rank in range(3):
        schedule = SimpleNamespace(_n_microbatches=8, pp_group_size=3)
        row = torch_schedules.ScheduleDualPipeV._calculate_single_rank_operations(schedule, rank)
        lines.append(",".join([f"{rank}UNSHARD", "", *map(str, row), f"{rank}SEND_F0", f"{rank}REDUCE_GRAD"]))
    order = read_torch_csv("\n".join(lines))
    assert [words(order, rank) for rank in range(3)] == listed


def test_torchs_listing_of_1f1b_is_read_as_it_runs_with_a_warning():
    listed = single(torch_schedules.Schedule1F1B, 3, 5)
    with pytest.warns(UserWarning, match="rank 2 lists F1 to F5"):
        order = read_torch_csv("\n".join(map(",".join, listed)))
    assert order == RECIPES["1f1b"].order(3, 5)
