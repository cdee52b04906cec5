"""What a forward leaves behind is as the unsplit model leaves it: tensors with gradients, containers, tables.

Each case is a block with a forward of its own in the middle of a model. After each of several calls the loss, every
gradient by name and what was left are held to the unsplit model's.
"""

from __future__ import annotations

import gc
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

import pipecompile

D = 6
TABLES: dict[Any, Tensor] = {}
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
) -> pipecompile.Pipeline:
    """Holds several calls of a pipeline to those of the unsplit model."""
    batches = [inputs(seed) for seed in range(4)] if batches is None else batches
    _forget()
    expected = [run(model, model, look, x) for model in [Model(body, make)] for x in batches]
    _forget()
    model = Model(body, make)
    pipe = pipecompile.compile(model, ["cpu"] * stages, microbatches=microbatches, profile="count")
    for x, step in zip(batches, expected, strict=True):
        same(run(pipe, model, look, x), step)
    return pipe


def surviving_fakes() -> list[str]:
    """What holds fake tensors, beside the nodes of graphs."""
    gc.collect()
    found = []
    for holder in gc.get_objects():
        kind = type(holder)
        if issubclass(kind, dict) and "val" not in holder:
            fakes = sum(type(value) is FakeTensor for value in list(dict.values(holder)))
        elif kind in (list, set, deque):
            fakes = sum(type(value) is FakeTensor for value in list(holder))
        else:
            continue
        if fakes:
            found.append(f"a {kind.__name__} holds {fakes} fakes: {str(holder)[:100]}")
    return found


@pytest.mark.parametrize(("stages", "microbatches"), [(2, 1), (3, 4)])
@pytest.mark.parametrize(("body", "make", "look"), CASES.values(), ids=CASES)
def test_what_is_left_is_what_the_unsplit_model_leaves(
    body: Callable[..., Tensor], make: Callable[[], dict[str, Any]], look: Look, stages: int, microbatches: int
) -> None:
    follow(body, make, look, stages, microbatches)
