"""Stages: what they own, what they say, what crosses between them, and that each runs on its own device.

No second device is needed for the last: stages written for two devices of a kind that exists in name only run on fake
tensors, which raise an error where a tensor of one device meets a tensor of another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import cache
from multiprocessing import get_context
from typing import Any

import pytest
import torch
from idioms import libraries
from models import MODELS
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from toys import D, blocks

from pipecompile.capture import Captured, capture, read_call, summarize
from pipecompile.errors import PlanError
from pipecompile.ir.cluster import Cluster
from pipecompile.ir.graph import Graph
from pipecompile.ir.plan import Plan, members
from pipecompile.partition import partition
from pipecompile.profile import profile
from pipecompile.runtime.split import Stage, split

CPU = torch.device("cpu")


def prepared(model: nn.Module, *args: Any, **kwargs: Any) -> tuple[Captured, Graph]:
    captured = capture(model, read_call(model.forward, args, kwargs))
    return captured, summarize(captured)


def planned(captured: Captured, graph: Graph, stages: int) -> Plan:
    return partition(profile(captured, graph, "count"), stages, Cluster.of(["cpu"] * stages))


def split_in(
    captured: Captured, graph: Graph, stages: int, devices: Sequence[torch.device] | None = None
) -> tuple[Plan, tuple[Stage, ...]]:
    plan = planned(captured, graph, stages)
    return plan, split(captured, graph, plan, devices or [CPU] * stages)


@cache
def known(name: str) -> tuple[Captured, Graph]:
    args, kwargs = MODELS[name].inputs(4, MODELS[name].lengths[0])
    return prepared(MODELS[name].build(), *args, **kwargs)


@cache
def of(name: str, stages: int) -> tuple[Captured, Graph, Plan, tuple[Stage, ...]]:
    return *known(name), *split_in(*known(name), stages)


def by_hand(captured: Captured, graph: Graph, first_of: Sequence[str]) -> tuple[Plan, tuple[Stage, ...]]:
    """A new stage begins at each node with one of these paths."""
    stage, stages = 0, []
    for node in graph.nodes:
        if stage < len(first_of) and node.path.startswith(first_of[stage]):
            stage += 1
        stages.append(stage)
    plan = Plan.of(graph, stages)
    return plan, split(captured, graph, plan, [CPU] * plan.num_stages)


def run(stages: Sequence[Stage], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The stages one after the other; every value that was returned, by name."""
    values: dict[str, Tensor] = dict(inputs)
    for stage in stages:
        received = [values[name] for names in stage.receives.values() for name in names]
        returned = stage.module(*(inputs[name] for name in stage.inputs), *received)
        values.update(zip(stage.returns, returned, strict=True))
    return values


SAMPLE = ["gpt2", "unet", "two_towers", "tied", "buffers_in_place", "no_grad", "sizes"]


@pytest.mark.parametrize("name", SAMPLE)
def test_stages_own_the_models_parameters_under_their_own_names(name: str) -> None:
    captured, graph, _, stages = of(name, 3)
    tensors = dict(captured.model.named_parameters(remove_duplicate=False))
    owned = [(n, p) for stage in stages for n, p in stage.module.named_parameters()]
    assert owned
    assert all(tensors[n] is p for n, p in owned)
    assert {id(p) for _, p in owned} == {id(tensors[p.name]) for p in graph.parameters}


def test_a_parameter_that_is_not_tied_belongs_to_one_stage() -> None:
    _, graph, plan, stages = of("gpt2", 3)
    names = [name for stage in stages for name, _ in stage.module.named_parameters()]
    twice = {name for name in names if names.count(name) > 1}
    assert twice == {tied.parameter for tied in plan.tied}
    assert set(names) == {parameter.name for parameter in graph.parameters}


@pytest.mark.parametrize("name", SAMPLE)
def test_stages_one_after_the_other_compute_the_model(name: str) -> None:
    captured, _, _, stages = of(name, 3)
    values = run(stages, dict(captured.call.tensors))
    args, kwargs = captured.call.rebuild(captured.call.tensors)
    expected = [t for t in torch.utils._pytree.tree_leaves(captured.model(*args, **kwargs)) if isinstance(t, Tensor)]
    got = [values[output.node] for output in captured.outputs if output.node is not None]
    assert got
    for tensor, same in zip(got, expected, strict=True):
        torch.testing.assert_close(tensor, same)


# The code


@pytest.mark.parametrize("name", SAMPLE)
def test_the_code_is_python_that_compiles(name: str) -> None:
    _, _, _, stages = of(name, 3)
    for stage in stages:
        compile(stage.code, "stage", "exec")
        assert stage.code.strip().startswith(("def forward(self", "import", "torch"))


def test_the_code_reads_like_the_model() -> None:
    captured, graph = prepared(blocks(2).double(), torch.ones(4, D, dtype=torch.float64))
    _, stages = by_hand(captured, graph, ["1"])
    lines = [line.split(";")[0].strip() for line in stages[1].code.strip().splitlines()]
    assert lines[0].startswith("def forward(self, tanh")
    assert 'getattr(self, "1")' in stages[1].code
    assert [line.split(" = ")[1].split("(")[0] for line in lines if "torch" in line] == [
        "torch._C._nn.linear",
        "torch.tanh",
    ]
    assert lines[-1].startswith("return (tanh")


def test_regions_stand_in_the_code() -> None:
    _, _, _, stages = of("no_grad", 2)
    code = "".join(stage.code for stage in stages)
    entered, left = code.count("enter_region(False"), code.count("exit_region(")
    assert entered == left > 0


def test_a_region_is_left_at_the_end_of_a_stage_and_entered_again_in_the_next() -> None:
    class Quiet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = blocks(2)

        @torch.no_grad()
        def forward(self, x: Tensor) -> Tensor:
            return self.body[1](self.body[0](x))

    captured, graph = prepared(Quiet(), torch.ones(4, D))
    _, stages = by_hand(captured, graph, ["body.1"])
    assert [stage.code.count("enter_region(False") for stage in stages] == [1, 1]
    values = run(stages, dict(captured.call.tensors))
    assert not values[captured.outputs[0].node].requires_grad
    assert torch.is_grad_enabled()


def test_a_stage_knows_where_each_of_its_nodes_comes_from() -> None:
    _, _, _, stages = of("gpt2", 3)
    for stage in stages:
        calls = [node.name for node in stage.module.graph.nodes if node.op == "call_function"]
        known = [name for name in calls if "region" not in name]
        assert known
        assert all(stage.origins[name].source for name in known)


# What crosses


def test_a_skip_goes_straight_to_the_stage_that_reads_it() -> None:
    captured, graph = known("long_skip")
    plan, stages = by_hand(captured, graph, ["body.1", "body.2", "body.5"])
    assert {(c.source, c.target) for c in plan.channels} == {(0, 1), (1, 2), (2, 3), (0, 3)}
    assert stages[0].sends[1] == stages[0].sends[3] == stages[3].receives[0]
    assert [len(stage.returns) for stage in stages] == [1, 1, 1, 1]


def test_an_input_goes_straight_to_the_stage_that_reads_it() -> None:
    captured, graph = known("long_skip")
    _, stages = by_hand(captured, graph, ["body.1", "body.2"])
    assert [stage.inputs for stage in stages] == [("x",), (), ("late",)]


def test_a_length_that_is_rounded_up_is_computed_by_each_stage() -> None:
    _, graph = prepared(libraries.SegmentsRoundedUp().double(), torch.randn(4, 7, 8, dtype=torch.float64))
    (rounded,) = [node for node in graph.nodes if node.op == "ceil"]
    assert rounded.rematerialized


@pytest.mark.parametrize("name", ["gpt2_padded", "llama", "sizes"])
def test_rematerialized_values_are_computed_by_each_stage_and_never_sent(name: str) -> None:
    _, graph, plan, stages = of(name, 3)
    rematerialized = {node.name for node in graph.nodes if node.rematerialized and node.op != "input"}
    assert rematerialized
    assert not any(rematerialized & set(values) for stage in stages for values in stage.sends.values())
    for stage in stages:
        runs = {node.name for node in stage.module.graph.nodes}
        assert (
            runs & rematerialized == {graph.nodes[i].name for i in members(graph, plan, stage.index)} & rematerialized
        )


def test_masks_and_positions_of_a_language_model_never_cross() -> None:
    _, graph, _, stages = of("gpt2_padded", 3)
    crossing = {value for stage in stages for values in stage.sends.values() for value in values}
    wanted = {node.name for node in graph.nodes if any(spec.requires_grad for spec in node.outputs)}
    assert sum("attention_mask" in stage.inputs for stage in stages) > 1
    assert crossing
    assert crossing <= wanted


def test_a_model_output_is_returned_by_one_stage() -> None:
    for name in ("dict_in_out", "nested_output", "named_tuple_output"):
        captured, _, _, stages = of(name, 3)
        made = [output for stage in stages for output in stage.outputs]
        assert sorted(made) == sorted({output.node for output in captured.outputs if output.node is not None})


@pytest.mark.parametrize("name", ["buffers_in_place", "buffers_rebound", "buffer_read"])
def test_a_written_buffer_is_in_one_stage(name: str) -> None:
    captured, _, _, stages = of(name, 3)
    holders = [n for stage in stages for n, _ in stage.module.named_buffers()]
    assert sorted(holders) == sorted(n for n, _ in captured.model.named_buffers())


def test_a_read_of_a_written_buffer_cannot_be_in_another_stage() -> None:
    class Seen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = blocks(2)
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            h = self.body[0](x) + self.seen
            h = self.body[1](h)
            self.seen.add_(h.detach().mean())
            return h

    with pytest.raises(PlanError, match="must share a stage"):
        by_hand(*prepared(Seen(), torch.ones(4, D)), ["body.1"])


def test_what_is_sent_of_a_buffer_is_not_changed_by_the_next_microbatch() -> None:
    captured, graph = known("buffer_read")
    try:
        _, stages = by_hand(captured, graph, ["body.3"])
    except PlanError:
        return
    inputs = [captured.call.tensors[name] for name in stages[0].inputs]
    sent = stages[0].module(*inputs)
    before = [value.clone() for value in sent]
    stages[0].module(*inputs)
    captured.model.scale.fill_(1)
    assert len(before) > 1
    assert all(torch.equal(value, copy) for value, copy in zip(sent, before, strict=True))


def test_a_buffer_that_nobody_writes_is_in_every_stage_that_reads_it() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = blocks(3)
            self.register_buffer("scale", torch.ones(D))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.body:
                x = block(x) * self.scale
            return x

    captured, graph = prepared(Shared(), torch.ones(4, D))
    _, stages = by_hand(captured, graph, ["body.1", "body.2"])
    assert [list(dict(stage.module.named_buffers())) for stage in stages] == [["scale"]] * 3


# Devices


def fake(tensor: Tensor, device: torch.device) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=device, requires_grad=tensor.requires_grad)


def run_on_fake_devices(captured: Captured, stages: Sequence[Stage]) -> list[list[str]] | str:
    """Runs each stage with all that it reads on its own device; the devices of what it returns, or what went wrong."""
    try:
        return _run_on_fake_devices(captured, stages)
    except RuntimeError as error:
        return str(error)


def _run_on_fake_devices(captured: Captured, stages: Sequence[Stage]) -> list[list[str]]:
    values = dict(captured.call.tensors)
    devices = []
    with FakeTensorMode(allow_non_fake_inputs=False):
        for stage in stages:
            received = [name for names in stage.receives.values() for name in names]
            arguments = [fake(values[name], stage.device) for name in (*stage.inputs, *received)]
            state = {**dict(stage.module.named_parameters()), **dict(stage.module.named_buffers())}
            there = {name: fake(tensor, stage.device) for name, tensor in state.items()}
            returned = functional_call(stage.module, there, tuple(arguments))
            values.update(zip(stage.returns, returned, strict=True))
            devices.append([str(tensor.device) for tensor in returned])
    return devices


@cache
def elsewhere() -> tuple[torch.device, ...]:
    """Two devices that this process has beside the CPU, without memory or kernels."""
    torch.utils.backend_registration._setup_privateuseone_for_python_backend("elsewhere")
    torch.elsewhere.get_rng_state = torch.elsewhere.set_rng_state = lambda *_: torch.empty(0)
    torch._C._set_only_lift_cpu_tensors(True)
    return torch.device("elsewhere:0"), torch.device("elsewhere:1")


def devices_of_model(name: str) -> list[list[str]] | str:
    devices = elsewhere()
    captured, graph = known(name)
    return run_on_fake_devices(captured, split_in(captured, graph, 2, devices)[1])


def devices_of_constants(way: str, written: bool = True) -> list[list[str]] | str:
    devices = elsewhere()
    captured, graph = prepared(Constants(way), torch.ones(4, D))
    plan, stages = by_hand(captured, graph, ["body.1"])
    if not written:
        return run_on_fake_devices(captured, [replace(s, device=d) for s, d in zip(stages, devices, strict=True)])
    return run_on_fake_devices(captured, split(captured, graph, plan, devices))


@pytest.fixture(scope="module")
def apart() -> Iterator[Callable[..., Any]]:
    """Runs a function in a process of its own, because a new kind of device is there for good."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        yield lambda function, *args: pool.submit(function, *args).result()


ON_DEVICES = [
    "gpt2", "llama", "t5", "unet", "sizes", "label_shift", "in_place", "in_place_views",
    "buffers_in_place", "buffers_rebound", "dict_in_out", "options", "no_grad", "custom_functions", "integers",
]  # fmt: skip


@pytest.mark.parametrize("name", ON_DEVICES)
def test_a_stage_written_for_a_device_meets_no_tensor_of_another(name: str, apart: Callable[..., Any]) -> None:
    devices = apart(devices_of_model, name)
    assert isinstance(devices, list), devices
    assert any(devices)
    assert set(devices[0]) <= {"elsewhere:0"}
    assert set(devices[1]) <= {"elsewhere:1"}


class Constants(nn.Module):
    """Makes tensors in every way that a model does."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.body = blocks(2)
        self.way = way
        self.outside = torch.ones(D)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.body:
            x = block(x) + WAYS[self.way](self, x)
        return x


WAYS: dict[str, Any] = {
    "arange": lambda self, x: torch.arange(D),
    "arange on a device": lambda self, x: torch.arange(D, device=x.device),
    "zeros": lambda self, x: torch.zeros(x.shape[0], 1),
    "a tensor": lambda self, x: torch.tensor([1.0] * D),
    "a tensor on a device": lambda self, x: torch.tensor([1.0] * D, device=x.device),
    "like": lambda self, x: torch.ones_like(x),
    "new": lambda self, x: x.new_zeros(D) + x.new_full((D,), 2.0),
    "outside": lambda self, x: self.outside,
    "outside on a device": lambda self, x: self.outside.to(x.device),
    "to another tensor": lambda self, x: torch.eye(D).to(x)[0],
    "type as": lambda self, x: torch.arange(D).type_as(x),
    "by name": lambda self, x: torch.zeros(D, device="cpu"),
    "to a name": lambda self, x: self.outside.to("cpu"),
    "device of a parameter": lambda self, x: torch.full((D,), 2.0, device=self.body[0][0].weight.device),
    "mask": lambda self, x: torch.tril(torch.ones(D, D)).bool()[0],
    "index": lambda self, x: x[:, torch.tensor([0] * D)],
    "device context": lambda self, x: _in_context(x),
    "as tensor": lambda self, x: torch.as_tensor([1.0] * D, device=x.device),
    "where": lambda self, x: torch.where(x > 0, torch.zeros(()), torch.ones(())),
    "linspace": lambda self, x: torch.linspace(0, 1, D, dtype=x.dtype),
    "embedding": lambda self, x: torch.nn.functional.one_hot(torch.arange(D) % 3, D)[0],
    "random": lambda self, x: torch.rand(D) + torch.randn(D, device=x.device),
}


def _in_context(x: Tensor) -> Tensor:
    with x.device:
        return torch.ones(D)


@pytest.mark.parametrize("way", WAYS)
def test_a_tensor_made_in_forward_is_made_on_the_stages_device(way: str, apart: Callable[..., Any]) -> None:
    assert apart(devices_of_constants, way) == [["elsewhere:0"], ["elsewhere:1"]]


def test_a_device_mismatch_would_show(apart: Callable[..., Any]) -> None:
    assert "elsewhere:0 and cpu" in apart(devices_of_constants, "arange on a device", False)


def test_an_autocast_region_is_one_of_the_stages_device() -> None:
    class Low(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = blocks(2)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast(x.device.type, torch.bfloat16):
                return self.body[1](self.body[0](x))

    captured, graph = prepared(Low(), torch.ones(4, D))
    plan, _ = by_hand(captured, graph, ["body.1"])
    stages = split(captured, graph, plan, [torch.device("cuda", 0), CPU])
    assert "(('cuda', 'bfloat16', True, True),)" in stages[0].code
    assert "(('cpu', 'bfloat16', True, True),)" in stages[1].code
