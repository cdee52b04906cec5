"""A model that runs eagerly within ``left_as_before`` leaves no mark, wherever it puts things."""

from __future__ import annotations

import importlib
import random
import sys
import threading
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from functools import cache, wraps
from pathlib import Path
from threading import Event, Thread
from types import SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from tqdm import tqdm

import pipecompile
from pipecompile.capture.state import reachable
from pipecompile.capture.state.module_settings import settings_seen
from pipecompile.capture.state.namespaces import is_foreign
from pipecompile.capture.state.reachable import reach_of
from pipecompile.capture.state.restore import left_as_before

CACHE: dict[int, Tensor] = {}
STATISTICS: list[Tensor] = []
NESTED: dict[str, Any] = {"a": [], "b": {"c": set()}}
BY_MODULE: WeakKeyDictionary[nn.Module, Tensor] = WeakKeyDictionary()
COUNT = 0


class Options:
    total = 0.0


OPTIONS = Options()


class Slots:
    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 1


@cache
def remembered(n: int) -> Tensor:
    return torch.arange(n)


def _count(x: Tensor) -> Tensor:
    global COUNT
    COUNT += 1
    return x


def _note(x: Tensor) -> Tensor:
    CACHE[x.shape[0]] = torch.arange(x.shape[0])
    STATISTICS.append(x.mean())
    NESTED["a"].append(1)
    NESTED["b"]["c"].add(2)
    OPTIONS.total = x.mean()
    Options.total = 3.0
    return x


def _closure() -> Callable[[Tensor], Tensor]:
    seen: list[Tensor] = []
    calls = 0

    def note(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        seen.append(x)
        return x

    note.state = lambda: (calls, list(seen))  # type: ignore[attr-defined]
    return note


def _decorated(function: Callable[..., Any]) -> Callable[..., Any]:
    log: list[str] = []

    @wraps(function)
    def run(*args: Any) -> Any:
        log.append("ran")
        run.calls = len(log)  # type: ignore[attr-defined]
        return function(*args)

    run.log = log  # type: ignore[attr-defined]
    return run


def _with_default(x: Tensor, seen: list[Tensor] = []) -> Tensor:  # noqa: B006
    seen.append(x)
    return x


closure = _closure()


@_decorated
def decorated(x: Tensor) -> Tensor:
    return x


class Model(nn.Module):
    shared: dict[str, Tensor] = {}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(3, 3)
        self.register_buffer("running", torch.zeros(3))
        self.table = torch.zeros(3)
        self.losses: list[Tensor] = []
        self.logs: dict[str, list[Tensor]] = defaultdict(list)
        self.queue: deque[Tensor] = deque(maxlen=2)
        self.ordered: OrderedDict[str, int] = OrderedDict(a=1)
        self.config = SimpleNamespace(inner=SimpleNamespace(last=None, seen=[]))
        self.slots = Slots()
        self.generator = np.random.default_rng(0)
        self.python = random.Random(0)
        self.torchs = torch.Generator().manual_seed(0)
        self.lin.register_forward_hook(self.hook)

    def hook(self, module: nn.Module, args: Any, out: Tensor) -> None:
        self.hooked = out
        self.config.inner.seen.append(out)

    def forward(self, x: Tensor) -> Tensor:
        h = self.lin(x)
        self.running += h.detach().mean(0)
        self.table.add_(1)
        self.losses.append(h.mean())
        self.logs["h"].append(h)
        self.queue.append(h)
        self.ordered.move_to_end("a")
        self.ordered["b"] = 2
        self.config.inner.last = h
        self.slots.value += 1
        self.register_buffer("late", h.detach(), persistent=False)
        Model.shared["h"] = h
        BY_MODULE[self] = h
        with torch.no_grad():
            self.lin.weight.mul_(1.0)
        noise = self.generator.random() + self.python.random() + random.random() + float(np.random.rand())
        noise = noise + torch.rand((), generator=self.torchs) + torch.rand(())
        _closure_of = closure(h)
        return decorated(_with_default(_note(_count(_closure_of)))) * noise + remembered(3)


def everything(model: Model) -> list[str]:
    """All that the forward changes, in words."""
    return [*map(repr, _state(model))]


def _state(model: Model) -> Iterator[Any]:
    yield {name: id(value) for name, value in vars(model).items()}
    yield sorted(dict(model.named_buffers()))
    yield model.running.tolist()
    yield model.table.tolist()
    yield from map(len, (model.losses, model.logs, model.queue, model._non_persistent_buffers_set))
    yield [*model.ordered.items()]
    yield model.config.inner.last
    yield len(model.config.inner.seen)
    yield model.slots.value
    yield from map(len, (Model.shared, BY_MODULE, CACHE, STATISTICS, NESTED["a"], NESTED["b"]["c"]))
    yield COUNT
    yield vars(OPTIONS)
    yield Options.total
    yield [vars(decorated)["log"], vars(decorated).get("calls")]
    yield closure.state()  # type: ignore[attr-defined]
    yield _with_default.__defaults__
    yield remembered.cache_info().currsize
    yield model.generator.bit_generator.state
    yield model.python.getstate()
    yield model.torchs.get_state().tolist()
    yield torch.get_rng_state().tolist()
    yield random.getstate()
    yield [*map(str, np.random.get_state())]


def test_a_forward_and_backward_leave_everything_as_it_was() -> None:
    model = Model()
    remembered.cache_clear()
    before = everything(model)
    with left_as_before(model):
        model(torch.randn(4, 3)).sum().backward()
        same = [i for i, (a, b) in enumerate(zip(before, everything(model), strict=True)) if a == b]
        assert not same, "the model changes whatever is looked at here"
    assert everything(model) == before


def _failing(model: Model) -> None:
    with left_as_before(model):
        model(torch.randn(4, 3))
        model(torch.randn(4, 5))


def test_everything_is_put_back_after_an_exception() -> None:
    model = Model()
    remembered.cache_clear()
    before = everything(model)
    with pytest.raises(RuntimeError):
        _failing(model)
    assert everything(model) == before


def test_a_loss_beside_the_model_and_tensors_by_name_are_put_back() -> None:
    model, seen = nn.Linear(2, 2), []
    weight = model.weight.detach().clone()

    def loss(out: Tensor) -> Tensor:
        seen.append(out)
        model.weight.data = model.weight.data * 2
        return out.mean()

    with left_as_before(model, [loss], [model.weight]):
        loss(model(torch.ones(1, 2)))
        assert seen
    assert not seen
    assert torch.equal(model.weight, weight)


class Bar:
    """As a progress bar has: a thread that writes to its own attributes."""

    ends = Event()
    thread = Thread(target=ends.wait, daemon=True)


class ShowsProgress(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        for _ in tqdm(range(1), disable=True):
            Bar.thread.name = "at work"
        return self.linear(x)


def test_what_other_threads_write_is_not_state_of_the_model() -> None:
    """tqdm's monitor, a thread, notes the time at which it last looked."""
    Bar.thread.start()
    owners = [owner for owner, _, _ in reach_of(ShowsProgress()).owners]
    Bar.ends.set()
    assert Bar in owners
    assert Bar.thread not in owners
    assert not any(isinstance(owner, type) and issubclass(owner, tqdm) for owner in owners)
    assert not any(isinstance(owner, Thread) for owner in owners)


class Own(threading.local):
    """A local of a thread that has a dict of its own, besides that of the thread."""


class Counts(Thread):
    """A thread that never starts: an object like any other."""


class Counting(nn.Module):
    def __init__(self, counter: Any) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(2, 2), nn.Linear(2, 2)
        self.counter = counter
        self.counter.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.counter.calls += 1
        return self.last(self.first(x).tanh() * self.counter.calls).sum()


@pytest.mark.parametrize("kind", [threading.local, Own, Counts])
def test_an_object_of_threading_that_no_thread_runs_is_state_of_the_model(kind: Callable[[], Any]) -> None:
    torch.manual_seed(0)
    eager = Counting(kind())
    model = Counting(kind())
    model.load_state_dict(eager.state_dict())
    pipe, x = pipecompile.compile(model, ["cpu", "cpu"], microbatches=2, costs="count"), torch.randn(4, 2)
    for _ in range(3):
        torch.testing.assert_close(pipe(x), eager(x))
    assert model.counter.calls == eager.counter.calls == 3


def test_all_who_observe_what_is_set_on_modules_share_one_patch() -> None:
    before, model, seen = nn.Module.__setattr__, nn.Linear(2, 2), list[tuple[str, str]]()
    with settings_seen(lambda owner, name, value: seen.append(("one", name))):
        patch = nn.Module.__setattr__
        with settings_seen(lambda owner, name, value: seen.append(("two", name))):
            assert nn.Module.__setattr__ is patch
            model.epoch = 1
        model.step = 2
    model.last = 3
    assert nn.Module.__setattr__ is before
    assert seen == [("one", "epoch"), ("two", "epoch"), ("one", "step")]
    assert (model.epoch, model.step, model.last) == (1, 2, 3)


def test_imported_files_are_examined_when_others_have_come(monkeypatch: pytest.MonkeyPatch) -> None:
    model, examined = nn.Linear(2, 2), list[str | None]()
    monkeypatch.setattr(reachable, "is_foreign", lambda name: examined.append(name) or is_foreign(name))
    known = reach_of(model)
    examined.clear()
    assert reach_of(model, known=known) is known
    assert not examined
    monkeypatch.setitem(sys.modules, "json.imported_between", sys)
    assert reach_of(model, known=known) is known
    assert "json.imported_between" in examined


def test_what_was_reached_holds_until_a_file_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(2, 2)
    known = reach_of(model)
    assert reach_of(model, known=known) is known
    (tmp_path / "imported_between.py").write_text("calls = 0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "imported_between", raising=False)
    importlib.import_module("imported_between")
    try:
        assert reach_of(model, known=known) is not known
    finally:
        del sys.modules["imported_between"]
