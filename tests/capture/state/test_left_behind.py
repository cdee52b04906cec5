"""What a forward leaves behind is as the unsplit model leaves it: tensors with gradients, containers, tables.

Each case is a block with a forward of its own in the middle of a model. After each of several calls the loss, every
gradient by name and what was left are held to the unsplit model's.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from queue import SimpleQueue
from threading import Thread
from types import SimpleNamespace
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pipecompile
from pipecompile.capture.state.iterators import Advanced
from pipecompile.errors import CaptureError

D = 6
TABLES: dict[Any, Tensor] = {}
BY_MODULE: WeakKeyDictionary[nn.Module, Tensor] = WeakKeyDictionary()
STATISTICS: list[Tensor] = []
COUNTS: dict[str, int] = {}
LAST: Any = None
STEPS = 0


class Sink:
    """An object at module level that collects."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []
        self.total: Any = 0.0


SINK = Sink()


class Block(nn.Module):
    shared: dict[str, Any] = {}  # noqa: RUF012
    latest: Any = None

    def __init__(self, body: Callable[..., Tensor], **attributes: Any) -> None:
        super().__init__()
        self.lin = nn.Linear(D, D)
        self.body = body
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, torch.tanh(self.lin(x)))


class Model(nn.Module):
    def __init__(self, body: Callable[..., Tensor], make: Callable[[], dict[str, Any]]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(D, D), nn.Linear(D, D)
        self.blocks = nn.ModuleList([Block(body, **make()) for _ in range(2)])
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x)


Look = Callable[[Block], Any]


def _aux(self: Any, h: Tensor) -> Tensor:
    self.aux = (h**2).mean()
    return h


def _detached(self: Any, h: Tensor) -> Tensor:
    self.seen = h.detach().mean(0)
    return h


def _rows(self: Any, h: Tensor) -> Tensor:
    self.attention = h.softmax(-1)
    return h * self.attention


def _deviation(self: Any, h: Tensor) -> Tensor:
    self.spread = h.std()  # over all rows: no sum of the microbatches' own
    return h


def _list(self: Any, h: Tensor) -> Tensor:
    self.losses.append(h.mean())
    return h


def _new_list(self: Any, h: Tensor) -> Tensor:
    self.losses = []
    self.losses.append(h.mean())
    self.losses += [(h**2).mean()]
    return h


def _cleared(self: Any, h: Tensor) -> Tensor:
    self.losses.clear()
    self.losses.extend([h.mean(), h.sum()])
    self.total = sum(self.losses)
    return h


def _sliced(self: Any, h: Tensor) -> Tensor:
    self.losses[:] = [h.mean()]
    return h


def _first_of_list(self: Any, h: Tensor) -> Tensor:
    self.losses[0] = h.mean()
    return h


def _bounded(self: Any, h: Tensor) -> Tensor:
    self.recent.append(h.mean())
    if len(self.recent) > 2:
        self.recent.pop(0)
    return h


def _dict(self: Any, h: Tensor) -> Tensor:
    self.cache["h"] = h
    self.cache.update(mean=h.mean(), sizes=(h.shape[0], h.shape[-1]))
    return h


def _default_dict(self: Any, h: Tensor) -> Tensor:
    self.logs["h"].append(h.mean())
    self.logs["n"].append(h.shape[0])
    return h


def _nested(self: Any, h: Tensor) -> Tensor:
    self.state["layers"].append({"mean": h.mean(), "deep": (h.sum(-1), [h.detach()])})
    return h


def _deque(self: Any, h: Tensor) -> Tensor:
    self.recent.append(h.mean())
    return h


class Result(NamedTuple):
    mean: Tensor
    rows: int


@dataclass
class Record:
    loss: Tensor
    parts: list[Tensor] = field(default_factory=list)


def _records(self: Any, h: Tensor) -> Tensor:
    self.result = Result(h.mean(), h.shape[0])
    self.record = Record(h.mean(), [h])
    self.namespace = SimpleNamespace(loss=h.sum())
    return h


def _shared_list(self: Any, h: Tensor) -> Tensor:
    self.a = self.b = [h.mean()]
    self.a.append(h.sum())
    return h


def _held_object(self: Any, h: Tensor) -> Tensor:
    self.sink.losses.append(h.mean())
    self.sink.total = h.sum()
    return h


def _global_list(self: Any, h: Tensor) -> Tensor:
    STATISTICS.append(h.mean())
    return h


def _global_object(self: Any, h: Tensor) -> Tensor:
    SINK.losses.append(h.mean())
    return h


def _global_name(self: Any, h: Tensor) -> Tensor:
    global LAST, STEPS
    LAST = h.mean()
    STEPS += 1
    return h


def _class_attribute(self: Any, h: Tensor) -> Tensor:
    Block.latest = h.mean()
    Block.shared["h"] = h.sum()
    return h


def _class_list(self: Any, h: Tensor) -> Tensor:
    self.shared.setdefault("all", []).append(h.mean())
    return h


def _parameter(self: Any, h: Tensor) -> Tensor:
    self.used = self.lin.weight
    self.input = h
    return h * self.used.sum()


def _conditional(self: Any, h: Tensor) -> Tensor:
    if self.training:
        self.aux = h.mean()
    return h


def _load_balancing(self: Any, h: Tensor) -> Tensor:
    """A mixture of experts in the manner of Switch Transformers."""
    gates = (h @ self.lin.weight).softmax(-1)
    chosen = F.one_hot(gates.argmax(-1), D).to(h.dtype)
    self.l_aux = (gates.mean((0, 1)) * chosen.mean((0, 1))).sum() * D
    self.z_loss = torch.logsumexp(h, -1).square().mean()
    return h * gates


def _deleted(self: Any, h: Tensor) -> Tensor:
    self.temporary = h.mean(-1, keepdim=True)
    h = h + self.temporary
    del self.temporary
    return h


CASES: dict[str, tuple[Callable[..., Tensor], Callable[[], dict[str, Any]], Look]] = {
    "attribute": (_aux, dict, lambda m: m.aux),
    "detached": (_detached, dict, lambda m: m.seen),
    "rows": (_rows, dict, lambda m: m.attention),
    "over all rows": (_deviation, dict, lambda m: m.spread),
    "list": (_list, lambda: {"losses": []}, lambda m: m.losses),
    "new list": (_new_list, dict, lambda m: m.losses),
    "cleared list": (_cleared, lambda: {"losses": []}, lambda m: m.losses),
    "sliced list": (_sliced, lambda: {"losses": [1]}, lambda m: m.losses),
    "item of a list": (_first_of_list, lambda: {"losses": [None, 3]}, lambda m: m.losses),
    "bounded list": (_bounded, lambda: {"recent": []}, lambda m: m.recent),
    "dict": (_dict, lambda: {"cache": {"other": 1}}, lambda m: m.cache),
    "ordered dict": (_dict, lambda: {"cache": OrderedDict(h=None)}, lambda m: m.cache),
    "default dict": (_default_dict, lambda: {"logs": defaultdict(list)}, lambda m: m.logs),
    "nested": (_nested, lambda: {"state": {"layers": []}}, lambda m: m.state),
    "deque": (_deque, lambda: {"recent": deque(maxlen=2)}, lambda m: m.recent),
    "records": (_records, dict, lambda m: [m.result, m.record, m.namespace]),
    "shared list": (_shared_list, dict, lambda m: [m.a, m.b, m.a is m.b]),
    "held object": (_held_object, lambda: {"sink": Sink()}, lambda m: [m.sink.losses, m.sink.total]),
    "global list": (_global_list, dict, lambda m: STATISTICS),
    "global object": (_global_object, dict, lambda m: SINK.losses),
    "global name": (_global_name, dict, lambda m: [LAST, STEPS]),
    "class attribute": (_class_attribute, dict, lambda m: [Block.latest, Block.shared]),
    "list in a class's dict": (_class_list, dict, lambda m: Block.shared),
    "parameter and input": (_parameter, dict, lambda m: [m.used, m.input]),
    "conditional": (_conditional, dict, lambda m: m.aux),
    "load balancing": (_load_balancing, dict, lambda m: [m.l_aux, m.z_loss]),
    "deleted": (_deleted, dict, lambda m: hasattr(m, "temporary")),
}


def _forget() -> None:
    """What the cases leave outside of models."""
    global LAST, STEPS
    for holder in (TABLES, STATISTICS, COUNTS, SINK.losses, Block.shared):
        holder.clear()
    Block.latest, LAST, STEPS, SINK.total = None, None, 0, 0.0


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in a value, wherever they are."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = [*value.values()]
    elif hasattr(value, "__dict__") and not isinstance(value, type):
        value = [*vars(value).values()]
    return [t for item in value for t in tensors_in(item)] if isinstance(value, list | tuple | deque | set) else []


def plain(value: Any) -> Any:
    """The value with the shape, type and need of a gradient of each tensor in its place."""
    if isinstance(value, Tensor):
        return (type(value), value.shape, value.dtype, value.requires_grad)
    if isinstance(value, dict):
        return (type(value), [(key, plain(item)) for key, item in value.items()])
    if isinstance(value, list | tuple | deque):
        return (type(value), [*map(plain, value)])
    return (type(value), plain(vars(value))) if hasattr(value, "__dict__") else value


@dataclass
class Step:
    loss: Tensor
    gradients: dict[str, Tensor | None]
    left: Any
    values: list[Tensor]


def peek(look: Look, block: Any) -> Any:
    """What there is before a first call has left it."""
    try:
        return look(block)
    except AttributeError:
        return None


def run(call: Callable[[Tensor], Tensor], model: Model, look: Look, x: Tensor) -> Step:
    """One step whose loss includes all that was left with a gradient by this call."""
    model.zero_grad()
    before = [t for block in model.blocks for t in tensors_in(peek(look, block))]
    out = call(x)
    loss = out.square().mean()
    left = [look(block) for block in model.blocks]
    new = [t for t in tensors_in(left) if t.requires_grad and not any(t is old for old in before)]
    loss = loss + sum((t.square().sum() * (i + 1) for i, t in enumerate(new)), torch.zeros_like(loss))
    loss.backward()
    gradients = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    return Step(loss.detach(), gradients, plain(left), [t.detach().clone() for t in tensors_in(left)])


def inputs(seed: int, rows: int = 4, length: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, length, D, generator=generator, dtype=torch.float64)


def same(mine: Step, other: Step) -> None:
    torch.testing.assert_close(mine.loss, other.loss)
    torch.testing.assert_close(mine.gradients, other.gradients)
    assert mine.left == other.left
    torch.testing.assert_close(mine.values, other.values)


def follow(
    body: Callable[..., Tensor],
    make: Callable[[], dict[str, Any]],
    look: Look,
    stages: int,
    microbatches: int,
    batches: list[Tensor] | None = None,
) -> Any:
    """Holds several calls of a pipeline to those of the unsplit model."""
    batches = [inputs(seed) for seed in range(4)] if batches is None else batches
    _forget()
    expected = [run(model, model, look, x) for model in [Model(body, make)] for x in batches]
    _forget()
    model = Model(body, make)
    pipe = pipecompile.compile(model, ["cpu"] * stages, microbatches=microbatches, costs="count")
    for x, step in zip(batches, expected, strict=True):
        same(run(pipe, model, look, x), step)
    return pipe


@pytest.mark.parametrize(("stages", "microbatches"), [(2, 1), (3, 4)])
@pytest.mark.parametrize(("body", "make", "look"), CASES.values(), ids=CASES)
def test_what_is_left_is_what_the_unsplit_model_leaves(
    body: Callable[..., Tensor], make: Callable[[], dict[str, Any]], look: Look, stages: int, microbatches: int
) -> None:
    follow(body, make, look, stages, microbatches)


# Tables that one call leaves for the next


def _global_table(self: Any, h: Tensor) -> Tensor:
    length = h.shape[1]
    if length not in TABLES:
        TABLES[length] = torch.arange(length, dtype=h.dtype)
    return h + TABLES[length][:, None]


def _rotary(self: Any, h: Tensor) -> Tensor:
    length = h.shape[1]
    if length > self.longest:
        self.longest = length
        angles = torch.outer(torch.arange(length, dtype=h.dtype), torch.arange(D, dtype=h.dtype) / D)
        self.cos, self.sin = angles.cos(), angles.sin()
    return h * self.cos[:length] + h.flip(-1) * self.sin[:length]


def _registered(self: Any, h: Tensor) -> Tensor:
    length = h.shape[1]
    if not hasattr(self, "table") or self.table.shape[0] < length:
        self.register_buffer("table", torch.arange(length * 1.0, dtype=h.dtype), persistent=False)
    return h + self.table[:length, None]


def _by_module(self: Any, h: Tensor) -> Tensor:
    if self not in BY_MODULE:
        BY_MODULE[self] = torch.arange(D, dtype=h.dtype)
    return h * BY_MODULE[self]


def _default_argument(self: Any, h: Tensor, tables: dict[int, Tensor] = {}) -> Tensor:  # noqa: B006
    length = h.shape[1]
    if length not in tables:
        tables[length] = torch.arange(length, dtype=h.dtype)
    return h + tables[length][:, None]


def _function_attribute(self: Any, h: Tensor) -> Tensor:
    if not hasattr(_function_attribute, "table"):
        _function_attribute.table = torch.arange(D, dtype=h.dtype)  # type: ignore[attr-defined]
    table: Tensor = _function_attribute.table  # type: ignore[attr-defined]
    return h * table


def _forget_tables() -> None:
    TABLES.clear()
    BY_MODULE.clear()
    _default_argument.__defaults__[0].clear()  # type: ignore[index]
    vars(_function_attribute).clear()


NEXT: dict[str, tuple[Callable[..., Tensor], Callable[[], dict[str, Any]], Look]] = {
    "global": (_global_table, dict, lambda m: TABLES),
    "rotary": (_rotary, lambda: {"longest": 0}, lambda m: [m.cos, m.sin, m.longest]),
    "registered": (_registered, dict, lambda m: [m.table, m._non_persistent_buffers_set, [*m.state_dict()]]),
    "by module": (_by_module, dict, lambda m: BY_MODULE.get(m)),
    "default argument": (_default_argument, dict, lambda m: _default_argument.__defaults__),
    "function": (_function_attribute, dict, lambda m: [*vars(_function_attribute).values()]),
}


@pytest.mark.parametrize("microbatches", [1, 2])
@pytest.mark.parametrize(("body", "make", "look"), NEXT.values(), ids=NEXT)
def test_a_table_that_a_call_leaves_is_read_by_the_next(
    body: Callable[..., Tensor], make: Callable[[], dict[str, Any]], look: Look, microbatches: int
) -> None:
    batches = [inputs(0), inputs(1), inputs(2, length=5), inputs(3)]
    _forget_tables()
    expected = [run(model, model, look, x) for model in [Model(body, make)] for x in batches]
    _forget_tables()
    model = Model(body, make)
    pipe = pipecompile.compile(model, ["cpu"] * 2, microbatches=microbatches, costs="count")
    for x, step in zip(batches, expected, strict=True):
        same(run(pipe, model, look, x), step)
    captures = pipe.pipeline.captures
    run(pipe, model, look, batches[-1])
    assert pipe.pipeline.captures == captures
    _forget_tables()


def _notes_the_size(self: Any, h: Tensor) -> Tensor:
    self.size = 1
    if self.asked:
        self.size = h.shape[1]
    return h


def test_an_attribute_set_to_the_value_that_it_has_is_set_again_once_it_has_another() -> None:
    model = Model(_notes_the_size, lambda: {"size": 1, "asked": False})
    pipe = pipecompile.compile(model, ["cpu"] * 2, costs="count")
    pipe(inputs(0)).sum().backward()
    assert [block.size for block in model.blocks] == [1, 1]
    for block in model.blocks:
        block.size = 9
    pipe(inputs(1)).sum().backward()
    assert [block.size for block in model.blocks] == [1, 1]


def _notes_the_size(self: Any, h: Tensor) -> Tensor:
    self.size = 1
    return h


def test_an_attribute_that_another_module_sets_under_the_same_name_is_not_guarded() -> None:
    model = nn.Sequential(Model(_notes_the_size, lambda: {"size": 1}), nn.Linear(D, D)).double()
    model[1].size = 1
    pipe = pipecompile.compile(model, ["cpu"] * 2, costs="count")
    pipe(inputs(0)).sum().backward()
    model[1].size = 9
    pipe(inputs(1)).sum().backward()
    assert len(pipe.pipeline.report.captures) == 1
    assert model[1].size == 9


@pytest.mark.parametrize("body", [_global_table, _list, _by_module, _function_attribute, _default_argument])
def test_no_fake_tensor_is_left_by_a_trace_that_fails(body: Callable[..., Tensor]) -> None:
    def failing(self: Any, h: Tensor) -> Tensor:
        body(self, h)
        return h @ h @ h @ h

    _forget_tables()
    model = Model(failing, lambda: {"losses": []})
    pipe = pipecompile.compile(model, ["cpu"] * 2, costs="count")
    with pytest.raises(CaptureError):
        pipe(inputs(0))
    left = [TABLES, [*BY_MODULE.values()], _default_argument.__defaults__, vars(_function_attribute)]
    assert not tensors_in([*left, *(block.losses for block in model.blocks)])


@pytest.mark.parametrize("make", [lambda: itertools.cycle([1.0, 2.0]), itertools.count, lambda: (i for i in (1, 2))])
def test_an_iterator_that_forward_advances_is_refused_with_the_remedy(make: Callable[[], Any]) -> None:
    model = Model(lambda self, h: h * next(self.turns), lambda: {"turns": make()})
    first = [next(make())] * len(model.blocks)
    pipe = pipecompile.compile(model, ["cpu"] * 2, costs="count")
    with pytest.raises(CaptureError, match=r"test_left_behind.*turns, an iterator .*; count in an attribute"):
        pipe(inputs(0))
    assert [next(block.turns) for block in model.blocks] == first


def test_another_thread_may_advance_an_iterator_meanwhile() -> None:
    """As one that loads batches does."""
    seen = SimpleQueue[int]()

    def body(self: Any, h: Tensor) -> Tensor:
        thread = Thread(target=lambda: seen.put(next(self.turns)))
        thread.start()
        thread.join()
        return h * 2

    model = Model(body, lambda: {"turns": itertools.count()})
    pipe = pipecompile.compile(model, ["cpu"] * 2, costs="count", verify="never")
    pipe.pipeline.prepare(inputs(0))
    assert seen.get_nowait() == 0
    assert not isinstance(model.blocks[0].turns, Advanced)


def test_state_that_goes_from_call_to_call_is_refused_with_the_remedy() -> None:
    def body(self: Any, h: Tensor) -> Tensor:
        self.membrane = (0.9 * self.membrane + h).detach()
        return h + self.membrane

    pipe = pipecompile.compile(Model(body, lambda: {"membrane": torch.zeros(D)}), ["cpu"] * 2, costs="count")
    with pytest.raises(CaptureError, match="register_buffer"):
        pipe(inputs(0))


def _counts_calls(h: Tensor, seen: list[int] = [0]) -> Tensor:  # noqa: B006
    seen[0] += 1
    return h * seen[0]


def test_a_number_that_a_forward_counts_in_a_default_is_refused_with_the_place() -> None:
    model = Model(lambda self, h: _counts_calls(h), dict)
    pipe = pipecompile.compile(model, ["cpu"] * 2, costs="count")
    with pytest.raises(CaptureError, match=r"the defaults of _counts_calls changed; .* keep it in a buffer"):
        pipe(inputs(0))
    assert _counts_calls.__defaults__ == ([0],)


def test_gradients_from_one_call_into_the_next_are_refused() -> None:
    def body(self: Any, h: Tensor) -> Tensor:
        self.total = self.total + h.mean()
        return h

    pipe = pipecompile.compile(Model(body, lambda: {"total": 0.0}), ["cpu"] * 2, costs="count")
    pipe(inputs(0))
    with pytest.raises(CaptureError, match="detach"):
        pipe(inputs(0))


class Whole(nn.Module):
    """A module that is kept whole."""

    def __init__(self, kind: str, asks: bool) -> None:
        super().__init__()
        self.lin, self.kind, self.asks = nn.Linear(D, D), kind, asks
        self.losses: list[Any] = []

    def forward(self, h: Tensor) -> Tensor:
        h = self.lin(h)
        if self.asks and (h.sum(-1) > 1e9).any():
            return h
        if self.kind == "set":
            self.aux = h.mean()
        else:
            self.losses.append(h.mean() if self.kind == "list" else 1)
        return h


@pytest.mark.parametrize("asks", [True, False])
@pytest.mark.parametrize("kind", ["set", "list", "number"])
def test_what_a_module_kept_whole_leaves_is_refused(kind: str, asks: bool) -> None:
    model = Model(lambda self, h: self.whole(h), lambda: {"whole": Whole(kind, asks)})
    leaves = ["blocks.0.whole", "blocks.1.whole"]
    pipe = pipecompile.compile(model, ["cpu"] * 2, costs="count", leaf_modules=leaves)
    with pytest.raises(CaptureError, match=r"kept whole.*return "):
        pipe(inputs(0))
