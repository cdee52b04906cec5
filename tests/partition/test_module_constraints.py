"""What a user asks of a plan is honoured, or refused with the modules that stand against it."""

from random import Random

import pytest

from pipecompile.errors import InfeasibleError, InputError, PlanError
from pipecompile.ir.cluster import Cluster, Device
from pipecompile.ir.graph import Cost, CostedGraph, Graph, Node, TensorSpec
from pipecompile.ir.plan import Plan
from pipecompile.ir.plan_options import PlanOptions
from pipecompile.ir.plan_quality import Quality
from pipecompile.ir.units import seconds_text
from pipecompile.partition import partition
from pipecompile.partition.solver.contraction import contract
from pipecompile.partition.solver.problem import Net, Problem, Seat
from pipecompile.partition.solver.score import check
from pipecompile.partition.solver.solver import solve

SPEC = TensorSpec((1,), "float32", True)


def model(*paths: str, together=(), seconds: float = 1.0) -> CostedGraph:
    """Nodes in a row, one a path, behind an input and a mask that every stage computes for itself."""
    nodes = [Node("x", "input", outputs=(SPEC,), rematerialized=True)]
    nodes.append(Node("mask", "ones", (0,), (SPEC,), path="rotary", rematerialized=True))
    for index, path in enumerate(paths, start=2):
        nodes.append(Node(f"n{index}", "relu", (0 if index == 2 else index - 1, 1), (SPEC,), (), path, f"m.py:{index}"))
    costs = (Cost(), Cost(), *[Cost(forward=seconds)] * len(paths))
    return CostedGraph(Graph(tuple(nodes), (0,), (len(nodes) - 1,), together=together), costs, "made up")


LAYERS = model("embed", *(f"layers.{i}.{part}" for i in range(4) for part in ("attn", "mlp")), "head")


def stages(costed: CostedGraph, num_stages: int, **constraints) -> dict[str, set[int]]:
    """The stages of each path."""
    plan = partition(costed, num_stages, constraints=PlanOptions(**constraints))
    found: dict[str, set[int]] = {}
    for node, stage in zip(costed.graph.nodes, plan.stage_of, strict=True):
        found.setdefault(node.path, set()).update({stage} - {None})
    return found


def test_a_pinned_module_is_where_it_was_asked_to_be_with_all_modules_in_it() -> None:
    assert stages(LAYERS, 2)["layers.1.mlp"] == {0}
    found = stages(LAYERS, 2, pins={"layers.1": 1})
    assert found["layers.1.attn"] == found["layers.1.mlp"] == found["head"] == {1}
    assert found["layers.0.mlp"] == {0}


def test_a_module_that_must_not_be_split_is_in_one_stage_wherever_that_is() -> None:
    assert stages(LAYERS, 5)["layers.1.attn"] != stages(LAYERS, 5)["layers.1.mlp"]
    paths = [f"layers.{i}" for i in range(4)]
    found = stages(LAYERS, 5, no_split=paths)
    for path in paths:
        assert len(found[f"{path}.attn"] | found[f"{path}.mlp"]) == 1


def test_modules_that_are_kept_together_take_what_lies_between_with_them() -> None:
    found = stages(LAYERS, 3, colocate=[("layers.1.mlp", "layers.3.attn")])
    kept = {path for path, where in found.items() if where == found["layers.1.mlp"]}
    assert kept >= {"layers.1.mlp", "layers.2.attn", "layers.2.mlp", "layers.3.attn"}


@pytest.mark.parametrize(("most", "expected"), [(1, 1), (3, 3), (9, 4)])
def test_no_more_stages_than_asked_for(most: int, expected: int) -> None:
    assert partition(LAYERS, 4, constraints=PlanOptions(max_stages=most)).num_stages == expected


def test_fewer_stages_than_allowed_where_more_would_not_be_faster() -> None:
    costed = model("a", "b", "c", seconds=1e-9)  # far less than a message takes
    assert partition(costed, 3).num_stages == 3
    plan = partition(costed, 3, constraints=PlanOptions(max_stages=3))
    assert (plan.num_stages, plan.rank_of) == (1, (0,))
    pinned = partition(costed, 3, constraints=PlanOptions(max_stages=3, pins={"c": 1}))
    assert (pinned.num_stages, pinned.stage_of[-1]) == (2, 1)


def test_a_device_that_is_too_slow_is_left_out_where_fewer_stages_are_allowed() -> None:
    cluster = Cluster((Device("a"), Device("slow", speed=1e-9), Device("c")))
    assert partition(LAYERS, 3, cluster, constraints=PlanOptions(max_stages=3)).rank_of == (0, 2)


@pytest.mark.parametrize(
    ("constraints", "what"),
    [
        ({"pins": {"layers.7": 0}}, r"pins\['layers.7'\].*did you mean .*'layers.\d'"),
        ({"no_split": ["layer.1"]}, r"no_split='layer.1'.*did you mean 'layers.1'"),
        ({"colocate": [("head", "tail")]}, "no module 'tail' computes anything"),
        ({"no_split": ["zzz"]}, "named_modules"),
        ({"pins": {"rotary": 0}}, "'rotary' is only cheap operations"),
        ({"pins": {"head": 2}}, "stages must be between 0 and 1"),
        ({"pins": {"head": 1}, "max_stages": 1}, "stages must be between 0 and 0"),
        ({"pins": {"head": -1}}, "counted from 0"),
        ({"no_split": "head"}, "'head'; it must be a list of module paths"),
        ({"colocate": ["head"]}, "'head'; it must be a list of module paths"),
        ({"colocate": [("head",)]}, "at least two modules"),
        ({"max_stages": 0}, "a number of stages, at least 1"),
    ],
)
def test_a_constraint_on_what_is_not_there_is_refused(constraints: dict, what: str) -> None:
    with pytest.raises(InputError, match=what):
        partition(LAYERS, 2, constraints=PlanOptions(**constraints))


@pytest.mark.parametrize(
    ("constraints", "what"),
    [
        ({"pins": {"embed": 1, "head": 0}}, r"'embed'.* 1.*'head'.* 0.*n11 \(head, m.py:11\) reads.*n2 "),
        ({"pins": {"layers.1": 0, "layers.1.mlp": 1}}, r"n6 .*'layers.1', pinned to stage 0, .*'layers.1.mlp'.* 1"),
        ({"pins": {"layers.0": 0, "layers.1": 1}, "colocate": [("layers.0.mlp", "layers.1.attn")]}, "must share"),
        ({"no_split": ["layers"], "colocate": [("embed", "layers")]}, "with 'layers' not split; .*at most 2"),
        ({"pins": {"embed": 2}}, "stage 0 would be empty"),
        ({"pins": {"layers.0.attn": 0, "layers.0.mlp": 2}}, "stage 1 would be empty"),
    ],
)  # fmt: skip
def test_constraints_that_contradict_the_model_or_each_other_are_refused_by_name(constraints: dict, what: str) -> None:
    with pytest.raises(InfeasibleError, match=what):
        partition(LAYERS, 3, constraints=PlanOptions(**constraints))


def test_pins_meet_what_the_model_keeps_together() -> None:
    bound = model("a", "b", "c", together=((2, 4),))
    assert stages(bound, 1, pins={"a": 0}) == {"": set(), "rotary": set(), "a": {0}, "b": {0}, "c": {0}}
    with pytest.raises(InfeasibleError, match=r"n2 \(a, m.py:2\) and node n4 \(c, m.py:4\) must share"):
        partition(bound, 2, constraints=PlanOptions(pins={"a": 0, "c": 1}))


def test_things_bound_together_and_pinned_apart_are_no_problem() -> None:
    with pytest.raises(InfeasibleError, match="pinned to stage 0 and nodes pinned to stage 1"):
        contract([1.0] * 3, [(0, 1), (1, 2)], [], [Seat()] * 2, together=[(0, 2)], fixed_stages=[(0, 0), (2, 1)])


@pytest.mark.parametrize(
    ("pins", "what"),
    [
        (((3, 0),), "must be within 3 atoms"),
        (((0, 2),), "and 2 stages"),
        (((0, 1), (1, 1)), "must have ascending stages"),
        (((0, 0), (2, 1)), "and an arc"),
    ],
)
def test_pins_that_are_none_are_refused(pins, what: str) -> None:
    with pytest.raises(ValueError, match=what):
        Problem((1.0,) * 3, ((0, 1), (1, 2)), (Net((0, 1), 1.0),), (Seat(), Seat()), fixed_stages=pins)


def test_a_plans_quality_is_saved() -> None:
    plan = partition(LAYERS, 2)
    assert Plan.from_json(plan.to_json()) == plan
    assert plan.quality is not None


def test_a_plan_says_how_good_it_is() -> None:
    plan = partition(LAYERS, 2)
    assert plan.quality is not None
    assert plan.quality.proven
    assert f"bottleneck {seconds_text(plan.quality.bottleneck)} per microbatch (optimal)" in str(plan)
    assert "at most 25% above optimal" in str(Quality(5.0, 4.0, 1.0))


def wide(count: int = 60) -> Problem:
    """Towers that no search proves at once."""
    arcs = [(0, i) for i in range(1, count)] + [(i, count) for i in range(1, count)]
    nets = tuple(Net((low, high), 0.1 + (low * 7 + high * 3) % 5) for low, high in arcs)
    seconds = tuple(1.0 + (i * 13) % 7 for i in range(count + 1))
    return Problem(seconds, tuple(sorted(arcs)), nets, (Seat(may_idle=True),) * 4)


def test_a_budget_ends_the_search_with_a_plan_and_a_bound() -> None:
    hasty, patient = solve(wide(), budget=0.0).quality, solve(wide(), budget=1.0).quality
    assert hasty.lower_bound <= patient.bottleneck <= hasty.bottleneck
    assert hasty.lower_bound <= patient.lower_bound
    assert not hasty.proven


def test_a_budget_that_is_not_spent_changes_nothing() -> None:
    assert partition(LAYERS, 3, budget=1e6) == partition(LAYERS, 3)


def test_without_time_no_plan_within_memory_is_no_proof_that_there_is_none() -> None:
    problem = Problem((1.0,) * 12, tuple((i, i + 1) for i in range(11)), (), (Seat(memory=7.0),) * 2, (1.0,) * 12)
    assert solve(problem, budget=0.0).quality.bottleneck <= 7.0
    tight = Problem((1.0,) * 4, ((0, 1), (1, 2), (2, 3)), (), (Seat(memory=6.0),) * 2, (3.0, 4.0, 3.0, 2.0))
    with pytest.raises(InfeasibleError, match="no plan exists"):
        solve(tight)
    with pytest.raises(PlanError, match="no plan was found"):
        solve(tight, budget=0.0)


@pytest.mark.parametrize("count", [60, 500])
def test_a_pin_that_alone_fills_a_stage_is_kept_though_its_neighbour_could_take_the_atom(count: int) -> None:
    """Joining the two costs nothing, and leaves a stage without an atom."""
    rnd = Random(count)
    arcs = [(0, 1), *((i, j) for j in range(3, count) for i in sorted(rnd.sample(range(2, j), min(2, j - 2))))]
    arcs += [(1, j) for j in range(2, 4)]
    readers = [[high for low, high in arcs if low == atom] for atom in range(count)]
    nets = tuple(Net((atom, *users), 50.0 if atom == 0 else 0.1) for atom, users in enumerate(readers) if users)
    seconds = (0.1, 0.1, *(rnd.uniform(0.5, 2.0) for _ in range(count - 2)))
    problem = Problem(seconds, tuple(sorted(arcs)), nets, (Seat(),) * 4, fixed_stages=((1, 1),))
    solution = solve(problem, budget=1.0)
    check(problem, solution.stage_of)
    assert (solution.stage_of[0], solution.stage_of[1]) == (0, 1)
