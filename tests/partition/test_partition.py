import random
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from long import LONG

from pipecompile.errors import InfeasibleError, PlanError
from pipecompile.ir.cluster import Cluster, Device, Link, Pair
from pipecompile.ir.graph import Cost, CostedGraph, Graph, Node, Parameter, TensorSpec
from pipecompile.ir.plan import Plan
from pipecompile.partition import partition
from pipecompile.partition.from_graph import problem_of
from pipecompile.partition.solver.anneal import _Walk, annealed
from pipecompile.partition.solver.boundary_windows import Side, Window, narrowed
from pipecompile.partition.solver.coarsen import lossless, lossy
from pipecompile.partition.solver.contraction import contract
from pipecompile.partition.solver.cuts import closed_cut
from pipecompile.partition.solver.deadline import NEVER
from pipecompile.partition.solver.enumerate import closed_sets
from pipecompile.partition.solver.interval_dp import best_intervals
from pipecompile.partition.solver.lower_bound import stage_bound
from pipecompile.partition.solver.near_boundaries import near_boundaries
from pipecompile.partition.solver.orders import orders
from pipecompile.partition.solver.problem import Net, Problem, Seat
from pipecompile.partition.solver.score import bottleneck, check, stage_loads
from pipecompile.partition.solver.solver import solve

FREE = Link(bandwidth=1e30)


def random_problem(
    seed: int, most: int = 9, may_idle: bool = False, uneven: bool = False, tight: bool = False
) -> Problem:
    """A problem whose stages send while they compute for every fourth seed."""
    rnd = random.Random(seed)
    count = rnd.randint(4, most)
    arcs = [(i, j) for j in range(count) for i in range(j) if rnd.random() < 0.3]
    readers = [[j for low, j in arcs if low == i] for i in range(count)]
    nets = [Net((i, *users), rnd.choice([0.1, 1.0, 3.0])) for i, users in enumerate(readers) if users]
    stages = rnd.randint(1, min(4, count))
    seconds = tuple(float(rnd.choice([0, 0, 1, 2, 5, 9])) for _ in range(count))
    kept = tuple(float(rnd.randint(0, 5)) for _ in range(count)) if tight else ()
    saved = tuple(float(rnd.randint(0, 2)) for _ in range(count)) if tight else ()
    seats = tuple(
        Seat(
            rnd.choice([1.0, 2.0, 0.5]) if uneven else 1.0,
            (sum(kept) + sum(saved) * 2) / stages * rnd.choice([0.9, 1.2, 1.6]) if tight else float("inf"),
            stages - stage,
            may_idle,
            *(rnd.choice([1.0, 1.0, 1.5, 4.0]) if uneven else 1.0 for _ in ("sends", "receives")),
        )
        for stage in range(stages)
    )
    return Problem(seconds, tuple(arcs), tuple(nets), seats, kept, saved, overlapped=seed % 4 == 3)


def all_plans(problem: Problem):
    for stage_of in product(range(problem.num_stages), repeat=len(problem)):
        if all(stage_of[low] <= stage_of[high] for low, high in problem.arcs):
            try:
                check(problem, stage_of)
            except PlanError:
                continue
            yield stage_of


def chain_graph(seconds: list[float], nbytes: int = 4, edges: list[tuple[int, int]] = (), together=()) -> CostedGraph:
    """Nodes in a row behind one model input, with further edges between them."""
    inputs: list[list[int]] = [[i] for i in range(len(seconds))]
    for low, high in edges:
        inputs[high].append(low + 1)
    spec = TensorSpec((nbytes // 4,), "float32", True)
    nodes = [Node("x", "input", rematerialized=True)]
    nodes += [Node(f"n{i}", "relu", tuple(inputs[i]), (spec,), path=f"layers.{i}") for i in range(len(seconds))]
    costs = [Cost()] + [Cost(forward=s / 3, backward=2 * s / 3) for s in seconds]
    return CostedGraph(Graph(tuple(nodes), (0,), (len(seconds),), together=together), tuple(costs), "made up")


def stages(plan: Plan) -> list[int]:
    return [stage for stage in plan.stage_of if stage is not None]


@pytest.mark.parametrize("seed", range(60))
def test_small_problems_are_solved_as_well_as_by_trying_all_plans(seed):
    problem = random_problem(seed, most=8, may_idle=seed % 2 == 0, uneven=seed % 3 == 0)
    best = min(bottleneck(problem, plan) for plan in all_plans(problem))
    solution = solve(problem)
    check(problem, solution.stage_of)
    assert best * (1 - 1e-9) <= solution.quality.bottleneck <= best * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(30))
def test_a_memory_limit_is_kept_or_said_to_be_too_small(seed):
    problem = random_problem(seed, most=7, tight=True)
    plans = list(all_plans(problem))
    try:
        solution = solve(problem)
    except InfeasibleError:
        assert not plans
    else:
        check(problem, solution.stage_of)
        assert solution.quality.bottleneck <= min(bottleneck(problem, plan) for plan in plans) * (1 + 1e-9)


@settings(max_examples=60 if LONG else 12, deadline=None)
@given(st.integers(0, 10_000))
def test_a_plan_is_valid_repeatable_and_never_worse_than_cutting_one_order(seed):
    problem = random_problem(seed, most=30)
    solution = solve(problem)
    check(problem, solution.stage_of)
    assert solution.stage_of == solve(problem).stage_of
    assert solution.quality.bottleneck >= solution.quality.lower_bound * (1 - 1e-9)
    for order in orders(problem, 10):
        found = best_intervals(problem, order)
        assert found is not None
        assert solution.quality.bottleneck <= found[0] * (1 + 1e-9)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000))
def test_the_interval_programme_finds_the_best_ends_of_an_order(seed):
    problem = random_problem(seed, most=8, uneven=True)
    order = range(len(problem))
    plans = [plan for plan in all_plans(problem) if list(plan) == sorted(plan)]
    found = best_intervals(problem, order)
    assert found is not None
    assert found[0] == pytest.approx(min(bottleneck(problem, plan) for plan in plans))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=4, max_size=30), st.integers(1, 4), st.data())
def test_a_graph_keeps_its_groups_and_uses_every_stage(seconds, num_stages, data):
    indices = st.integers(1, len(seconds))
    group = data.draw(st.lists(indices, min_size=2, max_size=3, unique=True))
    costed = chain_graph([float(s) for s in seconds], together=(tuple(group),))
    groups = len(seconds) - (max(group) - min(group))
    if groups < num_stages:
        with pytest.raises(InfeasibleError, match=f"at most {groups}"):
            partition(costed, num_stages)
        return
    plan = partition(costed, num_stages)
    assert plan.stage_of[0] is None
    assert len({plan.stage_of[i] for i in group}) == 1
    assert sorted(set(stages(plan))) == list(range(num_stages))


def test_a_heavy_embedding_and_head_get_stages_of_their_own():
    costed = chain_graph([40.0] + [4.0] * 10 + [40.0])
    assert stages(partition(costed, 3)) == [0] + [1] * 10 + [2]


def test_one_huge_node_sets_the_pace_and_the_rest_goes_around_it():
    costed = chain_graph([1.0, 1.0, 100.0, 1.0, 1.0])
    assert stages(partition(costed, 3)) == [0, 0, 1, 2, 2]


def test_equal_layers_are_cut_where_the_least_is_sent():
    spec = {0: 4, 1: 4_000, 2: 4_000, 3: 4, 4: 4_000, 5: 4}
    nodes = tuple(
        Node(f"n{i}", "relu", (i - 1,) if i else (), (TensorSpec((nbytes // 4,), "float32"),))
        for i, nbytes in spec.items()
    )
    costed = CostedGraph(Graph(nodes, outputs=(5,)), (Cost(forward=1e-6),) * 6, "made up")
    plan = partition(costed, 2, Cluster.of(["a", "b"], Link(bandwidth=1e9)))
    assert stages(plan) == [0, 0, 0, 0, 1, 1]


def test_two_towers_are_not_cut_across_both_at_once():
    seconds = [1.0] * 8
    nodes = [Node("x", "input", rematerialized=True)]
    for tower in range(2):
        for layer in range(4):
            source = 0 if layer == 0 else 1 + 2 * (layer - 1) + tower
            nodes.append(Node(f"t{tower}_{layer}", "linear", (source,), (TensorSpec((100,), "float32", True),)))
    nodes = [nodes[0], *(nodes[1 + 4 * (i % 2) + i // 2] for i in range(8)), Node("join", "add", (7, 8), ())]
    costed = CostedGraph(Graph(tuple(nodes), (0,), (9,)), tuple(Cost(forward=s) for s in [0, *seconds, 0]), "made up")
    plan = partition(costed, 2, Cluster.of(["a", "b"], Link(bandwidth=1e4)))
    assert sum(len(channel.values) for channel in plan.channels) == 1


def test_long_skips_of_a_unet_cost_their_two_ends_only():
    skips = [(0, 11), (1, 10), (2, 9)]
    costed = chain_graph([1.0] * 12, nbytes=4_000, edges=skips)
    problem = problem_of(costed, 3, Cluster.of(["a", "b", "c"], Link(bandwidth=1e5))).problem
    loads = stage_loads(problem, stages(partition(costed, 3, Cluster.of(["a", "b", "c"], Link(bandwidth=1e5)))))
    assert max(loads) <= max(stage_loads(problem, [0] * 4 + [1] * 4 + [2] * 4))
    assert stage_loads(problem, [0] * 4 + [1] * 4 + [2] * 4)[1] == pytest.approx(4 + 2 * 0.08)


def test_a_value_that_needs_no_gradient_is_sent_one_way_only():
    for requires_grad, trips in ((True, 2), (False, 1)):
        spec = TensorSpec((1000,), "float32", requires_grad)
        graph = Graph((Node("a", "relu", (), (spec,)), Node("b", "relu", (0,), (spec,))), outputs=(1,))
        problem = problem_of(
            CostedGraph(graph, (Cost(), Cost()), "made up"), 2, Cluster.of(["x", "y"], Link(1e3))
        ).problem
        assert problem.nets == (Net((0, 1), 4.0 * trips),)


def test_a_value_read_twice_by_a_stage_is_paid_once():
    problem = Problem((1.0,) * 4, ((0, 1), (0, 2), (0, 3)), (Net((0, 1, 2, 3), 5.0),), (Seat(), Seat()))
    assert stage_loads(problem, (0, 1, 1, 1)) == (6.0, 8.0)


def test_a_faster_device_gets_more_of_the_model():
    cluster = Cluster((Device("slow"), Device("fast", speed=3.0)), FREE)
    assert stages(partition(chain_graph([1.0] * 8), 2, cluster)) == [0, 0] + [1] * 6


def test_stages_go_round_the_ranks_when_there_are_more_of_them():
    assert partition(chain_graph([1.0] * 8), 4, Cluster.of(["a", "b"])).rank_of == (0, 1, 0, 1)


def test_saved_activations_count_once_for_each_microbatch_in_flight():
    nodes = tuple(Node(f"n{i}", "relu", (i - 1,) if i else (), (TensorSpec((1,), "float32"),)) for i in range(6))
    costed = CostedGraph(Graph(nodes, outputs=(5,)), (Cost(forward=1.0, saved_bytes=10),) * 6, "made up")
    cluster = Cluster((Device("a", memory=40), Device("b", memory=40)), FREE)
    assert stages(partition(costed, 2, cluster)) == [0, 0, 1, 1, 1, 1]


def test_no_communication_is_seen_inside_a_cycle_of_groups():
    contraction = contract(
        [1.0] * 4, [(0, 1), (1, 2), (2, 3)], [((0, 1), 1.0), ((2, 3), 1.0)], [Seat()], together=[(0, 2)]
    )
    assert contraction.atom_of == (0, 0, 0, 1)
    assert contraction.problem.nets == (Net((0, 1), 1.0),)


def test_more_stages_than_nodes_are_refused_with_the_number_that_is_possible():
    with pytest.raises(InfeasibleError, match=r"cannot be cut into 5 stages.* at most 3.* use 3 stages"):
        partition(chain_graph([1.0, 2.0, 3.0]), 5)


def test_a_model_without_nodes_cannot_be_cut():
    empty = CostedGraph(Graph((Node("x", "input", rematerialized=True),), (0,)), (Cost(),), "made up")
    with pytest.raises(InfeasibleError):
        partition(empty, 1)


@pytest.mark.parametrize("num_stages", [0, -1])
def test_fewer_than_one_stage_is_a_wrong_argument(num_stages):
    with pytest.raises(ValueError, match="num_stages must be at least 1"):
        partition(chain_graph([1.0]), num_stages)


def test_weights_beyond_all_memory_are_refused_with_both_numbers():
    nodes = (Node("a", "linear", parameters=("v",)), Node("b", "linear", (0,), parameters=("w",)))
    weights = tuple(Parameter(name, TensorSpec((250,), "float32", requires_grad=True)) for name in "vw")
    costed = CostedGraph(Graph(nodes, parameters=weights), (Cost(forward=1.0),) * 2, "made up")
    with pytest.raises(InfeasibleError, match=r"8,000 bytes.* 6,000"):
        partition(costed, 2, Cluster((Device("a", memory=3_000),) * 2))


def test_where_nothing_takes_time_a_search_that_gave_up_is_no_proof():
    problem = Problem((0.0,) * 3, ((0, 1), (0, 2)), (), (Seat(memory=6.0),) * 2, (4.0, 1.0, 2.0))
    solution = solve(problem)
    check(problem, solution.stage_of)


def test_nodes_that_cost_nothing_can_still_be_cut():
    assert sorted(set(stages(partition(chain_graph([0.0] * 5), 3)))) == [0, 1, 2]


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"seats": ()}, "seat"),
        ({"arcs": ((1, 0),)}, "go up"),
        ({"nets": (Net((1,), 1.0),)}, "two or more"),
        ({"nets": (Net((0, 7), 1.0),)}, "outside"),
        ({"seconds": (1.0, -1.0)}, "seconds must have a number >= 0"),
    ],
)
def test_a_problem_that_is_none_is_refused(change, what):
    good = {"seconds": (1.0, 1.0), "arcs": ((0, 1),), "nets": (), "seats": (Seat(),)}
    Problem(**good)
    with pytest.raises(ValueError, match=what):
        Problem(**(good | change))


@pytest.mark.parametrize(
    ("stage_of", "what"),
    [
        ((0, 0), "needs a stage"),
        ((0, 1, 0), "a value flows from"),
        ((0, 0, 0), "must not be empty"),
        ((0, 0, 1), "bytes"),
    ],
)
def test_the_evaluator_refuses_what_is_no_plan(stage_of, what):
    problem = Problem((1.0,) * 3, ((1, 2),), (), (Seat(memory=1.0), Seat(memory=9.0)), kept_bytes=(1.0, 1.0, 1.0))
    with pytest.raises(PlanError, match=what):
        check(problem, stage_of)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 100_000), st.booleans(), st.booleans(), st.booleans())
def test_a_lower_bound_is_below_the_best_plan_and_proven_means_equal(seed, may_idle, uneven, tight):
    problem = random_problem(seed, 7, may_idle, uneven, tight)
    best = min((bottleneck(problem, plan) for plan in all_plans(problem)), default=None)
    try:
        solution = solve(problem)
    except InfeasibleError:
        assert best is None
        return
    assert solution.quality.lower_bound <= best * (1 + 1e-9)
    assert not solution.quality.proven or solution.quality.bottleneck == pytest.approx(best)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 100_000), st.booleans())
def test_narrowed_windows_keep_every_plan_within_the_limit(seed, may_idle):
    problem = random_problem(seed, 7, may_idle)
    plans = list(all_plans(problem))
    limit = sorted(bottleneck(problem, plan) for plan in plans)[len(plans) // 4]
    found = narrowed(problem, limit)
    assert found is not None
    sets = [closed_sets(problem, window, 10_000) for window in found]
    for plan in plans:
        if bottleneck(problem, plan) <= limit:
            for index, family in enumerate(sets):
                assert family is not None
                assert ([stage <= index for stage in plan] == family.members).all(axis=1).any()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 100_000), st.data())
def test_a_closed_cut_is_the_cheapest_and_its_slack_bounds_all_others(seed, data):
    problem = random_problem(seed, 8)
    anything = Side.of(problem.seats, 1e9)
    sets = closed_sets(problem, Window.within(problem, anything, anything), 10_000)
    assert sets is not None
    low, high = sorted(data.draw(st.tuples(st.integers(0, len(sets) - 1), st.integers(0, len(sets) - 1))))
    inside, outside = sets.members[low] & sets.members[high], ~(sets.members[low] | sets.members[high])
    cut = closed_cut(problem, inside, outside)
    between = [
        row
        for row in range(len(sets))
        if (sets.members[row] >= inside).all() and not (sets.members[row] & outside).any()
    ]
    assert cut.seconds == pytest.approx(min(sets.open_seconds[row] for row in between))
    assert any((cut.members == sets.members[row]).all() for row in between)
    for row in between:
        assert sets.open_seconds[row] >= cut.seconds + cut.slack[sets.is_open[row]].sum() - 1e-9


@pytest.mark.parametrize("seed", range(20))
def test_a_heavy_atom_bounds_every_plan(seed):
    problem = random_problem(seed, 7)
    assert stage_bound(problem) <= min(bottleneck(problem, plan) for plan in all_plans(problem)) * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(40))
def test_lossless_coarsening_keeps_the_best_load(seed):
    problem = random_problem(seed, 8, may_idle=True, uneven=seed % 2 == 0)
    coarse = lossless(problem)
    best = min(bottleneck(coarse.problem, plan) for plan in all_plans(coarse.problem))
    assert best == pytest.approx(min(bottleneck(problem, plan) for plan in all_plans(problem)))
    for plan in all_plans(coarse.problem):
        check(problem, coarse.expand(plan))


def random_plan(problem: Problem, rnd: random.Random) -> tuple[int, ...]:
    stage_of: list[int] = []
    for sources in problem.predecessors:
        low = max((stage_of[source] for source in sources), default=0)
        stage_of.append(rnd.randint(low, problem.num_stages - 1))
    return tuple(stage_of)


@pytest.mark.parametrize("seed", range(20))
def test_walkers_end_in_plans_no_worse_than_their_starts(seed):
    problem = random_problem(seed, 20, may_idle=seed % 2 == 0, uneven=True, tight=seed % 3 == 0)
    rnd = random.Random(seed)
    drawn = (random_plan(problem, rnd) for _ in range(3000))
    starts = [plan for plan in drawn if is_plan(problem, plan)][:10]
    if not starts:
        return
    ends = annealed(problem, starts, 300, seed, NEVER)
    assert len(ends) == len(starts)
    for start, end in zip(starts, ends, strict=True):
        check(problem, end)
        assert bottleneck(problem, end) <= bottleneck(problem, start) * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(20))
def test_walkers_know_the_loads_of_their_plans_whatever_moves(seed):
    problem = random_problem(seed, 12, may_idle=True, uneven=True)
    rnd = random.Random(seed)
    walk = _Walk(problem, np.array([random_plan(problem, rnd) for _ in range(6)]).T)
    moved = 0
    for _ in range(200):
        before = walk.stage_of.copy()
        draw = np.array([rnd.random() for _ in range(6)])
        walk.step(rnd.randrange(len(problem)), draw, np.full(6, -np.inf))  # any move is made
        moved += int((walk.stage_of != before).sum())
    assert moved > 100 or problem.num_stages == 1
    for plan, loads in zip(walk.stage_of.T.tolist(), problem.load(walk.work, walk.sent).T, strict=True):
        assert loads == pytest.approx(stage_loads(problem, plan))


def test_a_factor_below_one_and_a_net_without_its_producers_arcs_are_refused():
    with pytest.raises(ValueError, match="factors of links must be at least 1"):
        Problem((1.0, 1.0), ((0, 1),), (), (Seat(sends=0.5),))
    with pytest.raises(ValueError, match="must have an arc from its first end"):
        Problem((1.0,) * 3, ((0, 1),), (Net((0, 1, 2), 1.0),), (Seat(sends=2.0), Seat()))
    Problem((1.0,) * 3, ((0, 1),), (Net((0, 1, 2), 1.0),), (Seat(), Seat()))


def test_the_maker_pays_its_link_and_each_reader_its_own():
    seats = (Seat(sends=2.0), Seat(sends=3.0, receives=5.0), Seat(receives=7.0))
    problem = Problem((0.0,) * 4, ((0, 1), (0, 2), (0, 3)), (Net((0, 1, 2, 3), 1.0),), seats)
    assert stage_loads(problem, (0, 1, 1, 2)) == (2.0, 5.0, 7.0)
    assert stage_loads(problem, (1, 1, 1, 2)) == (0.0, 3.0, 7.0)
    assert stage_loads(problem, (0, 0, 0, 0)) == (0.0, 0.0, 0.0)


def test_the_heavy_cut_is_not_where_the_slow_link_is():
    costed = chain_graph([1.0] * 6, nbytes=400)
    nodes = [
        replace(n, outputs=(TensorSpec((1,), "float32", True),)) if n.name == "n2" else n for n in costed.graph.nodes
    ]
    costed = replace(costed, graph=replace(costed.graph, nodes=tuple(nodes)))  # only the third value is small
    slow = Pair(1, 2, Link(400.0))
    cluster = Cluster.of(["a", "b", "c"], Link(4e6))
    assert stages(partition(costed, 3, cluster)) == [0, 0, 1, 1, 2, 2]
    moved = stages(partition(costed, 3, replace(cluster, pairs=(slow,))))
    assert moved.index(2) == 3  # what crosses the slow link is what is small


def is_plan(problem: Problem, stage_of: tuple[int, ...]) -> bool:
    try:
        check(problem, stage_of)
    except PlanError:
        return False
    return True


def test_walks_find_the_best_of_all_plans_of_small_problems():
    found = 0
    seeds = 30 if LONG else 15
    for seed in range(seeds):
        problem = random_problem(seed, 8, uneven=True)
        plans = list(all_plans(problem))
        (worst,) = sorted(plans, key=lambda plan: bottleneck(problem, plan))[-1:]
        ends = annealed(problem, [worst] * 16, 1_000, seed, NEVER)
        best = min(bottleneck(problem, plan) for plan in plans)
        found += min(bottleneck(problem, end) for end in ends) <= best * (1 + 1e-9)
    assert found >= 0.8 * seeds


def long_problem(count: int = 6_000) -> Problem:
    """A row with detours, too long for tables that grow with the square."""
    rnd = random.Random(1)
    arcs = sorted({(i, j) for i in range(count - 1) for j in (i + 1, min(count - 1, i + rnd.randint(1, 9)))})
    nets = tuple(Net((low, high), rnd.choice([0.1, 1.0, 9.0])) for low, high in arcs)
    return Problem(tuple(rnd.uniform(0.1, 3.0) for _ in range(count)), tuple(arcs), nets, (Seat(),) * 4)


def test_a_long_problem_is_coarsened_to_what_was_asked_for_and_keeps_its_order():
    problem = long_problem()
    coarse = lossy(problem, 100)
    assert 100 < len(coarse.problem) <= 251
    assert sum(coarse.problem.seconds) == pytest.approx(sum(problem.seconds))
    check(problem, coarse.expand([4 * atom // len(coarse.problem) for atom in range(len(coarse.problem))]))


def test_near_its_boundaries_a_long_plan_is_a_plan_of_a_small_problem():
    problem = long_problem()
    stage_of = [4 * atom // len(problem) for atom in range(len(problem))]
    near = near_boundaries(problem, stage_of, 200)
    assert len(near.problem) <= 204
    small = dict(zip(near.atom_of, stage_of, strict=True))
    plan = [small[atom] for atom in range(len(near.problem))]
    assert list(near.expand(plan)) == stage_of
    assert stage_loads(near.problem, plan) == pytest.approx(stage_loads(problem, stage_of))
    assert len({near.atom_of[atom] for atom in range(1_480, 1_500)}) == 20


def test_a_long_problem_has_a_plan_near_the_bound():
    quality = solve(long_problem()).quality
    assert quality.gap < 0.01
