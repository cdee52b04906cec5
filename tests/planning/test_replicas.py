"""Stages with replicas: the unsplit model's numbers, programs in which each microbatch is run once, plans that gain."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from math import ceil, inf
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import MODELS
from oracle import assert_same, step
from plans import NBYTES, WHOLE, layers, rows, stage_row, units
from torch import Tensor, nn
from toys import D, SkipToLoss, blocks, mean_square

import pipecompile
from pipecompile.errors import InfeasibleError, InputError, PlanError, ProgramError
from pipecompile.ir.between_stages import Channel, Tied
from pipecompile.ir.cluster import Cluster, Device, Link
from pipecompile.ir.graph import Cost, CostedGraph, Graph, Node, Parameter, TensorSpec
from pipecompile.ir.instruction import Backward, Forward
from pipecompile.ir.plan import Plan, with_replicas
from pipecompile.ir.program import Program, dependencies, linearize
from pipecompile.ir.weight_versions import versions
from pipecompile.partition import Step, Training, deals, partition
from pipecompile.planning.memory import memory
from pipecompile.planning.plan_search import make_plan
from pipecompile.planning.replicas import MOST_DEVICES, with_best_replicas
from pipecompile.planning.search_spec import Request
from pipecompile.planning.training_spec import Workload
from pipecompile.schedule import backward_only, forward_only, gpipe, one_f_one_b, pipedream
from pipecompile.schedule.lowering import lower
from pipecompile.schedule.simulator import simulate

NAMES = (  # of all sorts: tied weights, towers, buffers, values that are read late, outputs of several stages
    "gpt2", "unet", "two_towers", "dict_in_out", "tied_thrice", "used_twice", "buffers_in_place", "in_place_views",
    "no_grad", "nested_output", "integers", "frozen", "unused", "label_shift", "sizes",
)  # fmt: skip


def pipe_of(model: nn.Module, replicas: Any, **options: Any) -> Any:
    options = {"microbatches": 4, "costs": "count", **options}
    devices = ["cpu"] * (4 if isinstance(replicas, str) else sum(replicas))
    options.setdefault("cluster", Cluster.of(devices, Link(inf)))  # cuts cost nothing, so that stages are alike
    return pipecompile.compile(model, devices, plan=pipecompile.PlanOptions(replicas=replicas), **options)


def itself(output: Tensor) -> Tensor:
    return output


def skipping(rows: int = 5) -> tuple[nn.Module, tuple[Any, dict[str, Any]]]:
    """A model whose first value is read at the end, over whatever is between, with its loss inside."""
    torch.manual_seed(0)
    x = (torch.randn(rows, 3, D, dtype=torch.float64) for _ in range(3))
    return SkipToLoss().double(), (tuple(x), {})


# The unsplit model's numbers


@pytest.mark.parametrize("replicas", [[2, 1], [1, 2, 1], [1, 3], [2, 3], [4]], ids=str)
@pytest.mark.parametrize("schedule", WHOLE)
@pytest.mark.parametrize("microbatches", [1, 4])
def test_uneven_batches_fewer_microbatches_than_replicas_and_skips(replicas, schedule, microbatches):
    model, inputs = skipping()
    pipe = pipe_of(model, replicas, schedule=schedule, microbatches=microbatches)
    assert_same(step(pipe, model, itself, inputs), step(model, model, itself, inputs))
    groups = [group for stage, group in enumerate(pipe.pipeline.plan.replicas) if group[0] == stage]
    assert list(map(len, groups)) == replicas


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("replicas", [[2, 1], [1, 2]], ids=str)
def test_models_train_alike(name, replicas):
    it = MODELS[name]
    model, inputs = it.build(), it.inputs(6, it.lengths[0])
    assert_same(step(pipe_of(model, replicas), model, it.loss, inputs), step(model, model, it.loss, inputs))


class TiedOver(nn.Module):
    """One weight at the start, in the middle and at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.body = blocks(5)
        self.body[2][0].weight = self.body[4][0].weight = self.body[0][0].weight

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


@pytest.mark.parametrize("replicas", [[2, 1], [1, 2, 1], [1, 3]], ids=str)
def test_a_weight_of_a_replicated_and_another_stage_gets_its_gradient_once(replicas):
    torch.manual_seed(0)
    model = TiedOver().double()
    inputs = ((torch.randn(5, D, dtype=torch.float64),), {})
    pipe = pipe_of(model, replicas)
    assert_same(step(pipe, model, mean_square, inputs), step(model, model, mean_square, inputs))
    assert [tied.parameter for tied in pipe.pipeline.plan.tied_by_model] == ["body.0.0.weight"]
    assert len(pipe.pipeline.plan.tied) > 1
    assert pipe.pipeline.report.tied == ("body.0.0.weight over stages " + ", ".join(
        map(str, pipe.pipeline.plan.tied_by_model[0].stages)) + ", gradients summed",)  # fmt: skip


def test_the_loss_may_be_the_callers_and_a_second_backward_may_come():
    model, inputs = skipping()
    body, x = model.body, inputs[0][0]
    pipe = pipe_of(body, [1, 2, 1])
    assert_same(step(pipe, body, mean_square, ((x,), {})), step(body, body, mean_square, ((x,), {})))
    for module in (pipe, body):
        body.zero_grad()
        loss = mean_square(module(x))
        loss.backward(retain_graph=True)
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in body.named_parameters()}
        if module is pipe:
            mine = gradients
    assert gradients
    assert mine.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(mine[name], gradient)


def test_gradients_of_inputs_are_those_of_the_whole_batch():
    model, ((x, late, target), _) = skipping()
    found = []
    for module in (pipe_of(model, [2, 2]), model):
        leaves = [t.clone().requires_grad_() for t in (x, late, target)]
        found.append(torch.autograd.grad(module(*leaves), leaves))
    for mine, expected in zip(*found, strict=True):
        torch.testing.assert_close(mine, expected)


def test_several_steps_of_an_optimizer_and_evaluation_in_between():
    model, inputs = skipping()
    expected, _ = skipping()
    pipe = pipe_of(model, [1, 2, 1])
    assert pipe.state_dict().keys() == expected.state_dict().keys()
    for module in (pipe, expected):
        optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
        losses = []
        for _ in range(3):
            loss = module(*inputs[0])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                losses += [loss.detach(), module.eval()(*inputs[0])]
            module.train()
        found = torch.stack(losses)
        if module is pipe:
            mine = found
    torch.testing.assert_close(mine, found)
    assert len(set(found.tolist())) == 4
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(pipe.state_dict()[name], value)


class Dropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(*(nn.Sequential(nn.Linear(D, D), nn.Dropout(0.5)) for _ in range(5)))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def test_one_seed_draws_the_same_dropout_with_and_without_replicas():
    torch.manual_seed(0)
    model, x = Dropout(), torch.randn(6, D)
    runs = []
    for replicas in ([1], [1, 1, 1], [1, 2, 1], [3]):
        pipe = pipe_of(model, replicas)
        torch.manual_seed(5)
        runs.append(pipe(x))
    assert (runs[0] != model.eval()(x)).any()
    assert all(torch.equal(run, runs[0]) for run in runs)


# Programs


CHAIN = Plan.chain(3, replicas=(1, 2, 1), nbytes=NBYTES)


def test_microbatches_are_dealt_in_turn_and_stay_where_they_are():
    program = one_f_one_b(CHAIN, 6)
    assert str(program) == rows(
        """
        0: 0F0 0F1 0F2 0F3 0F4 0B0 0F5 0B1 0B2 0B3 0B4 0B5
        1: 1F0 1F2 1B0 1F4 1B2 1B4
        2: 2F1 2F3 2B1 2F5 2B3 2B5
        3: 3F0 3B0 3F1 3B1 3F2 3B2 3F3 3B3 3F4 3B4 3F5 3B5
        """
    )
    assert CHAIN.depth == (5, 4, 4, 1)
    assert versions(program).in_flight == (5, 2, 2, 1)


def counts() -> st.SearchStrategy[tuple[int, ...]]:
    return st.lists(st.integers(1, 3), min_size=1, max_size=4).map(tuple)


@given(counts(), st.integers(1, 7), st.sampled_from(sorted(WHOLE)), st.booleans())
def test_each_microbatch_runs_once_in_each_stage_whole_way_on_one_replica(replicas, n, name, end_with_steps):
    plan = Plan.chain(len(replicas), replicas=replicas)
    first = sorted(set(plan.replica_of))
    plan = replace(plan, tied=tuple(Tied(f"w{s}", plan.replicas[s]) for s in first if len(plan.replicas[s]) > 1))
    program = WHOLE[name](plan, n, step=end_with_steps)
    done = Counter((type(i), plan.replica_of[i.stage], i.microbatch) for i in program.instructions)
    for kind in (Forward, Backward):
        assert {key: count for key, count in done.items() if key[0] is kind} == {
            (kind, stage, k): 1 for stage in first for k in range(n)
        }
    ran = {(i.stage, i.microbatch) for i in program.instructions if isinstance(i, Forward)}
    assert ran == {(i.stage, i.microbatch) for i in program.instructions if isinstance(i, Backward)}
    lowered = lower(program, simulate(program, units(plan)))
    assert len(list(linearize(lowered))) == len(lowered.instructions)
    if name == "1f1b":
        dealt = [sum(plan.runs(stage, k) for k in range(n)) for stage in range(plan.num_stages)]
        most = [min(count, depth // len(g)) for count, g, depth in zip(dealt, plan.replicas, plan.depth, strict=True)]
        assert versions(program).in_flight == tuple(most)


def test_halves_of_a_step_have_replicas_too():
    assert stage_row(forward_only(CHAIN, 3), 1) == "F0 F2"
    assert stage_row(backward_only(CHAIN, 3), 2) == "B1"


def test_what_comes_before_a_computation_is_of_its_own_microbatch():
    assert [str(i) for i in dependencies(Forward(3, 1), CHAIN)] == ["3<2F1"]
    assert [str(i) for i in dependencies(Backward(0, 2), CHAIN)] == ["0F2", "0<1B2"]


def test_a_program_that_gives_a_microbatch_to_the_wrong_replica_is_refused():
    text = str(one_f_one_b(CHAIN, 2)).replace("1F0 1B0", "1F1 1B1").replace("2F1 2B1", "2F0 2B0")
    with pytest.raises(ProgramError, match=r"1F1 is on the wrong one of the replicas \(1, 2\)"):
        Program.parse(text, CHAIN).validate()


# Plans


def test_replicas_have_channels_where_they_share_microbatches():
    def pairs(*replicas: int) -> list[tuple[int, int]]:
        return [(c.source, c.target) for c in Plan.chain(len(replicas), replicas=replicas).channels]

    assert pairs(1, 2, 1) == [(0, 1), (0, 2), (1, 3), (2, 3)]
    assert pairs(2, 2) == [(0, 2), (1, 3)]
    assert pairs(2, 3) == [(0, 2), (0, 3), (0, 4), (1, 2), (1, 3), (1, 4)]
    assert pairs(2, 4) == [(0, 2), (0, 4), (1, 3), (1, 5)]


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 30), st.integers(1, 9))
def test_a_channel_has_its_share_of_microbatches_that_follow_each_other(source, target, start, count):
    plan = Plan.chain(2, replicas=(source, target))
    for channel in plan.channels:
        mine = [k for k in range(200) if plan.runs(channel.source, k)][start : start + count]
        assert sum(plan.runs(channel.target, k) for k in mine) <= plan.shared(channel, count)
    each = {c: max(sum(plan.runs(c.target, k) for k in range(200) if plan.runs(c.source, k)), 1) for c in plan.channels}
    assert all(plan.shared(c, 200) >= n for c, n in each.items())


def test_a_plan_with_replicas_survives_json_and_prints_them():
    plan = partition(HEAVY, 3, replicas=(1, 2, 1))
    assert (plan.replica_of, plan.stage_of) == ((0, 1, 1, 3), (None, 0, 1, 3))
    assert Plan.from_json(plan.to_json()) == plan
    lines = str(plan).splitlines()
    assert lines[4] == "  stage 2 on rank 2: 1 nodes, a replica of stage 1; 4 B to 3"
    assert not any("tied" in line for line in lines)


@pytest.mark.parametrize(
    ("replica_of", "channels", "message"),
    [
        ((0, 0, 1), (), "stage 2 is a replica of stage 1, so it must come directly after it"),
        ((0, 1, 0), (), "stage 2 is a replica of stage 0, so it must come directly after it"),
        ((1, 1, 2), (), "stage 0 is a replica of stage 1"),
        ((0, 1), (), "3 stages have a rank, but replica_of has 2"),
        ((0, 1, 1), (Channel(0, 1),), r"replicas must have the channels of their stage, but \(0, 2\) is not in"),
    ],
)
def test_a_plan_with_replicas_that_cannot_be_is_refused(replica_of, channels, message):
    with pytest.raises(PlanError, match=message):
        Plan((), (0, 1, 2), channels, replica_of=replica_of)


def test_nodes_belong_to_the_first_of_the_replicas():
    with pytest.raises(PlanError, match=r"nodes are in stages \[1\], but the plan has stages \[0\]"):
        Plan((1,), (0, 1), replica_of=(0, 0))
    with pytest.raises(PlanError, match=r"at least one replica .*; got \(1, 0\)"):
        with_replicas((1, 0))


# Speed and memory, predicted


def equal_devices(count: int, bandwidth: float = inf, memory: int | None = None) -> Cluster:
    return Cluster((Device("d", memory=memory),) * count, Link(bandwidth))


HEAVY = layers(1.0, 4.0, 1.0)


def test_a_stage_with_replicas_relieves_the_bottleneck():
    plain, dealt = (partition(HEAVY, 3, replicas=replicas) for replicas in ((), (1, 2, 1)))
    assert plain.quality is not None
    assert dealt.quality is not None
    assert plain.quality.bottleneck == pytest.approx(4.0, abs=1e-3)
    assert dealt.quality.bottleneck == pytest.approx(2.0, abs=1e-3)
    steps = [workload(40).step_seconds(HEAVY, plan, equal_devices(4)) for plan in (plain, dealt)]
    assert steps[0] == pytest.approx(40 * 4, abs=2)
    assert steps[1] == pytest.approx(40 * 2 + 4, abs=2)


@pytest.mark.parametrize(
    "replicas", [(1, 2, 1), (2, 1), (1, 3), (3, 1), (2, 2), (2, 3, 1), (1, 2, 3, 2), (4,)], ids=str
)
@pytest.mark.parametrize(("f", "b"), [(1.0, 1.0), (1.0, 2.0)])
@pytest.mark.parametrize("n", [12, 24])
def test_equal_devices_take_what_the_closed_form_says(replicas, f, b, n):
    """A stage with r replicas is r times as long, so that all devices are equally busy: no worse than equal stages."""
    plan = Plan.chain(len(replicas), replicas=replicas)
    costs = [Cost(f * len(group), b * len(group)) for group in plan.replicas]
    best = (n + sum(replicas) - 1) * (f + b)
    assert simulate(one_f_one_b(plan, n), costs).makespan <= best
    assert simulate(gpipe(plan, n), costs).makespan <= best
    assert simulate(one_f_one_b(plan, n), costs).makespan >= n * (f + b)


def test_gradients_of_replicas_take_the_link_that_they_go_over():
    plan = replace(Plan.chain(1, replicas=(3,)), tied=(Tied("w", (0, 1, 2), 6_000_000),))
    cluster = Cluster.of(["d"] * 3, Link(1e6))
    timeline = simulate(one_f_one_b(plan, 3), [Cost(1.0, 1.0)] * 3, cluster)
    assert timeline.makespan == 2.0 + 6.0
    loaded = lower(one_f_one_b(plan, 3), timeline)
    assert simulate(loaded, [Cost(1.0, 1.0)] * 3, cluster).makespan == 8.0


def test_memory_counts_each_replica_and_the_owner_has_the_optimizers_state():
    costed = layers(1.0, 4.0, 1.0, weights=400, saved=1000)
    plan = Plan.of(costed.graph, [None, 0, 1, 3], replica_of=(0, 1, 1, 3))
    held = memory(costed, plan, one_f_one_b(plan, 8)).stages
    assert [stage.parameters for stage in held] == [400] * 4
    assert [stage.gradients for stage in held] == [400] * 4
    assert [stage.optimizer for stage in held] == [800, 800, 0, 800]
    in_flight = [5, 2, 2, 1]
    assert [round(stage.activations + stage.working, -3) for stage in held] == [1000 * count for count in in_flight]
    # values of five microbatches at two replicas; gradients of its own two; of the other replica's weight
    assert [stage.waiting for stage in held] == [5 * 4, 3 * 4 + 2 * 4 + 400, 3 * 4 + 2 * 4, 2 * 4 + 2 * 4]


# The choice


def workload(microbatches: int = 16, **options: Any) -> Workload:
    return Workload(one_f_one_b, microbatches, **options)


def test_the_choice_has_the_shortest_step_of_all_and_no_replicas_is_among_them():
    costed, cluster = layers(1.0, 2.0, 2.0, 1.0, 1.0), equal_devices(4, 1e6)
    plan, candidates = with_best_replicas(costed, cluster, workload())
    assert [candidate.seconds for candidate in candidates] == sorted(c.seconds for c in candidates)
    assert (1, 1, 1, 1) in [candidate.replicas for candidate in candidates]
    assert candidates[0].seconds == pytest.approx(workload().step_seconds(costed, plan, cluster))
    for replicas in [(1, 2, 1), (2, 2), (1, 3), (3, 1), (4,)]:
        other = make_plan(costed, Request(tuple(replicas)), cluster, workload())
        assert candidates[0].seconds <= workload().step_seconds(costed, other, cluster) * 1.05


@pytest.mark.parametrize(("bandwidth", "best"), [(1e9, (4,)), (300.0, (1, 3))])
def test_a_slow_link_for_gradients_speaks_against_replicas_of_large_weights(bandwidth, best):
    costed = layers(1.0, 4.0, 1.0)
    small = [replace(p, spec=TensorSpec((1,), "float32", True)) for p in costed.graph.parameters]
    graph = replace(costed.graph, parameters=(costed.graph.parameters[0], *small[1:]))
    costed = replace(costed, graph=graph)
    assert with_best_replicas(costed, equal_devices(4, bandwidth), workload())[1][0].replicas == best


def test_memory_speaks_against_too_many_replicas():
    costed, work = layers(*[1.0] * 4), workload(recompute="never")
    assert with_best_replicas(costed, equal_devices(4), work)[1][0].replicas == (4,)
    whole = max(work.memory(costed, partition(costed, 1), equal_devices(1)).ranks)
    tight = equal_devices(4, memory=whole - 1)
    plan, candidates = with_best_replicas(costed, tight, work)
    assert 1 < len(candidates[0].replicas) < 4
    assert max(work.memory(costed, plan, tight).ranks) < whole
    with pytest.raises(InfeasibleError, match=r"no number of stages and replicas has a plan on 2 devices \(\[1, 1\]: "):
        with_best_replicas(costed, equal_devices(2, memory=1000), work)


def test_proposals_use_all_devices_whatever_their_number_of_stages():
    found = deals(layers(*[1.0] * 9), equal_devices(5), Step(8, lambda replicas, behind: ceil(behind / replicas), 2.0))
    assert [len(replicas) for replicas in found] == [1, 2, 3, 4, 5]
    assert {sum(replicas) for replicas in found} == {5}


def test_a_proposal_holds_the_activations_of_each_microbatch_in_flight():
    costed, half = layers(*[1.0] * 4, weights=4, saved=1000), 2 * 3 * 1000 + 100  # bytes of two layers
    step = Step(8, lambda replicas, behind: 3, 2.0)
    assert deals(costed, equal_devices(2, memory=2 * half), step) == [(2,), (1, 1)]
    assert deals(costed, equal_devices(2, memory=half), step) == [(1, 1)]
    assert deals(costed, equal_devices(2, memory=half), replace(step, again=True)) == [(2,), (1, 1)]
    assert deals(costed, equal_devices(2, memory=half - 200), step) == []


def test_too_many_devices_are_refused():
    with pytest.raises(InputError, match=f"up to {MOST_DEVICES} devices, but there are {MOST_DEVICES + 1}"):
        with_best_replicas(HEAVY, equal_devices(MOST_DEVICES + 1), workload())


def test_a_pipeline_says_what_it_has_chosen_and_trains():
    model, inputs = skipping(rows=8)
    pipe = pipe_of(model, "auto", example_inputs=inputs)
    assert_same(step(pipe, model, itself, inputs), step(model, model, itself, inputs))
    assert sum("predicted step" in line for line in pipe.pipeline.report.replicas) >= 2


# What cannot be


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = blocks(2), nn.BatchNorm1d(D), blocks(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)))


def test_a_stage_that_writes_for_each_microbatch_has_no_replicas():
    x = torch.randn(8, D)
    pipe = pipe_of(Norm(), [2])
    with pytest.raises(PlanError, match=r"2 replicas: module 'norm' \(.*\) writes 'norm.running_mean'"):
        pipe(x)
    pipe_of(Norm(), [2], batching=pipecompile.Batching(batch_norm="deferred"))(x).sum().backward()
    pipe.eval()
    torch.testing.assert_close(pipe(x), pipe.pipeline.model(x))
    with pytest.raises(PlanError, match="module 'norm'"):
        pipe.train()(x)


def test_deferred_batch_norm_writes_once_whoever_runs_the_microbatches():
    torch.manual_seed(0)
    model, x = Norm().double(), torch.randn(8, D, dtype=torch.float64)
    runs = [
        step(
            pipe_of(model, replicas, batching=pipecompile.Batching(batch_norm="deferred")),
            model,
            mean_square,
            ((x,), {}),
        )
        for replicas in ([1], [2], [1, 2])
    ]
    assert_same(runs[1], runs[0])
    assert_same(runs[2], runs[0])


def test_auto_gives_no_replicas_to_what_writes_for_each_microbatch():
    pipe = pipe_of(Norm(), "auto", example_inputs=(torch.randn(8, D),))
    node = next(node for node in pipe.pipeline.costs.graph.nodes if node.writes)
    stage = pipe.pipeline.plan.stage_of[pipe.pipeline.costs.graph.nodes.index(node)]
    assert stage is not None
    assert len(pipe.pipeline.plan.replicas[stage]) == 1


@pytest.mark.parametrize(
    ("devices", "replicas", "options", "message"),
    [
        (3, [1, 1], {}, r"replicas=\(1, 1\) is for 2 devices, but devices= has 3"),
        (2, [2, 0], {}, r"replicas=\[2, 0\]; it must list the number of devices of each stage"),
        (2, [1, 1.0], {}, "must list the number of devices of each stage"),
        (2, "most", {}, "replicas='most' is not known; it must be 'auto', or a list"),
        (2, [2], {"schedule": "pipedream", "optimizer": torch.optim.SGD}, "does not work with schedule='pipedream'"),
        (2, "auto", {"schedule": "pipedream", "optimizer": torch.optim.SGD}, "does not work with schedule='pipedream'"),
    ],
)
def test_bad_input(devices, replicas, options, message):
    with pytest.raises(InputError, match=message):
        pipecompile.compile(blocks(4), ["cpu"] * devices, plan=pipecompile.PlanOptions(replicas=replicas), **options)


def test_pipedream_has_no_program_for_replicas():
    with pytest.raises(PlanError, match="stages 1, 2 are replicas, whose gradients are summed once per batch"):
        pipedream(CHAIN, range(4))


def test_where_a_stage_owns_its_parameters_gradients_of_all_its_replicas_are_within_memory():
    """Equal layers, of which the first has most parameters: the even cut fits without the gradients that wait."""
    hidden = TensorSpec((1,), "float32", requires_grad=True)
    sizes = [6, 2, 2, 2]
    parameters = [
        Parameter(f"p{i}", TensorSpec((size,), "float32", requires_grad=True)) for i, size in enumerate(sizes)
    ]
    reads = [Node("x", "input", outputs=(hidden,), rematerialized=True)]
    reads += [Node(f"n{i}", "linear", (i,), (hidden,), (p.name,)) for i, p in enumerate(parameters)]
    costs = (Cost(), *(Cost(1.0, 1.0, 0, 4 * size) for size in sizes))
    costed = CostedGraph(Graph(tuple(reads), (0,), (len(sizes),), tuple(parameters)), costs, "computed")

    def cut(limit: int) -> Plan:
        cluster = Cluster((Device("cpu", memory=limit),) * 8, Link(inf))
        return partition(costed, 2, cluster, Training((1, 1), (1, 1), 0.0), replicas=(4, 4))

    found = {limit: memory(costed, cut(limit), one_f_one_b(cut(limit), 8), 0.0, step="fused") for limit in (10**6, 156)}
    assert max(found[10**6].ranks) >= 5 * 4 * (6 + 2), "parameters, gradients, and those of three others"
    assert 5 * 4 * 6 <= max(found[156].ranks) <= 156
