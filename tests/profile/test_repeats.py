"""Layers that are alike: only the first ones run in a profile, and all have the costs that they would have had."""

from __future__ import annotations

import gc
import importlib
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pipecompile.capture import capture, read_call, summarize
from pipecompile.ir.graph import CostedGraph
from pipecompile.ops import phases
from pipecompile.profile import profile
from pipecompile.profile.meters import How

repeats = importlib.import_module("pipecompile.profile.repeats")
LAYERS = 7
ALL = 10**9


class Attention(nn.Module):
    """Views of one tensor, what autograd keeps beside operands and outputs, and outputs in a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.into, self.out = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.into(self.norm(x)).split(8, dim=-1)
        y = F.scaled_dot_product_attention(q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1)).squeeze(1)
        return x + F.dropout(self.out(y), 0.1, self.training)


class Pooled(nn.Module):
    """The largest entries and their places, which index the next layer's."""

    def forward(self, x: Tensor) -> Tensor:
        values, places = x.max(dim=-1, keepdim=True)
        return x.gather(-1, places) * 0.5 + x - values


class InPlace(nn.Module):
    """Writes to what it has computed, through a view."""

    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        y[:, 0] = 0
        return y.relu_() + x


class Running(nn.Module):
    """Writes to buffers, and sets a tensor's bit of conjugation."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(self.norm(x).view(-1, 5, 4, 2))
        return torch.view_as_real(pairs.conj() * 1.0).flatten(2)


class Selected(nn.Module):
    """As many rows as the values say."""

    def forward(self, x: Tensor) -> Tensor:
        return x + x[x[:, 0, 0] > 0].sum()


class Tied(nn.Module):
    """Every second layer has the same weights, and reads one tensor of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        first = x.sigmoid()
        for number in range(2 * LAYERS):
            x = F.gelu(self.linears[number % 2](x)) * first
        return x


class Table(nn.Module):
    """Reads rows of a table at indices of its own, of which another layer's may have more."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.table = nn.Embedding(rows, 8)
        self.register_buffer("places", torch.full((5,), rows - 1))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(repeats.AROUND):
            x = torch.tanh(x)
        return x + self.table(self.places * 1)


def layers_of(kind: type[nn.Module]) -> nn.Module:
    return nn.Sequential(*(kind() for _ in range(LAYERS)), nn.Flatten(), nn.Linear(40, 3))


class Runs(TorchDispatchMode):
    """Counts the runs of an operation."""

    def __init__(self, name: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.name, self.count = name, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += self.name in str(function)
        return function(*args, **(kwargs or {}))


def costed(model: nn.Module, x: Tensor) -> CostedGraph:
    captured = capture(model, read_call(model.forward, (x,), {}))
    return profile(captured, summarize(captured), "measure", torch.device("cpu"), threads=1)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_a_tensor_of_sizes_that_depend_on_data_is_never_a_copy() -> None:
    found = repeats.Repeats(off=True)
    assert all(found.of("key", []) is None for _ in range(50))


@pytest.mark.parametrize("kind", [Attention, Pooled, InPlace, Running, Selected, Tied])
@pytest.mark.parametrize("wants", [True, False])
def test_memory_is_that_of_a_profile_which_runs_all_nodes(
    kind: type[nn.Module], wants: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model, x = layers_of(kind), torch.randn(2, 5, 8, requires_grad=wants)
    few = costed(model, x)
    monkeypatch.setattr(repeats, "TIMES", ALL)
    every = costed(model, x)
    assert few.footprints == every.footprints
    assert few.storages == every.storages
    assert [cost.saved_bytes for cost in few.costs] == [cost.saved_bytes for cost in every.costs]
    timed = [cost.forward > 0 for cost in few.costs]
    assert timed == [cost.forward > 0 for cost in every.costs]
    assert any(timed)


def test_layers_alike_run_no_more_often_than_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    def count(layers: int) -> int:
        model = nn.Sequential(*(Attention() for _ in range(layers)))
        captured = capture(model, read_call(model.forward, (torch.randn(2, 5, 8),), {}))
        with Runs("native_layer_norm.default") as runs:
            profile(captured, summarize(captured), "measure", torch.device("cpu"), threads=1)
        return int(runs.count)

    assert count(8) == count(16) < count(2) + 3 * count(4)
    monkeypatch.setattr(repeats, "TIMES", ALL)
    assert count(8) < count(16)


def test_a_node_in_another_surrounding_runs() -> None:
    found = repeats.Repeats(off=False)
    node = torch.fx.Graph().create_node("call_function", torch.add)
    ones = torch.ones(2)

    def runs(key: str) -> bool:
        if found.of(key, [ones]) is not None:
            return False
        found.add(node, key, [ones], ones + 1, [])
        return True

    assert [runs("a") for _ in range(20)] == [True] * (repeats.AROUND + repeats.TIMES) + [False] * 9
    assert runs("b")  # has never run
    assert [runs("a") for _ in range(3)] == [True] * 3  # has run often, but not after b


def test_the_copy_of_a_value_has_memory_of_its_own_laid_out_alike() -> None:
    torch.manual_seed(0)
    base = torch.randn(4, 6)
    operands = [base, torch.randn(4, 6)]
    graph = torch.fx.Graph()
    node = graph.create_node("call_function", torch.add)
    view, fresh = base[1:3, 2:4], torch.randn(3, 8)[:, 1:5].t()
    found = repeats.Repeats(off=False)
    other = [torch.randn(4, 6), torch.randn(4, 6)]
    for _ in range(repeats.AROUND + repeats.TIMES):
        assert found.of("key", other) is None
    found.add(node, "key", operands, (view, fresh), [operands[1], fresh, torch.randn(5)])
    repeat = found.of("key", other)
    assert repeat is not None
    (seen, copied), saved = repeat.again(other)
    assert torch.equal(seen, other[0][1:3, 2:4])
    assert seen.untyped_storage()._cdata == other[0].untyped_storage()._cdata
    assert torch.equal(copied, fresh)
    assert copied.stride() == fresh.stride()
    assert copied.data_ptr() != fresh.data_ptr()
    assert copied.untyped_storage().nbytes() == fresh.untyped_storage().nbytes()
    assert [tensor.untyped_storage().nbytes() for tensor in saved] == [96, 96, 20]
    assert saved[0] is other[1]
    assert saved[1] is copied
    assert found.of("key", [base, base]) is None  # operands that share memory are another case


def test_nothing_is_held_of_layers_that_are_not_alike() -> None:
    found = repeats.Repeats(off=False)
    node = torch.fx.Graph().create_node("call_function", torch.add)
    for key in map(str, range(50)):
        found.of(key, [])
        found.add(node, key, [], torch.ones(2), [])
    assert not found.found


def test_all_nodes_run_if_one_cannot_run_on_the_values_of_another_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(phases.LOGGER, "info", lambda text, *args: said.append(text % args))
    model = nn.Sequential(*(Table(100) for _ in range(repeats.TIMES + 1)), *(Table(10) for _ in range(2)))
    found = costed(model, torch.randn(2, 5, 8))
    assert [text.partition(":")[0] for text in said] == [
        "all nodes are profiled, since one cannot run on the values of another layer"
    ]
    assert "index out of range" in said[0]
    paired = zip(found.graph.nodes, found.costs, strict=True)
    looked_up = [cost.forward > 0 for node, cost in paired if node.op == "embedding"]
    assert looked_up == [True] * (repeats.TIMES + 3)


@pytest.mark.parametrize("how", ["measure", "count"])
def test_a_profile_leaves_no_tensors(how: How) -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Softmax(-1)) for _ in range(LAYERS)))
    captured = capture(model, read_call(model.forward, (torch.randn(2, 8),), {}))
    graph = summarize(captured)

    def alive() -> list[Tensor]:
        gc.collect()
        return [held for held in gc.get_objects() if type(held) is Tensor]

    profile(captured, graph, how, torch.device("cpu"), threads=1)  # what is remembered for later ones
    before = {id(held): held for held in alive()}  # kept, so that no new tensor takes the address of an old one
    profile(captured, graph, how, torch.device("cpu"), threads=1)
    assert [tuple(held.shape) for held in alive() if id(held) not in before] == []
