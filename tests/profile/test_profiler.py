"""Costs: equal operations are timed once, saved bytes are those that autograd keeps, a model without memory counts."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from long import some
from models import MODELS
from torch import Tensor, nn
from toys import D, blocks

from pipecompile.capture import Captured, capture, read_call, summarize
from pipecompile.errors import PipecompileError
from pipecompile.ir.device_specs import Roofline
from pipecompile.ir.graph import Cost, CostedGraph
from pipecompile.profile import profile
from pipecompile.profile.allocations import Allocations
from pipecompile.profile.budget import Budget

module = importlib.import_module("pipecompile.profile.profiler")
meters = importlib.import_module("pipecompile.profile.meters")
CPU = torch.device("cpu")


class Meter:
    """A clock that counts what it is asked to time; a call takes a second, with its backward two more."""

    timed: list[str]
    in_turn = False

    def __init__(self, device: torch.device) -> None:
        self.fake = nullcontext()
        self.timed = Meter.timed = []

    def tensor(self, tensor: Tensor) -> Tensor:
        return tensor.detach().clone()

    def seconds(self, call: Any, share: Any = None) -> tuple[float, float]:
        outputs = call.forward()
        self.timed.append("forward")
        if not call.differentiable:
            return 1.0, 0.0
        call.backward(outputs)
        self.timed.append("both")
        return 1.0, 2.0


@pytest.fixture
def meter(monkeypatch: pytest.MonkeyPatch) -> type[Meter]:
    monkeypatch.setattr(module, "Clock", Meter)
    return Meter


def captured_of(name: str, batch: int = 4) -> Captured:
    args, kwargs = MODELS[name].inputs(batch, MODELS[name].lengths[0])
    model = MODELS[name].build()
    return capture(model, read_call(model.forward, args, kwargs))


def captured(model: nn.Module, *args: Any, microbatch: int | None = None) -> Captured:
    return capture(model, read_call(model.forward, args, {}), microbatch)


def costed(capture: Captured, how: Any = "count", **options: Any) -> CostedGraph:
    return profile(capture, summarize(capture), how, **options)


def cost_of(result: CostedGraph, op: str) -> list[Cost]:
    return [cost for node, cost in zip(result.graph.nodes, result.costs, strict=True) if node.op == op]


@pytest.mark.parametrize("how", ["count", "measure"])
def test_a_sparse_buffer_takes_time_and_its_memory_is_not_counted(how: str) -> None:
    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(D, D)
            self.register_buffer("edges", torch.eye(D).to_sparse())

        def forward(self, x: Tensor) -> Tensor:
            return torch.sparse.mm(self.edges, self.linear(x).t())

    result = costed(captured(Graph(), torch.randn(4, D)), how)
    (multiplied,) = [c for n, c in zip(result.graph.nodes, result.costs, strict=True) if "mm" in n.name]
    assert multiplied.forward > 0


# Seconds


def test_equal_operations_on_equal_shapes_are_timed_once(meter: type[Meter]) -> None:
    result = costed(captured(blocks(6), torch.ones(4, D)), "measure")
    assert len(cost_of(result, "linear")) == len(cost_of(result, "tanh")) == 6
    # the first linear reads an input, which wants no gradient; the others read activations, which do
    assert meter.timed == ["forward", "both"] * 3
    assert {(cost.forward, cost.backward) for cost in cost_of(result, "linear")} == {(1.0, 2.0)}


@pytest.mark.parametrize("width", [D, D + 1])
def test_another_shape_is_timed_anew(width: int, meter: type[Meter]) -> None:
    model = nn.Sequential(nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, width), nn.Linear(width, D))
    costed(captured(model, torch.ones(4, D)), "measure")
    assert len(meter.timed) == 2 * (2 if width == D else 4)


def test_another_option_is_timed_anew(meter: type[Meter]) -> None:
    class Sums(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sum(dim=0).sum() + x.sum(dim=1).sum() + x.sum(dim=0, keepdim=True).sum() + x.sum(dim=0).sum()

    result = costed(captured(Sums(), torch.ones(4, 4)), "measure")
    assert len(cost_of(result, "sum")) == 8
    # three ways to sum the matrix, the sum of a vector and of a matrix of one row; and one addition of scalars
    assert meter.timed == ["forward"] * 6


def test_what_wants_no_gradient_has_no_backward(meter: type[Meter]) -> None:
    result = costed(captured_of("frozen"), "measure")
    frozen = [c for n, c in zip(result.graph.nodes, result.costs, strict=True) if n.path.startswith("start")]
    assert frozen
    assert {cost.backward for cost in frozen} == {0.0}
    assert any(cost.backward for cost in result.costs)


def test_sizes_and_inputs_cost_nothing(meter: type[Meter]) -> None:
    result = costed(captured_of("sizes"), "measure")
    assert cost_of(result, "input") == [Cost()]
    assert set(cost_of(result, "size")) == {Cost()}


def test_a_clock_gives_the_median_of_several_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0.0, 0.005, 0.010, 0.011, 0.020, 0.022])
    runs: list[int] = []
    monkeypatch.setattr(meters, "REPEATS", (3, 3))
    monkeypatch.setattr("time.perf_counter", lambda: next(ticks))
    assert meters.Clock(CPU).repeated(lambda: runs.append(1)) == pytest.approx(0.002)
    assert len(runs) == 4  # the first run is not timed


class Paced:
    """A call on a clock of its own: two seconds forward, five backward and one to start it, much for its seeds."""

    differentiable = True

    def __init__(self) -> None:
        self.now = 0.0

    def forward(self) -> list[Tensor]:
        self.now += 2
        return []

    def seeds(self, outputs: list[Tensor]) -> list[Tensor]:
        self.now += 100
        return []

    def backward(self, outputs: list[Tensor], seeds: list[Tensor]) -> None:
        self.now += 5 + 1


def test_a_backward_is_measured_without_its_seeds_and_its_start(monkeypatch: pytest.MonkeyPatch) -> None:
    call, clock = Paced(), meters.Clock(CPU)
    clock.start = 1.0
    monkeypatch.setattr("time.perf_counter", lambda: call.now)
    assert clock.seconds(call) == (2, 5)


@pytest.mark.parametrize("wants", [True, False])
def test_forward_and_backward_are_measured_in_the_same_runs(wants: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    times = itertools.count(0.0, 1e-3)
    call = Paced()
    call.differentiable = wants
    monkeypatch.setattr(call, "forward", lambda: ran.append("forward") or [])
    monkeypatch.setattr(call, "backward", lambda outputs, seeds: ran.append("backward"))
    clock = meters.Clock(CPU)
    clock.start = 0.0
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    clock.seconds(call, lambda seconds: 0.0)
    assert ran == (["forward", "backward"] if wants else ["forward"]) * meters.REPEATS[0]


@pytest.mark.parametrize(
    ("seconds", "share", "runs"),
    [
        (1.0, 0.0, 1),  # long: an interruption of it does not matter
        (1.0, 3.5, 4),
        (0.001, 0.0, meters.REPEATS[0]),
        (0.001, 0.0045, 5),
        (0.001, 9.0, meters.REPEATS[1]),
    ],
)
def test_an_operation_is_repeated_for_its_share_of_the_seconds(seconds: float, share: float, runs: int) -> None:
    ran: list[int] = []
    clock = itertools.count()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("time.perf_counter", lambda: seconds * next(clock))
        meters.Clock(CPU).repeated(lambda: ran.append(1), share=lambda seconds: share)
    assert len(ran) == 1 + runs  # the first is not timed


def test_seconds_are_shared_by_what_all_calls_alike_take() -> None:
    capture = captured(nn.Sequential(*(nn.Linear(D, D) for _ in range(9)), nn.Tanh()), torch.ones(4, D))
    calls = [node for node in capture.graph.nodes if node.op.startswith("call")]
    linear, tanh = calls[1], calls[-1]
    budget = Budget(calls, seconds=0.04)
    assert len(calls) == 10
    assert budget.share(linear)(1.0) == pytest.approx(0.04 * 0.9)  # all others are expected to take as long
    budget.spend(linear, 1.0)
    assert budget.share(tanh)(1.0) == pytest.approx(0.04 * 0.1)
    assert budget.share(tanh)(21.0) == pytest.approx(0.04 * 0.7)
    assert Budget(calls, seconds=1e9).share(linear)(1.0) == meters.ENOUGH
    assert Budget(calls).share(tanh)(0.0) == 0.0


def test_a_measured_profile_has_seconds_and_says_where_they_are_from() -> None:
    result = costed(captured_of("used_twice"), "measure")
    assert result.origin == f"measured: cpu, torch {torch.__version__}"
    assert all(cost.forward > 0 for cost in cost_of(result, "linear"))
    assert sum(cost.backward for cost in cost_of(result, "linear")) > 0


@pytest.mark.parametrize("name", ["in_place_views", "buffers_in_place", "custom_functions", "label_shift", "autocast"])
@pytest.mark.parametrize("how", ["measure", "count"])
def test_a_profile_leaves_parameters_buffers_and_inputs_as_they_were(name: str, how: str) -> None:
    capture = captured_of(name)
    tensors = [*capture.model.parameters(), *capture.model.buffers(), *capture.call.tensors.values()]
    before = [(tensor.clone(), tensor.grad) for tensor in tensors]
    state = torch.get_rng_state()
    assert costed(capture, how).seconds > 0
    assert all(torch.equal(t, copy) and t.grad is grad for t, (copy, grad) in zip(tensors, before, strict=True))
    assert how == "measure" or torch.equal(torch.get_rng_state(), state)


# Bytes


def kept_by_autograd(capture: Captured) -> int:
    """Bytes of the storages, parameters and buffers apart, that autograd keeps in a run of the unsplit model."""
    parameters = {t.untyped_storage().data_ptr() for t in (*capture.model.parameters(), *capture.model.buffers())}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    args, kwargs = capture.call.rebuild(capture.call.tensors)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = capture.model(*args, **kwargs)
    del output
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


SAVING = [
    "gpt2", "bert", "vit", "unet", "resnet50", "two_towers", "dict_in_out", "tied",
    "long_skip", "in_place", "no_grad", "frozen", "unused", "integers", "used_twice", "custom_functions",
]  # fmt: skip


@pytest.mark.parametrize("name", SAVING)
def test_saved_bytes_are_what_autograd_keeps_of_the_whole_model(name: str) -> None:
    capture = captured_of(name)
    saved = sum(cost.saved_bytes for cost in costed(capture).costs)
    assert saved > 0
    assert saved == pytest.approx(kept_by_autograd(capture), rel=0.02)


@pytest.mark.parametrize("name", ["dict_in_out", "unet", "in_place"])
def test_measured_and_counted_bytes_are_the_same(name: str) -> None:
    capture = captured_of(name)
    measured, counted = (costed(capture, how).costs for how in ("measure", "count"))
    assert [cost.saved_bytes for cost in measured] == [cost.saved_bytes for cost in counted]


@pytest.mark.parametrize(
    ("sizes", "kind"), some(itertools.product([(64, 64), (64, 128), (96, 32)], [nn.LSTM, nn.GRU]), 5)
)
def test_the_workspace_of_a_recurrent_layer_is_counted(kind: type[nn.RNNBase], sizes: tuple[int, int]) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = kind(*sizes, num_layers=2, bidirectional=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x)[0].square().mean()

    capture = captured(Recurrent(), torch.randn(24, 8, sizes[0]))
    counted = sum(cost.saved_bytes for cost in costed(capture, "count").costs)
    assert counted == pytest.approx(kept_by_autograd(capture), rel=0.08)


@pytest.mark.parametrize("shape", [(64, 32), (8, 64, 32)])
def test_the_backward_of_a_write_into_a_view_copies_the_gradient(shape: tuple[int, ...]) -> None:
    class Rectified(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x).relu_()
            return x

    model = Rectified()
    capture = captured(model, torch.randn(shape))
    leaf = torch.randn(shape, requires_grad=True)
    is_view = model.layers[0](leaf)._is_view()
    assert is_view == (len(shape) > 2)  # of a product of matrices
    out = (leaf.clone().view(shape) if is_view else leaf.clone()).relu_()
    gradient = torch.ones(shape)
    with Allocations() as during:
        torch.autograd.grad(out, leaf, gradient)
    for how, least in [("measure", 1.0), ("count", 0.75)]:  # fakes rebuild the view without memory of its own
        result = costed(capture, how)
        written = [f for f, n in zip(result.footprints, result.graph.nodes, strict=True) if n.op == "relu_"]
        assert len(written) == 2
        assert all(least * during.most <= f.backward_bytes <= during.most for f in written)
    assert (during.most > 2 * out.nbytes) == is_view


def test_a_value_that_two_operations_keep_counts_for_the_first() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(D, D, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            h = self.layer(x)
            return h.exp() * h + h.sin() * h

    result = costed(captured(Shared(), torch.ones(4, D)))
    floats = 4 * D * 4
    saved = [cost.saved_bytes // floats for cost in result.costs]
    # x; exp keeps its result; mul keeps h; sin keeps nothing new; mul keeps sin's result
    assert [*zip([n.op for n in result.graph.nodes], saved, strict=True)] == [
        ("input", 0), ("linear", 1), ("exp", 1), ("mul", 1), ("sin", 0), ("mul", 1), ("add", 0),
    ]  # fmt: skip


def test_costs_are_those_of_one_microbatch() -> None:
    model, x = blocks(3), torch.ones(8, D)
    whole, half = (sum(c.saved_bytes for c in costed(captured(model, x, microbatch=rows)).costs) for rows in (8, 4))
    assert whole == 2 * half > 0


def test_parameters_are_not_saved_bytes() -> None:
    result = costed(captured(nn.Sequential(nn.Linear(D, 1000), nn.Linear(1000, D)), torch.ones(1, D)))
    assert sum(cost.saved_bytes for cost in result.costs) == (D + 1000) * 4


# Counting


def meta(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return make()


def test_a_model_on_the_meta_device_is_counted_like_a_real_one() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    def make() -> nn.Module:
        sizes = {"vocab_size": 61, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}
        return GPT2LMHeadModel(GPT2Config(use_cache=False, **sizes))

    ids = torch.ones(2, 8, dtype=torch.long)
    on_meta = costed(captured(meta(make), ids), None)
    real = costed(captured(make(), ids))
    assert on_meta.origin == "counted"
    assert on_meta.costs == real.costs
    assert on_meta.seconds > 0


def test_a_model_on_the_meta_device_cannot_be_measured() -> None:
    capture = captured(meta(lambda: blocks(2)), torch.ones(4, D))
    with pytest.raises(PipecompileError, match=r"meta device.*costs='count'"):
        costed(capture, "measure")


def test_seconds_are_counted_from_arithmetic_and_memory() -> None:
    model = nn.Linear(256, 256, bias=False)
    capture = captured(model, torch.ones(64, 256))
    flops = 2 * 64 * 256 * 256
    (slow,) = cost_of(costed(capture, roofline=Roofline(flops=1e6, bandwidth=1e12, launch=0.0)), "linear")
    assert slow.forward == pytest.approx(flops / 1e6)
    assert slow.backward == pytest.approx(flops / 1e6)  # the weight's gradient: the input wants none
    (heavy,) = cost_of(costed(capture, roofline=Roofline(flops=1e15, bandwidth=1e6, launch=0.0)), "linear")
    assert heavy.forward == pytest.approx(4 * (64 * 256 + 256 * 256 + 64 * 256) / 1e6)


def test_a_view_takes_no_time() -> None:
    class Views(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.transpose(0, 1)[1:].unsqueeze(0).exp()

    result = costed(captured(Views(), torch.ones(4, D)))
    assert [cost.forward > 0 for cost in result.costs] == [False, False, False, False, True]


def test_more_work_costs_more() -> None:
    wide, narrow = (
        sum(c.forward for c in cost_of(costed(captured(nn.Linear(n, n), torch.ones(512, n))), "linear"))
        for n in (4096, 512)
    )
    assert wide > 8 * narrow


def test_every_node_has_a_cost() -> None:
    for name in ("gpt2", "two_towers"):
        result = costed(captured_of(name))
        assert len(result.costs) == len(result.graph)
        assert CostedGraph.from_json(result.to_json()) == result


def test_a_node_that_cannot_run_says_where() -> None:
    capture = captured(nn.Sequential(nn.Linear(D, D), nn.Linear(D, D)), torch.ones(4, D))
    (name,) = capture.call.tensors
    capture.call.tensors[name] = torch.ones(4, D + 1)  # type: ignore[index]
    with pytest.raises(PipecompileError, match=r"module '0', .*cannot run a microbatch"):
        costed(capture)
