import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pipecompile.errors import PlanError
from pipecompile.ir.graph import Graph, Node, Parameter, TensorSpec
from pipecompile.ir.plan import Plan
from pipecompile.partition import carry_over

SPEC = TensorSpec((2,), "float32", True)


def graph_of(*rows: tuple, together=()) -> Graph:
    """A row is (op, inputs, parameters); its path is its operation without digits at the end."""
    nodes = [Node("x", "input", outputs=(SPEC,), rematerialized=True)]
    for op, inputs, parameters in rows:
        kind = op.rstrip("0123456789")
        nodes.append(
            Node(f"{op}_{len(nodes)}", kind, inputs, (SPEC,), parameters, path=f"net.{op}", source="model.py:7")
        )
    names = dict.fromkeys(name for _, _, parameters in rows for name in parameters)
    return Graph(tuple(nodes), (0,), (len(rows),), tuple(Parameter(n, SPEC) for n in names), together)


def placed(plan: Plan) -> list[int | None]:
    return list(plan.stage_of)


TRAIN = graph_of(
    ("linear1", (0,), ("w1",)),
    ("dropout", (1,), ()),
    ("linear2", (2,), ("w2",)),
    ("linear3", (3,), ("w3",)),
)
PLAN = Plan.of(TRAIN, [None, 0, 1, 1, 2], rank_of=(0, 1, 0))


def test_the_same_graph_gets_the_same_plan():
    assert carry_over(PLAN, TRAIN, TRAIN) == PLAN


def test_a_graph_without_dropout_keeps_its_parameters_in_place():
    evaluation = graph_of(("linear1", (0,), ("w1",)), ("linear2", (1,), ("w2",)), ("linear3", (2,), ("w3",)))
    plan = carry_over(PLAN, TRAIN, evaluation)
    assert placed(plan) == [None, 0, 1, 2]
    assert plan.rank_of == PLAN.rank_of


def test_a_new_node_goes_to_the_earliest_stage_that_keeps_edges_forward():
    grown = graph_of(
        ("linear1", (0,), ("w1",)),
        ("relu", (0,), ()),
        ("dropout", (1,), ()),
        ("linear2", (3,), ("w2",)),
        ("tanh", (4,), ()),
        ("linear3", (5,), ("w3",)),
    )
    assert placed(carry_over(PLAN, TRAIN, grown)) == [None, 0, 0, 1, 1, 1, 2]


def test_a_node_moves_back_to_serve_a_parameter_that_is_earlier():
    rewired = graph_of(
        ("linear1", (0,), ("w1",)),
        ("linear2", (1,), ("w2",)),
        ("dropout", (0,), ()),
        ("linear1", (3,), ("w1",)),
        ("linear3", (2, 4), ("w3",)),
    )
    assert placed(carry_over(PLAN, TRAIN, rewired)) == [None, 0, 1, 0, 0, 2]


def test_a_head_that_gets_the_weight_of_the_first_layer_stays_and_is_tied():
    tied = graph_of(
        ("linear1", (0,), ("w1",)), ("dropout", (1,), ()), ("linear2", (2,), ("w2",)), ("linear3", (3,), ("w1",))
    )
    with pytest.raises(PlanError, match="values cannot flow backward"):
        carry_over(PLAN, TRAIN, tied)
    plan = carry_over(PLAN, TRAIN, tied, ties=True)
    assert placed(plan) == [None, 0, 1, 1, 2]
    assert [(each.parameter, each.stages) for each in plan.tied] == [("w1", (0, 2))]


def test_equal_calls_are_told_apart_by_their_occurrence():
    twice = graph_of(("gelu", (0,), ()), ("gelu", (1,), ()), ("linear1", (2,), ("w",)))
    plan = Plan.of(twice, [None, 0, 1, 1])
    assert placed(carry_over(plan, twice, twice)) == [None, 0, 1, 1]


def test_a_tied_parameter_is_read_where_one_of_its_copies_is():
    tied = graph_of(("embedding", (0,), ("w",)), ("linear1", (1,), ("w1",)), ("linear2", (2,), ("w",)))
    plan = Plan.of(tied, [None, 0, 1, 2])
    other = graph_of(("embedding", (0,), ("w",)), ("linear1", (1,), ("w1",)), ("matmul", (2,), ("w",)))
    assert placed(carry_over(plan, tied, other)) == [None, 0, 1, 2]


def test_nodes_that_belong_together_follow_the_one_with_a_parameter():
    bound = graph_of(
        ("linear1", (0,), ("w1",)),
        ("dropout", (1,), ()),
        ("linear2", (2,), ("w2",)),
        ("linear3", (3,), ("w3",)),
        together=((1, 2),),
    )
    assert placed(carry_over(PLAN, TRAIN, bound)) == [None, 0, 0, 1, 2]


def test_a_stage_that_would_be_empty_gets_a_node_that_may_move():
    plan = Plan.of(TRAIN, [None, 0, 1, 2, 2])
    shorter = graph_of(("linear1", (0,), ("w1",)), ("relu", (1,), ()), ("linear2", (2,), ("w2",)))
    assert placed(carry_over(plan, TRAIN, shorter)) == [None, 0, 1, 2]


def test_a_stage_that_no_node_may_move_to_stays_empty():
    shorter = graph_of(("linear1", (0,), ("w1",)), ("linear3", (1,), ("w3",)))
    carried = carry_over(PLAN, TRAIN, shorter)
    assert placed(carried) == [None, 0, 2]
    assert carried.num_stages == 3


def test_a_backward_edge_is_refused_with_node_path_and_both_stages():
    swapped = graph_of(("linear2", (0,), ("w2",)), ("linear1", (1,), ("w1",)), ("linear3", (2,), ("w3",)))
    with pytest.raises(PlanError, match=r"linear2_1 \(net.linear2, model.py:7\).*of stage 1.*linear1_2.*in stage 0"):
        carry_over(PLAN, TRAIN, swapped)


def test_one_node_with_parameters_of_two_stages_goes_to_one_of_them_and_the_other_is_tied():
    fused = graph_of(("fused", (0,), ("w1", "w2")), ("linear3", (1,), ("w3",)), ("linear2", (2,), ("w2",)))
    old = Plan.of(TRAIN, [None, 0, 0, 1, 2], rank_of=(0, 1, 0))
    plan = carry_over(old, TRAIN, graph_of(("fused", (0,), ("w1", "w2")), ("linear3", (1,), ("w3",))))
    assert placed(plan)[1] in (0, 1)
    assert plan.tied == ()
    with pytest.raises(PlanError, match="values cannot flow backward"):
        carry_over(old, TRAIN, fused)


def test_a_parameter_that_the_old_graph_never_read_may_go_anywhere():
    grown = graph_of(
        ("linear1", (0,), ("w1",)), ("linear2", (1,), ("w2",)), ("linear3", (2,), ("w3",)), ("linear4", (3,), ("w4",))
    )
    assert placed(carry_over(PLAN, TRAIN, grown)) == [None, 0, 1, 2, 2]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=4, max_size=20), st.data())
def test_dropping_any_nodes_without_parameters_moves_no_parameter(raw, data):
    stages = sorted(raw)
    stages = [sorted(set(stages)).index(stage) for stage in stages]
    soft = data.draw(st.lists(st.booleans(), min_size=len(stages), max_size=len(stages)))
    rows = [(f"layer{i}", (i,), () if soft[i] else (f"w{i}",)) for i in range(len(stages))]
    graph = graph_of(*rows)
    plan = Plan.of(graph, [None, *stages])
    dropped = data.draw(st.integers(0, len(stages) - 1))
    assume(stages.count(stages[dropped]) > 1)
    kept = [row for i, row in enumerate(rows) if i != dropped or not soft[i]]
    new = graph_of(*((op, (i,), parameters) for i, (op, _, parameters) in enumerate(kept)))
    carried = carry_over(plan, graph, new)
    home = {name: stage for node, stage in zip(graph.nodes, plan.stage_of, strict=True) for name in node.parameters}
    found = [(home[n], s) for node, s in zip(new.nodes, carried.stage_of, strict=True) for n in node.parameters]
    assert all(old == now for old, now in found)
