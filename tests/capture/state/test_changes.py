"""A change of any kind between two calls: the second call gives what eager gives then, or is refused with a remedy.

Each kind is a generator: it yields a call, makes its change, and yields the call again. Both calls are compared with
the unsplit model, which is the same object: loss, every gradient by name, buffers, in float64.
"""

from __future__ import annotations

import contextlib
import contextvars
import copy
import ctypes
import enum
import functools
import gc
import logging
import multiprocessing
import os
import sys
import threading
import types
import warnings
import weakref
from array import array
from collections import UserDict, UserList
from collections.abc import Callable, Iterator
from configparser import ConfigParser
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from long import LONG
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrizations, parametrize, prune

import pipecompile
from pipecompile.capture.state import raw_contents, raw_data
from pipecompile.errors import PipecompileError

D = 6


@dataclass
class Step:
    """One call of a model."""

    model: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    around: Callable[[], Any] = contextlib.nullcontext
    refused: bool = False  # must be refused, with a remedy
    may_be_refused: bool = False
    outputs_only: bool = False  # nothing to differentiate
    forget: bool = False  # whether the model's buffers before and after are compared


Kind = Callable[[], Iterator[Step]]
KINDS: dict[str, Kind] = {}
SAME: set[str] = set()  # kinds whose change leaves the numbers as they are


def kind(function: Kind) -> Kind:
    KINDS[function.__name__] = function
    return function


def kind_without_effect(function: Kind) -> Kind:
    SAME.add(function.__name__)
    return kind(function)


# The models


def rows(count: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(count, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Block(nn.Module):
    """A linear layer and what a function makes of it."""

    factor = 1.5

    def __init__(self, function: Callable[..., Tensor] | None = None) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D)
        self.function = function
        self.scale = 1.0
        self.register_buffer("shift", torch.full((D,), 0.25))

    @property
    def gain(self) -> float:
        return 1.0

    def mix(self, h: Tensor) -> Tensor:
        return torch.tanh(h)

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x) * self.scale * self.gain * type(self).factor + self.shift
        h = self.mix(h)
        return h if self.function is None else self.function(self, h)


class Net(nn.Module):
    """Three blocks and a loss."""

    def __init__(self, function: Callable[..., Tensor] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = Block(), Block(function), Block()
        self.double()

    def forward(self, x: Tensor, flag: Any = None, power: int = 2) -> Tensor:
        h = self.third(self.second(self.first(x)))
        if flag is not None:
            h = h * (2.0 if flag == "double" or flag is True else 3.0)
        return h.pow(power).mean()


def step(model: nn.Module, **options: Any) -> Step:
    return Step(model, (rows(),), **options)


@contextlib.contextmanager
def exchanged(owner: Any, name: str, value: Any) -> Iterator[None]:
    missing = object()
    before = vars(owner).get(name, missing)
    setattr(owner, name, value)
    try:
        yield
    finally:
        delattr(owner, name) if before is missing else setattr(owner, name, before)


@contextlib.contextmanager
def setting(set_to: Callable[[Any], Any], now: Any, before: Any) -> Iterator[None]:
    set_to(now)
    try:
        yield
    finally:
        set_to(before)


# Code: forwards, methods, functions


@kind
def forward_of_a_module() -> Iterator[Step]:
    model = Net()
    yield step(model)
    linear = model.second.linear
    linear.forward = lambda x: F.linear(x, linear.weight) * 3.0
    yield step(model)


@kind
def forward_of_the_model() -> Iterator[Step]:
    model = Net()
    yield step(model)
    model.forward = lambda x: model.second(model.first(x)).square().mean()
    yield step(model)


@kind
def method_on_a_module() -> Iterator[Step]:
    model = Net()
    yield step(model)
    model.second.mix = types.MethodType(lambda self, h: torch.sigmoid(h) * 2, model.second)
    yield step(model)


@kind
def method_on_a_class() -> Iterator[Step]:
    model = Net()
    yield step(model)
    with exchanged(Block, "mix", lambda self, h: torch.sigmoid(h) * 2):
        yield step(model)


@kind
def forward_on_a_class() -> Iterator[Step]:
    model = Net()
    yield step(model)
    with exchanged(Block, "forward", lambda self, x: self.linear(x) * 3):
        yield step(model)


@kind
def method_of_a_base_class() -> Iterator[Step]:
    class Base(nn.Module):
        def finish(self, h: Tensor) -> Tensor:
            return h.square().mean()

    class Model(Base):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D)).double()

        def forward(self, x: Tensor) -> Tensor:
            return super().finish(self.net(x))

    model = Model()
    yield step(model)
    Base.finish = lambda self, h: h.abs().mean()  # type: ignore[method-assign]
    yield step(model)


@kind
def torchs_linear_function() -> Iterator[Step]:
    model = Net()
    yield step(model)
    linear = F.linear
    with exchanged(F, "linear", lambda x, w, b=None: linear(x, w, b) * 2.0):
        yield step(model)


@kind
def torchs_linear_module() -> Iterator[Step]:
    model = Net()
    yield step(model)
    with exchanged(nn.Linear, "forward", lambda self, x: F.linear(x, self.weight) * 0.5):
        yield step(model)


@kind
def torchs_tanh() -> Iterator[Step]:
    model = Net()
    yield step(model)
    with exchanged(torch, "tanh", torch.sigmoid):
        yield step(model)


@kind
def method_of_tensors() -> Iterator[Step]:
    model = Net(lambda self, h: h.relu())
    yield step(model)
    with exchanged(Tensor, "relu", lambda self: self * 0.5):
        yield step(model)


@kind
def code_of_a_function() -> Iterator[Step]:
    def helper(h: Tensor) -> Tensor:
        return h * 2.0

    def other(h: Tensor) -> Tensor:
        return h * 5.0

    model = Net(lambda self, h: helper(h))
    yield step(model)
    helper.__code__ = other.__code__
    yield step(model)


@kind
def defaults_of_a_function() -> Iterator[Step]:
    def helper(h: Tensor, factor: float = 2.0) -> Tensor:
        return h * factor

    model = Net(lambda self, h: helper(h))
    yield step(model)
    helper.__defaults__ = (7.0,)
    yield step(model)


@kind
def default_that_is_equal_and_of_another_type() -> Iterator[Step]:
    def sized(h: Tensor, factor: float = 2) -> Tensor:
        return h * torch.tensor(factor).dtype.itemsize  # 8 of an integer, 4 of a float

    model = Net(lambda self, h: sized(h))
    yield step(model)
    sized.__defaults__ = (2.0,)
    yield step(model)


@kind
def keyword_defaults_of_a_function() -> Iterator[Step]:
    def helper(h: Tensor, *, factor: float = 2.0) -> Tensor:
        return h * factor

    model = Net(lambda self, h: helper(h))
    yield step(model)
    helper.__kwdefaults__ = {"factor": 7.0}
    yield step(model)


@kind
def mutable_default_argument() -> Iterator[Step]:
    factors = [2.0, 3.0]

    def helper(h: Tensor, by: list[float] = factors) -> Tensor:
        return h * by[0] + by[1]

    model = Net(lambda self, h: helper(h))
    yield step(model)
    factors[1] = 9.0
    yield step(model)


def helper(h: Tensor) -> Tensor:
    return h * 2.0


@kind
def helper_function_of_a_file() -> Iterator[Step]:
    model = Net(lambda self, h: helper(h))
    yield step(model)
    before = helper
    globals()["helper"] = lambda h: h * 11.0
    try:
        yield step(model)
    finally:
        globals()["helper"] = before


def outer_helper(h: Tensor) -> Tensor:
    return h + inner_factor()


def inner_factor() -> float:
    return FACTOR


FACTOR = 2.0


@kind
def global_behind_two_helpers() -> Iterator[Step]:
    global FACTOR
    model = Net(lambda self, h: outer_helper(h))
    yield step(model)
    FACTOR = 5.0
    try:
        yield step(model)
    finally:
        FACTOR = 2.0


tools = types.ModuleType("tools")


@kind
def function_of_a_helper_file() -> Iterator[Step]:
    tools.scaled = lambda h: h * 2.0  # type: ignore[attr-defined]
    model = Net(lambda self, h: tools.scaled(h))
    yield step(model)
    tools.scaled = lambda h: h * 3.0  # type: ignore[attr-defined]
    yield step(model)


@kind
def constant_of_a_helper_file() -> Iterator[Step]:
    tools.factor = 2.0  # type: ignore[attr-defined]
    model = Net(lambda self, h: h * tools.factor)
    yield step(model)
    tools.factor = 4.0  # type: ignore[attr-defined]
    yield step(model)


TABLE: dict[str, Callable[[Tensor], Tensor]] = {"act": torch.tanh}


@kind
def function_in_a_table() -> Iterator[Step]:
    TABLE["act"] = torch.tanh
    model = Net(lambda self, h: TABLE["act"](h))
    yield step(model)
    TABLE["act"] = torch.sin
    yield step(model)


@kind
def lambda_of_a_module() -> Iterator[Step]:
    model = Net(lambda self, h: h * 2)
    yield step(model)
    model.second.function = lambda self, h: h * 3
    yield step(model)


@kind
def partial_of_a_module() -> Iterator[Step]:
    def scaled(self: nn.Module, h: Tensor, by: float) -> Tensor:
        return h * by

    model = Net(functools.partial(scaled, by=2.0))
    yield step(model)
    model.second.function = functools.partial(scaled, by=3.0)
    yield step(model)


@kind
def contents_of_a_partial() -> Iterator[Step]:
    def scaled(self: nn.Module, h: Tensor, by: float) -> Tensor:
        return h * by

    function = functools.partial(scaled, by=2.0)
    model = Net(function)
    yield step(model)
    function.keywords["by"] = 3.0
    yield step(model)


@kind
def decorated_function() -> Iterator[Step]:
    def doubled(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        @functools.wraps(function)
        def wrapper(h: Tensor) -> Tensor:
            return function(h) * 2

        return wrapper

    plain = doubled(torch.sin)
    model = Net(lambda self, h: plain(h))
    yield step(model)
    assert plain.__closure__ is not None
    plain.__closure__[0].cell_contents = torch.cos
    yield step(model)


@kind
def call_of_a_class() -> Iterator[Step]:
    class Special(nn.Linear):
        pass

    model = Net()
    model.second.linear = Special(D, D).double()
    yield step(model)
    Special.__call__ = lambda self, x: nn.Module.__call__(self, x) * 2  # type: ignore[method-assign, assignment]
    yield step(model)


@kind
def getattr_of_a_class() -> Iterator[Step]:
    class Lazy(nn.Module):
        def __getattr__(self, name: str) -> Any:
            return 2.0 if name == "factor" else super().__getattr__(name)

        def forward(self, h: Tensor) -> Tensor:
            return h * self.factor

    lazy = Lazy()
    model = nn.Sequential(nn.Linear(D, D), lazy, nn.Linear(D, D), Mean()).double()
    yield step(model)
    Lazy.__getattr__ = lambda self, name: 5.0 if name == "factor" else nn.Module.__getattr__(self, name)  # type: ignore
    yield step(model)


class Mean(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return h.square().mean()


@kind
def property_of_a_class() -> Iterator[Step]:
    model = Net()
    yield step(model)
    with exchanged(Block, "gain", property(lambda self: 3.0)):
        yield step(model)


@kind
def static_method_of_a_class() -> Iterator[Step]:
    class Static(nn.Module):
        @staticmethod
        def act(h: Tensor) -> Tensor:
            return h.sin()

        def forward(self, h: Tensor) -> Tensor:
            return Static.act(h)

    model = nn.Sequential(nn.Linear(D, D), Static(), nn.Linear(D, D), Mean()).double()
    yield step(model)
    Static.act = staticmethod(torch.cos)  # type: ignore[assignment]
    yield step(model)


# Values: globals, closures, classes, containers


@kind
def global_flag() -> Iterator[Step]:
    global FACTOR
    model = Net(lambda self, h: h * (2 if FACTOR > 3 else 1))
    yield step(model)
    FACTOR = 4.0
    try:
        yield step(model)
    finally:
        FACTOR = 2.0


@kind
def global_in_a_method() -> Iterator[Step]:
    global FACTOR
    with exchanged(Block, "mix", lambda self, h: h * FACTOR):
        model = Net()
        yield step(model)
        FACTOR = 3.5
        try:
            yield step(model)
        finally:
            FACTOR = 2.0


@kind
def closure_cell() -> Iterator[Step]:
    factor = 2.0

    def function(self: nn.Module, h: Tensor) -> Tensor:
        return h * factor

    model = Net(function)
    yield step(model)
    factor = 3.0
    yield step(model)


@kind
def cell_of_a_method() -> Iterator[Step]:
    factor = 2.0

    class Closed(nn.Module):
        def forward(self, h: Tensor) -> Tensor:
            return h * factor

    model = nn.Sequential(nn.Linear(D, D), Closed(), nn.Linear(D, D), Mean()).double()
    yield step(model)
    factor = 3.0
    yield step(model)


@kind
def attribute_of_a_class_by_type() -> Iterator[Step]:
    model = Net()
    yield step(model)
    with exchanged(Block, "factor", 3.0):
        yield step(model)


@kind
def attribute_of_a_class_by_name() -> Iterator[Step]:
    model = Net(lambda self, h: h * Block.factor)
    yield step(model)
    with exchanged(Block, "factor", 2.5):
        yield step(model)


@kind
def attribute_of_a_class_by_self() -> Iterator[Step]:
    model = Net(lambda self, h: h * self.factor)
    yield step(model)
    with exchanged(Block, "factor", 2.5):
        yield step(model)


class Settings:
    """Options that live on a class, and on an object in a global."""

    factor = 2.0

    def __init__(self) -> None:
        self.power = 2.0
        self.nested = types.SimpleNamespace(deep=[1.0, {"x": 2.0}])

    def by(self) -> float:
        return self.power


SETTINGS = Settings()


@kind
def class_of_settings() -> Iterator[Step]:
    model = Net(lambda self, h: h * Settings.factor)
    yield step(model)
    with exchanged(Settings, "factor", 5.0):
        yield step(model)


@kind
def attribute_of_a_global_object() -> Iterator[Step]:
    model = Net(lambda self, h: h * SETTINGS.power)
    yield step(model)
    with exchanged(SETTINGS, "power", 3.0):
        yield step(model)


@kind
def attribute_that_a_method_of_a_global_object_reads() -> Iterator[Step]:
    model = Net(lambda self, h: h * SETTINGS.by())
    yield step(model)
    with exchanged(SETTINGS, "power", 3.0):
        yield step(model)


@kind
def nested_entry_of_a_global_object() -> Iterator[Step]:
    model = Net(lambda self, h: h * SETTINGS.nested.deep[1]["x"])
    yield step(model)
    SETTINGS.nested.deep[1]["x"] = 7.0
    try:
        yield step(model)
    finally:
        SETTINGS.nested.deep[1]["x"] = 2.0


@kind
def nested_attribute_of_a_config() -> Iterator[Step]:
    model = Net(lambda self, h: h * self.config.nested.deep[1]["x"])
    model.second.config = Settings()
    yield step(model)
    model.second.config.nested.deep[1]["x"] = 7.0
    yield step(model)


@kind
def attribute_of_a_config() -> Iterator[Step]:
    model = Net(lambda self, h: h * self.config.power)
    model.second.config = Settings()
    yield step(model)
    model.second.config.power = 3.0
    yield step(model)


@kind
def config_exchanged() -> Iterator[Step]:
    model = Net(lambda self, h: h * self.config.power)
    model.second.config = Settings()
    yield step(model)
    model.second.config = Settings()
    model.second.config.power = 5.0
    yield step(model)


@kind
def list_item_65() -> Iterator[Step]:
    model = Net(lambda self, h: h * self.numbers[65])
    model.second.numbers = [1.0] * 100
    yield step(model)
    model.second.numbers[65] = 2.0
    yield step(model)


THOUSAND = [1.0] * 1000
LONG_TABLE = {f"key{i}": float(i) for i in range(500)}


@kind
def item_of_a_long_global_list() -> Iterator[Step]:
    model = Net(lambda self, h: h * THOUSAND[900])
    yield step(model)
    THOUSAND[900] = 2.0
    try:
        yield step(model)
    finally:
        THOUSAND[900] = 1.0


@kind
def entry_of_a_long_global_dict() -> Iterator[Step]:
    model = Net(lambda self, h: h * LONG_TABLE["key400"])
    yield step(model)
    LONG_TABLE["key400"] = 2.0
    try:
        yield step(model)
    finally:
        LONG_TABLE["key400"] = 400.0


@kind
def dict_entry() -> Iterator[Step]:
    model = Net(lambda self, h: h * self.table["x"]["y"])
    model.second.table = {"x": {"y": 2.0}}
    yield step(model)
    model.second.table["x"]["y"] = 3.0
    yield step(model)


@kind
def item_in_a_set() -> Iterator[Step]:
    model = Net(lambda self, h: h * (2.0 if "on" in self.flags else 1.0))
    model.second.flags = {"off"}
    yield step(model)
    model.second.flags.add("on")
    yield step(model)


@kind
def table_with_functions() -> Iterator[Step]:
    model = Net(lambda self, h: self.acts[0](h))
    model.second.acts = [torch.tanh, torch.sin]
    yield step(model)
    model.second.acts[0] = torch.sin
    yield step(model)


@kind
def tensor_in_a_global() -> Iterator[Step]:
    global SHARED
    SHARED = torch.full((D,), 2.0, dtype=torch.float64)
    model = Net(lambda self, h: h * SHARED)
    yield step(model)
    SHARED = torch.full((D,), 3.0, dtype=torch.float64)
    yield step(model)


SHARED = torch.ones(D, dtype=torch.float64)


@kind
def tensor_in_a_global_written() -> Iterator[Step]:
    global SHARED
    SHARED = torch.full((D,), 2.0, dtype=torch.float64)
    model = Net(lambda self, h: h * SHARED)
    yield step(model)
    SHARED.mul_(2)
    yield step(model)


@kind
def tensor_in_an_attribute() -> Iterator[Step]:
    model = Net(lambda self, h: h * self.table)
    model.second.table = torch.full((D,), 2.0, dtype=torch.float64)
    yield step(model)
    model.second.table = torch.full((D,), 3.0, dtype=torch.float64)
    yield step(model)


@kind
def tensor_in_a_list() -> Iterator[Step]:
    model = Net(lambda self, h: h * self.tables[1])
    model.second.tables = [torch.full((D,), 2.0, dtype=torch.float64)] * 2
    yield step(model)
    model.second.tables[1] = torch.full((D,), 3.0, dtype=torch.float64)
    yield step(model)


class Mode(enum.Enum):
    DOUBLE = "double"
    TRIPLE = "triple"


@kind
def enum_attribute() -> Iterator[Step]:
    model = Net(lambda self, h: h * (2.0 if self.mode is Mode.DOUBLE else 3.0))
    model.second.mode = Mode.DOUBLE
    yield step(model)
    model.second.mode = Mode.TRIPLE
    yield step(model)


ENVIRONMENT = {"MODE": "fast"}
FAST = ENVIRONMENT["MODE"] == "fast"


@kind
def constant_read_from_the_environment() -> Iterator[Step]:
    global FAST
    model = Net(lambda self, h: h if FAST else h * 2)
    yield step(model)
    FAST = False
    try:
        yield step(model)
    finally:
        FAST = True


def set_in_the_environment(read: Callable[[], str]) -> Iterator[Step]:
    model = Net(lambda self, h: h * float(read()))
    yield step(model)
    os.environ["PIPECOMPILE_TEST_FACTOR"] = "3"
    try:
        yield step(model)
    finally:
        del os.environ["PIPECOMPILE_TEST_FACTOR"]


@kind
def variable_of_the_environment() -> Iterator[Step]:
    yield from set_in_the_environment(lambda: os.environ.get("PIPECOMPILE_TEST_FACTOR", "1"))


@kind
def variable_of_the_environment_by_getenv() -> Iterator[Step]:
    yield from set_in_the_environment(lambda: os.getenv("PIPECOMPILE_TEST_FACTOR", "1"))


@kind
def number_of_variables_of_the_environment() -> Iterator[Step]:
    before = len(os.environ)
    yield from set_in_the_environment(lambda: str(1 + len(os.environ) - before))


@kind
def names_of_variables_of_the_environment() -> Iterator[Step]:
    yield from set_in_the_environment(lambda: str(1 + sum(name == "PIPECOMPILE_TEST_FACTOR" for name in os.environ)))


@kind
def variable_among_all_of_the_environment() -> Iterator[Step]:
    yield from set_in_the_environment(lambda: dict(os.environ).get("PIPECOMPILE_TEST_FACTOR", "1"))


HERE = contextvars.ContextVar("HERE", default=1.0)
OF_THIS_THREAD = threading.local()
OF_THIS_THREAD.factor = 1.0


@kind
def context_variable() -> Iterator[Step]:
    model = Net(lambda self, h: h * HERE.get())
    yield step(model)
    token = HERE.set(3.0)
    try:
        yield step(model)
    finally:
        HERE.reset(token)


@kind
def context_variable_on_a_module() -> Iterator[Step]:
    model = Net(lambda self, h: h * self.variable.get())
    model.second.variable = contextvars.ContextVar("variable", default=1.0)
    yield step(model)
    model.second.variable.set(3.0)
    yield step(model)


@kind
def local_of_a_thread() -> Iterator[Step]:
    model = Net(lambda self, h: h * getattr(OF_THIS_THREAD, "factor", 2.0))
    yield step(model)
    OF_THIS_THREAD.factor = 3.0
    try:
        yield step(model)
    finally:
        OF_THIS_THREAD.factor = 1.0


@dataclass
class Scaled:
    scale: float = 1.0


class Slotted:
    """An object without a ``__dict__``."""

    __slots__ = ("scale",)

    def __init__(self) -> None:
        self.scale = 1.0


class Fields:
    """A config that finds its options past the hooks on attributes, as those of ml_collections and omegaconf do."""

    def __init__(self) -> None:
        object.__setattr__(self, "fields", {"scale": 1.0})

    def __getattr__(self, name: str) -> Any:
        try:
            return object.__getattribute__(self, "fields")[name]
        except KeyError:
            raise AttributeError(name) from None

    def __setattr__(self, name: str, value: Any) -> None:
        self.fields[name] = value


class Own(threading.local):
    def __init__(self) -> None:
        self.scaled = Scaled()


def of_this_thread() -> threading.local:
    local = threading.local()
    local.scaled = Scaled()
    return local


def of_this_context() -> contextvars.ContextVar[Scaled]:
    variable = contextvars.ContextVar[Scaled]("variable")
    variable.set(Scaled())
    return variable


HOLDERS: dict[str, tuple[Callable[[], Any], Callable[[Any], Scaled]]] = {
    "a context variable": (of_this_context, lambda it: it.get()),
    "a local of a thread": (of_this_thread, lambda it: it.scaled),
    "a local of a thread, by vars": (of_this_thread, lambda it: vars(it)["scaled"]),
    "a local of a thread, in a list": (lambda: [of_this_thread()], lambda it: it[0].scaled),
    "a local of a thread, of a derived class": (Own, lambda it: it.scaled),
}


def object_changed(name: str) -> Iterator[Step]:
    make, find = HOLDERS[name]
    held = make()
    model = Net(lambda self, h: h * find(self.held).scale)
    model.second.held = held
    yield step(model)
    find(held).scale = 3.0
    yield step(model)


KINDS.update((f"an object in {name}", functools.partial(object_changed, name)) for name in HOLDERS)


@kind
def attribute_that_a_local_of_a_thread_lacked() -> Iterator[Step]:
    model = Net(lambda self, h: h * getattr(self.held, "factor", 1.0))
    model.second.held = Own()
    yield step(model)
    model.second.held.factor = 3.0
    yield step(model)


SHOWN = {"a": 1.0}
PARTIAL = functools.partial(max, 1.0)
PARSED = ConfigParser()
PARSED.read_dict({"a": {"b": "1"}})
ONE, THREE = functools.cache(lambda: 1.0), functools.cache(lambda: 3.0)
DATA: dict[str, tuple[Any, Callable[[Any], Any], Callable[[Any], float]]] = {
    "numpy": (np.ones(2), lambda it: it.fill(3.0), lambda it: float(it[0])),
    "numpy in a list": ([np.ones(2)], lambda it: it[0].fill(3.0), lambda it: it[0].sum()),
    "numpy in a dict": ({"a": np.ones(2)}, lambda it: it["a"].fill(3.0), lambda it: float(it["a"][0])),
    "a view of an array": (memoryview(np.ones(2)), lambda it: it.__setitem__(0, 3.0), lambda it: it[0]),
    "numpy of two dimensions": (np.ones((2, 2)), lambda it: it.T.fill(3.0), lambda it: float(it.T[1].sum())),
    "dates": (np.zeros(1, "M8[D]"), lambda it: it.fill(3), lambda it: 1.0 + it.astype(int)[0]),
    "pairs in a dict": ({"a": (ONE, "")}, lambda it: it.update(a=(THREE, "")), lambda it: it["a"][0]()),
    "bytes": (bytearray([1]), lambda it: it.append(3), sum),
    "array": (array("d", [1.0]), lambda it: it.append(3.0), sum),
    "a view of a dict": (types.MappingProxyType(SHOWN), lambda it: SHOWN.update(a=3.0), lambda it: it["a"]),
    "a config by vars": (Scaled(), lambda it: setattr(it, "scale", 3.0), lambda it: vars(it)["scale"]),
    "a user's dict": (UserDict(a=1.0), lambda it: it.update(a=3.0), lambda it: it["a"]),
    "a user's list": (UserList([1.0]), lambda it: it.append(3.0), sum),
    "attribute of a partial": (PARTIAL, lambda it: setattr(it, "scale", 3.0), lambda it: getattr(it, "scale", 1.0)),
    "a file of settings": (PARSED, lambda it: it.set("a", "b", "3"), lambda it: it.getfloat("a", "b")),
    "an object with slots": (Slotted(), lambda it: setattr(it, "scale", 3.0), lambda it: it.scale),
    "slots in a list": ([Slotted()], lambda it: setattr(it[0], "scale", 3.0), lambda it: it[0].scale),
    "a config of fields": (Fields(), lambda it: setattr(it, "scale", 3.0), lambda it: it.scale),
    "an option that comes": (Fields(), lambda it: setattr(it, "a", 3.0), lambda it: getattr(it, "a", 1.0)),
    "a number in C": (ctypes.c_double(1.0), lambda it: setattr(it, "value", 3.0), lambda it: it.value),
}


def data_changed(name: str) -> Iterator[Step]:
    given, change, read = DATA[name]
    shared = isinstance(given, types.MappingProxyType | memoryview)
    held = given if shared else copy.deepcopy(given)
    SHOWN["a"] = 1.0
    if isinstance(given, memoryview):
        given[:] = memoryview(np.ones(2))
    model = Net(lambda self, h: h * read(self.held))
    model.second.held = held
    yield step(model)
    change(held)
    yield step(model)


KINDS.update((f"data: {name}", functools.partial(data_changed, name)) for name in DATA)


@kind
def attribute_of_a_function() -> Iterator[Step]:
    def scaled(self: nn.Module, h: Tensor) -> Tensor:
        return h * scaled.factor  # type: ignore[attr-defined]

    scaled.factor = 2.0  # type: ignore[attr-defined]
    model = Net(scaled)
    yield step(model)
    scaled.factor = 3.0  # type: ignore[attr-defined]
    yield step(model)


@kind
def attribute_that_a_function_gets_later() -> Iterator[Step]:
    def scaled(self: nn.Module, h: Tensor) -> Tensor:
        return h * getattr(scaled, "factor", 2.0)

    model = Net(scaled)
    yield step(model)
    scaled.factor = 3.0  # type: ignore[attr-defined]
    yield step(model)
    scaled.factor = 4.0  # type: ignore[attr-defined]
    yield step(model)


@kind
def attribute_of_a_function_that_a_module_holds() -> Iterator[Step]:
    def held(self: nn.Module, h: Tensor) -> Tensor:
        function = self.held
        return h * (function.factor if hasattr(function, "factor") else 1.0)

    model = Net(held)
    model.second.held = lambda: None
    yield step(model)
    model.second.held.factor = 3.0
    yield step(model)


@kind
def attribute_of_a_parameter() -> Iterator[Step]:
    model = Net(lambda self, h: h * getattr(self.linear.weight, "factor", 1.0) * self.linear.bias.factor)
    model.second.linear.bias.factor = 2.0  # type: ignore[assignment]
    yield step(model)
    model.second.linear.bias.factor = 3.0  # type: ignore[assignment]
    yield step(model)
    model.second.linear.weight.factor = 4.0  # type: ignore[assignment]
    yield step(model)


@kind
def attribute_of_a_buffer() -> Iterator[Step]:
    model = Net(lambda self, h: h * self.shift.factor if hasattr(self.shift, "factor") else h)
    yield step(model)
    model.second.shift.factor = 3.0
    yield step(model)


LOG = logging.getLogger("pipecompile.test_changes")


def logging_more(asked: Callable[[], Any]) -> Iterator[Step]:
    LOG.setLevel(logging.WARNING)
    model = Net(lambda self, h: h * (2.0 if asked() else 1.0))
    yield step(model)
    LOG.setLevel(logging.DEBUG)
    yield step(model)


@kind
def whether_a_logger_is_enabled() -> Iterator[Step]:
    yield from logging_more(lambda: LOG.isEnabledFor(logging.DEBUG))


@kind
def effective_level_of_a_logger() -> Iterator[Step]:
    yield from logging_more(lambda: logging.getLogger(LOG.name).getEffectiveLevel() < logging.INFO)


@kind
def level_of_a_logger() -> Iterator[Step]:
    yield from logging_more(lambda: LOG.level < logging.INFO)


@kind
def number_that_processes_share() -> Iterator[Step]:
    model = Net(lambda self, h: h * self.shared.value)
    model.second.__dict__["shared"] = multiprocessing.Value("d", 1.0)
    yield step(model)
    model.second.shared.value = 3.0
    yield step(model)


def weakly_held(hold: Callable[[Any], Any], read: Callable[[Any], float]) -> Iterator[Step]:
    settings = Scaled()
    model = Net(lambda self, h: h * read(self.held))
    model.second.held = hold(settings)
    yield step(model)
    settings.scale = 3.0
    yield step(model)


@kind
def attribute_behind_a_weak_reference() -> Iterator[Step]:
    yield from weakly_held(weakref.ref, lambda it: it().scale)


@kind
def attribute_behind_a_weak_proxy() -> Iterator[Step]:
    yield from weakly_held(weakref.proxy, lambda it: it.scale)


@kind
def attribute_in_a_weak_table() -> Iterator[Step]:
    yield from weakly_held(lambda it: weakref.WeakValueDictionary(a=it), lambda it: it["a"].scale)


@kind
def entry_of_a_modules_dict() -> Iterator[Step]:
    model = Net(lambda self, h: h * vars(self).get("gained", 2.0))
    yield step(model)
    model.second.gained = 3.0
    yield step(model)
    model.second.gained = 4.0
    yield step(model)


class Gained:
    """A descriptor of the user's own."""

    def __get__(self, owner: Any, kind: Any = None) -> float:
        return owner.__dict__.get("_gained", 1.0)

    def __set__(self, owner: Any, value: float) -> None:
        owner.__dict__["_gained"] = value


@kind
def descriptor_of_the_users() -> Iterator[Step]:
    class Gains(Block):
        gained = Gained()

    model = Net()
    model.second = Gains(lambda self, h: h * self.gained).double()
    yield step(model)
    model.second.gained = 3.0
    yield step(model)


GAIN = 1.0


@kind
def global_by_its_name() -> Iterator[Step]:
    global GAIN
    model = Net(lambda self, h: h * globals()["GAIN"])
    yield step(model)
    GAIN = 3.0
    try:
        yield step(model)
    finally:
        GAIN = 1.0


class Only:
    """A class of one instance."""

    instance: Any = None

    def __new__(cls) -> Only:
        if cls.instance is None:
            cls.instance = super().__new__(cls)
            cls.instance.scale = 1.0
        return cls.instance


@kind
def attribute_of_an_only_instance() -> Iterator[Step]:
    Only.instance = None
    model = Net(lambda self, h: h * Only().scale)
    for scale in (1.0, 3.0, 4.0):
        Only().scale = scale
        yield step(model)


@kind
def instance_attribute_that_shadows_the_class() -> Iterator[Step]:
    model = Net(lambda self, h: h * self.factor)
    yield step(model)
    model.second.factor = 4.0
    yield step(model)


# Hooks


def doubled(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * 2


@kind
def forward_hook_added() -> Iterator[Step]:
    model = Net()
    yield step(model)
    model.second.register_forward_hook(doubled)
    yield step(model)


@kind
def forward_hook_removed() -> Iterator[Step]:
    model = Net()
    handle = model.second.register_forward_hook(doubled)
    yield step(model)
    handle.remove()
    yield step(model)


@kind
def forward_hook_moved() -> Iterator[Step]:
    model = Net()
    handle = model.first.register_forward_hook(doubled)
    yield step(model)
    handle.remove()
    model.third.register_forward_hook(doubled)
    yield step(model)


@kind
def forward_pre_hook_added() -> Iterator[Step]:
    model = Net()
    yield step(model)
    model.second.register_forward_pre_hook(lambda module, args: (args[0] * 3,))
    yield step(model)


@kind
def hook_with_keywords() -> Iterator[Step]:
    model = Net()

    def hook(module: nn.Module, args: Any, *rest: Any) -> Any:
        return rest[-1] * (2.0 if len(rest) == 1 else 3.0)

    handle = model.second.register_forward_hook(hook)
    yield step(model)
    handle.remove()
    model.second.register_forward_hook(hook, with_kwargs=True)
    yield step(model)


@kind
def flag_of_a_hook() -> Iterator[Step]:
    model = Net()

    def hook(module: nn.Module, args: Any, *rest: Any) -> Any:
        return rest[-1] * (2.0 if len(rest) == 1 else 3.0)

    handle = model.second.register_forward_hook(hook)
    yield step(model)
    model.second._forward_hooks_with_kwargs[handle.id] = True
    yield step(model)


@kind
def order_of_hooks() -> Iterator[Step]:
    model = Net()
    model.second.register_forward_hook(doubled)
    handle = model.second.register_forward_hook(lambda module, args, output: output + 1)
    yield step(model)
    model.second._forward_hooks.move_to_end(handle.id, last=False)
    yield step(model)


@kind
def hook_exchanged_under_its_number() -> Iterator[Step]:
    model = Net()
    handle = model.second.register_forward_hook(doubled)
    yield step(model)
    model.second._forward_hooks[handle.id] = lambda module, args, output: output * 5
    yield step(model)


@kind
def state_of_a_hook() -> Iterator[Step]:
    class Hook:
        factor = 2.0

        def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
            return output * self.factor

    hook = Hook()
    model = Net()
    model.second.register_forward_hook(hook)
    yield step(model)
    hook.factor = 3.0
    yield step(model)


@kind
def global_forward_hook() -> Iterator[Step]:
    model = Net()
    yield step(model)
    handle = torch_module.register_module_forward_hook(lambda m, a, out: out * 2 if isinstance(m, Block) else None)
    try:
        yield step(model)
    finally:
        handle.remove()


@kind
def global_forward_hook_for_every_module() -> Iterator[Step]:
    model = Net()
    yield step(model)
    handle = torch_module.register_module_forward_hook(lambda m, a, out: out * 1.5)
    try:
        yield step(model)
    finally:
        handle.remove()


@kind
def global_forward_pre_hook_for_every_module() -> Iterator[Step]:
    model = Net()
    model.second.register_full_backward_hook(halved)  # kept whole
    yield step(model)
    handle = torch_module.register_module_forward_pre_hook(lambda m, args: (args[0] * 1.5, *args[1:]))
    try:
        yield step(model)
    finally:
        handle.remove()


@kind
def global_forward_pre_hook() -> Iterator[Step]:
    model = Net()
    yield step(model)
    handle = torch_module.register_module_forward_pre_hook(
        lambda m, args: (args[0] * 2,) if isinstance(m, Block) else None
    )
    try:
        yield step(model)
    finally:
        handle.remove()


def halved(module: nn.Module, grad_input: Any, grad_output: Any) -> Any:
    return tuple(None if g is None else g * 0.5 for g in grad_input)


@kind
def backward_hook_added() -> Iterator[Step]:
    model = Net()
    yield step(model)
    model.second.register_full_backward_hook(halved)
    yield step(model)


@kind
def backward_hook_removed() -> Iterator[Step]:
    model = Net()
    handle = model.second.register_full_backward_hook(halved)
    yield step(model)
    handle.remove()
    yield step(model)


@kind
def backward_hook_moved() -> Iterator[Step]:
    model = Net()
    handle = model.second.register_full_backward_hook(halved)
    yield step(model)
    handle.remove()
    model.third.register_full_backward_hook(halved)
    yield step(model)


@kind
def backward_hook_exchanged() -> Iterator[Step]:
    model = Net()
    handle = model.second.register_full_backward_hook(halved)
    yield step(model)
    model.second._backward_hooks[handle.id] = lambda m, gi, go: tuple(g * 7 for g in gi)
    yield step(model)


@kind
def backward_hook_on_a_linear_layer() -> Iterator[Step]:
    model = Net()
    yield step(model)
    model.second.linear.register_full_backward_hook(halved)
    yield step(model)


@kind
def backward_pre_hook_added() -> Iterator[Step]:
    model = Net()
    yield step(model)
    model.second.register_full_backward_pre_hook(lambda module, grads: tuple(g * 3 for g in grads))
    yield step(model)


@kind
def backward_hook_on_the_model() -> Iterator[Step]:
    model = Net()
    yield step(model)
    model.register_full_backward_pre_hook(lambda module, go: (go[0] * 2,))
    yield Step(model, (rows().requires_grad_(),))


@kind
def legacy_backward_hook() -> Iterator[Step]:
    model = Net()
    yield step(model)
    model.second.register_backward_hook(lambda module, gi, go: tuple(None if g is None else g * 2 for g in gi))
    yield step(model, refused=True)


@kind
def global_backward_hook() -> Iterator[Step]:
    model = Net()
    yield step(model)
    handle = torch_module.register_module_full_backward_hook(
        lambda m, gi, go: tuple(g * 2 for g in gi) if isinstance(m, Block) and gi[0] is not None else None
    )
    try:
        yield step(model, refused=True)
    finally:
        handle.remove()


@kind
def global_backward_pre_hook() -> Iterator[Step]:
    model = Net()
    yield step(model)
    handle = torch_module.register_module_full_backward_pre_hook(
        lambda m, go: tuple(g * 2 for g in go) if isinstance(m, Block) else None
    )
    try:
        yield step(model, refused=True)
    finally:
        handle.remove()


@kind
def hook_on_a_parameter() -> Iterator[Step]:
    model = Net()
    yield step(model)
    model.second.linear.weight.register_hook(lambda g: g * 4)
    yield step(model)


@kind
def hook_on_a_parameter_removed() -> Iterator[Step]:
    model = Net()
    handle = model.second.linear.weight.register_hook(lambda g: g * 4)
    yield step(model)
    handle.remove()
    yield step(model)


@kind
def hook_after_accumulation() -> Iterator[Step]:
    model = Net()
    yield step(model)

    def scale(parameter: Tensor) -> None:
        parameter.grad *= 3

    model.second.linear.weight.register_post_accumulate_grad_hook(scale)
    yield step(model)


@kind
def hook_on_an_activation() -> Iterator[Step]:
    global FACTOR

    def hooked(self: nn.Module, h: Tensor) -> Tensor:
        h = h * 1.0
        h.register_hook(lambda g: g * FACTOR)
        return h

    model = Net(hooked)
    yield step(model)
    FACTOR = 5.0
    try:
        yield step(model)
    finally:
        FACTOR = 2.0


# Parameters, buffers, modules


@kind
def parameter_of_another_shape_through_data() -> Iterator[Step]:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, h: Tensor) -> Tensor:
            return h * self.weight

    scaled = Scaled()
    model = nn.Sequential(nn.Linear(D, D), scaled, nn.Linear(D, D), Mean()).double()
    yield step(model)
    scaled.weight.data = torch.arange(1.0, D + 1, dtype=torch.float64)
    scaled.weight.grad = None
    yield step(model)


@kind
def parameter_through_data() -> Iterator[Step]:
    model = Net()
    yield step(model)
    model.second.linear.weight.data = model.second.linear.weight.data * 2
    yield step(model)


@kind
def parameter_frozen() -> Iterator[Step]:
    model = Net()
    yield step(model)
    model.second.linear.weight.requires_grad_(False)
    yield step(model)


@kind
def parameter_unfrozen() -> Iterator[Step]:
    model = Net()
    model.second.linear.weight.requires_grad_(False)
    yield step(model)
    model.second.linear.weight.requires_grad_(True)
    yield step(model)


@kind
def parameter_replaced() -> Iterator[Step]:
    model = Net()
    yield step(model)
    model.second.linear.weight = nn.Parameter(torch.eye(D, dtype=torch.float64))
    yield step(model)


@kind
def parameter_becomes_a_buffer() -> Iterator[Step]:
    model = Net()
    yield step(model)
    bias = model.second.linear.bias.detach().clone() * 2
    del model.second.linear.bias
    model.second.linear.register_buffer("bias", bias)
    yield step(model)


@kind
def parameter_set_to_none() -> Iterator[Step]:
    model = Net()
    yield step(model)
    model.second.linear.bias = None
    yield step(model)


@kind
def buffer_replaced() -> Iterator[Step]:
    model = Net()
    yield step(model)
    model.second.shift = torch.full((D,), 3.0, dtype=torch.float64)
    yield step(model)


@kind
def buffer_of_another_shape() -> Iterator[Step]:
    model = Net()
    yield step(model)
    model.second.shift = torch.full((1,), 3.0, dtype=torch.float64)
    yield step(model)


@kind
def buffer_written() -> Iterator[Step]:
    model = Net()
    yield step(model)
    model.second.shift.fill_(9.0)
    yield step(model)


@kind
def buffer_registered() -> Iterator[Step]:
    model = Net(lambda self, h: h * getattr(self, "extra", 1.0))
    yield step(model)
    model.second.register_buffer("extra", torch.full((D,), 3.0, dtype=torch.float64))
    yield step(model)


@kind
def weights_tied_later() -> Iterator[Step]:
    model = Net()
    yield step(model)
    model.third.linear.weight = model.first.linear.weight
    yield step(model, may_be_refused=True)


@kind
def weights_untied() -> Iterator[Step]:
    model = Net()
    model.third.linear.weight = model.first.linear.weight
    yield step(model)
    model.third.linear.weight = nn.Parameter(model.first.linear.weight.detach() * 2)
    yield step(model)


@kind
def module_replaced() -> Iterator[Step]:
    model = Net()
    yield step(model)
    model.second = nn.Sequential(nn.Linear(D, D), nn.Tanh()).double()
    yield step(model)


@kind
def module_swapped() -> Iterator[Step]:
    model = Net()
    yield step(model)
    model.first, model.third = model.third, model.first
    model.third.scale, model.first.linear = 2.0, model.first.linear
    yield step(model)


@kind
def module_added() -> Iterator[Step]:
    model = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D), Mean()).double()
    yield step(model)
    model.insert(1, nn.Linear(D, D).double())
    yield step(model)


@kind
def module_removed() -> Iterator[Step]:
    model = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D), Mean()).double()
    yield step(model)
    del model[2]
    yield step(model)


@kind
def class_of_a_module() -> Iterator[Step]:
    class Other(Block):
        def mix(self, h: Tensor) -> Tensor:
            return h * 2

    model = Net()
    yield step(model)
    model.second.__class__ = Other
    yield step(model)


@kind
def low_rank_adapter() -> Iterator[Step]:
    class Adapted(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base = base.requires_grad_(False)
            self.down, self.up = nn.Linear(D, 2, bias=False), nn.Linear(2, D, bias=False)
            self.double()

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + self.up(self.down(x))

    model = Net()
    yield step(model)
    model.second.linear = Adapted(model.second.linear)  # type: ignore[assignment]
    yield step(model)


@kind
def state_loaded() -> Iterator[Step]:
    model, other = Net(), Net()
    yield step(model)
    nn.init.normal_(other.second.linear.weight)
    model.load_state_dict(other.state_dict())
    yield step(model)


@kind
def state_assigned() -> Iterator[Step]:
    model, other = Net(), Net()
    yield step(model)
    nn.init.normal_(other.second.linear.weight)
    model.load_state_dict(other.state_dict(), assign=True)
    yield step(model)


@kind
def one_module_in_float32() -> Iterator[Step]:
    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(D, D)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x.to(self.linear.weight.dtype)).double()

    model = nn.Sequential(nn.Linear(D, D), Cast(), nn.Linear(D, D), Mean()).double()
    yield step(model)
    model[1].linear.float()
    yield step(model)


@kind
def one_module_in_half() -> Iterator[Step]:
    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(D, D)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x.to(self.linear.weight.dtype)).double()

    model = nn.Sequential(nn.Linear(D, D), Cast(), nn.Linear(D, D), Mean()).double()
    yield step(model)
    model[1].linear.bfloat16()
    yield step(model)


@kind_without_effect
def module_moved_to_its_own_device() -> Iterator[Step]:
    model = Net()
    yield step(model)
    model.second.to("cpu", torch.float64)
    yield step(model)


@kind
def parametrization_registered() -> Iterator[Step]:
    class Doubled(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return w * 2

    model = Net()
    yield step(model)
    parametrize.register_parametrization(model.second.linear, "weight", Doubled())
    yield step(model)


@kind
def parametrization_removed() -> Iterator[Step]:
    class Doubled(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return w * 2

    model = Net()
    parametrize.register_parametrization(model.second.linear, "weight", Doubled())
    yield step(model)
    parametrize.remove_parametrizations(model.second.linear, "weight", leave_parametrized=False)
    yield step(model)


@kind_without_effect
def weight_norm_added() -> Iterator[Step]:
    model = Net()
    yield step(model)
    parametrizations.weight_norm(model.second.linear)
    yield step(model)


@kind_without_effect
def old_weight_norm_added() -> Iterator[Step]:
    model = Net()
    yield step(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(model.second.linear)
    yield step(model)


@kind
def spectral_norm_added() -> Iterator[Step]:
    model = Net()
    yield step(model)
    parametrizations.spectral_norm(model.second.linear).eval()
    yield step(model)


@kind
def old_spectral_norm_added() -> Iterator[Step]:
    model = Net()
    yield step(model)
    nn.utils.spectral_norm(model.second.linear)
    yield step(model)


@kind
def spectral_norm_removed() -> Iterator[Step]:
    model = Net()
    nn.utils.spectral_norm(model.second.linear)
    yield step(model)
    nn.utils.remove_spectral_norm(model.second.linear)
    with torch.no_grad():
        model.second.linear.weight.mul_(3)
    yield step(model)


@kind
def pruned() -> Iterator[Step]:
    model = Net()
    yield step(model)
    prune.l1_unstructured(model.second.linear, "weight", amount=0.5)
    yield step(model)


@kind
def pruning_made_permanent() -> Iterator[Step]:
    model = Net()
    prune.l1_unstructured(model.second.linear, "weight", amount=0.5)
    yield step(model)
    prune.remove(model.second.linear, "weight")
    yield step(model)


@kind
def batch_norm_fused() -> Iterator[Step]:
    model = nn.Sequential(nn.Linear(D, D), nn.Linear(D, D), nn.BatchNorm1d(D), nn.Linear(D, D), Mean()).double().eval()
    model[2].running_mean.fill_(0.5)
    yield step(model)
    model[1] = nn.utils.fusion.fuse_linear_bn_eval(model[1], model[2])
    model[2] = nn.Identity()
    yield step(model)


@kind_without_effect
def memory_format_of_weights() -> Iterator[Step]:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 4, 3), Mean()).double()
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    yield Step(model, (x,))
    model.to(memory_format=torch.channels_last)
    yield Step(model, (x,))


@kind
def memory_format_of_an_input() -> Iterator[Step]:
    class Asks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if x.is_contiguous() else x * 3

    model = nn.Sequential(Asks(), nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 4, 3), Mean()).double()
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    yield Step(model, (x,))
    yield Step(model, (x.to(memory_format=torch.channels_last),), may_be_refused=True)


# Modes


@kind
def eval_of_one_module() -> Iterator[Step]:
    model = Net(lambda self, h: h * (2.0 if self.training else 1.0))
    yield step(model)
    model.second.eval()
    yield step(model)


@kind
def train_of_one_module() -> Iterator[Step]:
    model = Net(lambda self, h: h * (2.0 if self.training else 1.0)).eval()
    yield step(model)
    model.second.train()
    yield step(model)


@kind
def dropout_turned_off() -> Iterator[Step]:
    model = nn.Sequential(nn.Linear(D, D), nn.Dropout(1.0), nn.Linear(D, D), Mean()).double()
    yield step(model)
    model[1].p = 0.0
    yield step(model)


@kind
def epsilon_of_a_norm() -> Iterator[Step]:
    model = nn.Sequential(nn.Linear(D, D), nn.LayerNorm(D), nn.Linear(D, D), Mean()).double()
    yield step(model)
    model[1].eps = 1.0
    yield step(model)


@kind
def default_dtype() -> Iterator[Step]:
    model = Net(lambda self, h: h * (2.0 if torch.zeros(1).dtype == torch.float32 else 3.0))
    yield step(model)
    with setting(torch.set_default_dtype, torch.float64, torch.float32):
        yield step(model)


@kind
def default_dtype_asked() -> Iterator[Step]:
    model = Net(lambda self, h: h * torch.finfo(torch.get_default_dtype()).eps * 1e8)
    yield step(model)
    with setting(torch.set_default_dtype, torch.float64, torch.float32):
        yield step(model)


@kind
def default_dtype_of_a_constant() -> Iterator[Step]:
    model = Net(lambda self, h: h * (torch.ones(D) / 3))
    yield step(model)
    with setting(torch.set_default_dtype, torch.float64, torch.float32):
        yield step(model)


@kind_without_effect
def deterministic_algorithms() -> Iterator[Step]:
    model = Net()
    yield step(model)
    with setting(torch.use_deterministic_algorithms, True, False):
        yield step(model)


@kind
def deterministic_algorithms_asked() -> Iterator[Step]:
    model = Net(lambda self, h: h * (2 if torch.are_deterministic_algorithms_enabled() else 1))
    yield step(model)
    with setting(torch.use_deterministic_algorithms, True, False):
        yield step(model)


@kind
def backend_flag_asked() -> Iterator[Step]:
    model = Net(lambda self, h: h * (2 if torch.backends.cudnn.benchmark else 1))
    yield step(model)
    with torch.backends.cudnn.flags(enabled=True, benchmark=True):
        yield step(model)


@kind
def fast_path_flag_asked() -> Iterator[Step]:
    model = Net(lambda self, h: h * (2 if torch.backends.mha.get_fastpath_enabled() else 1))
    yield step(model)
    with setting(torch.backends.mha.set_fastpath_enabled, False, True):
        yield step(model)


@kind
def matmul_precision_asked() -> Iterator[Step]:
    model = Net(lambda self, h: h * (2 if torch.get_float32_matmul_precision() == "highest" else 1))
    yield step(model)
    with setting(torch.set_float32_matmul_precision, "high", "highest"):
        yield step(model)


@kind_without_effect
def matmul_precision() -> Iterator[Step]:
    model = Net()
    yield step(model)
    with setting(torch.set_float32_matmul_precision, "medium", "highest"):
        yield step(model)


def float32(model: nn.Module) -> Step:
    return Step(model.float(), (rows().float(),))


@kind
def autocast_on() -> Iterator[Step]:
    model = Net()
    yield float32(model)
    yield Step(model, (rows().float(),), around=lambda: torch.autocast("cpu", torch.bfloat16))


@kind
def autocast_of_another_dtype() -> Iterator[Step]:
    model = Net()
    yield Step(model.float(), (rows().float(),), around=lambda: torch.autocast("cpu", torch.bfloat16))
    yield Step(model, (rows().float(),), around=lambda: torch.autocast("cpu", torch.float16))


@kind
def autocast_asked() -> Iterator[Step]:
    model = Net(lambda self, h: h * (2 if torch.is_autocast_enabled("cpu") else 1))
    yield step(model)
    yield step(model, around=lambda: torch.autocast("cpu", torch.bfloat16))


@kind
def no_gradients_asked() -> Iterator[Step]:
    model = Net(lambda self, h: h * (2 if torch.is_grad_enabled() else 1))
    yield step(model)
    yield step(model, around=torch.no_grad, outputs_only=True)


@kind
def inference_mode_asked() -> Iterator[Step]:
    model = Net(lambda self, h: h * (1 if torch.is_inference_mode_enabled() else 2))
    yield step(model)
    yield step(model, around=torch.inference_mode, outputs_only=True, refused=True)


@kind
def gradients_asked_of_a_tensor() -> Iterator[Step]:
    model = Net(lambda self, h: h * (2 if h.requires_grad else 1))
    yield step(model)
    yield step(model, around=torch.no_grad, outputs_only=True)


@kind_without_effect
def no_gradients() -> Iterator[Step]:
    model = Net()
    yield step(model)
    yield step(model, around=torch.no_grad, outputs_only=True)


@kind_without_effect
def inference_mode() -> Iterator[Step]:
    model = Net()
    yield step(model)
    yield step(model, around=torch.inference_mode, outputs_only=True)


@kind_without_effect
def anomaly_mode() -> Iterator[Step]:
    model = Net()
    yield step(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield step(model, around=lambda: torch.autograd.detect_anomaly(check_nan=True))


@kind
def default_device() -> Iterator[Step]:
    model = Net(lambda self, h: h * (2 if torch.get_default_device().type == "meta" else 1))
    yield step(model)
    again = step(model)
    again.refused = True
    with setting(torch.set_default_device, "meta", None):
        yield again


@kind_without_effect
def default_device_without_effect() -> Iterator[Step]:
    model = Net(lambda self, h: h * torch.ones(D))
    yield step(model)
    with setting(torch.set_default_device, "cpu", None):
        yield step(model)


@kind_without_effect
def seed() -> Iterator[Step]:
    model = Net()
    torch.manual_seed(0)
    yield step(model)
    torch.manual_seed(1)
    yield step(model)


@kind_without_effect
def threads() -> Iterator[Step]:
    model = Net()
    yield step(model)
    before = torch.get_num_threads()
    with setting(torch.set_num_threads, before + 1, before):
        yield step(model)


@kind
def threads_asked() -> Iterator[Step]:
    model = Net(lambda self, h: h * torch.get_num_threads())
    yield step(model)
    before = torch.get_num_threads()
    with setting(torch.set_num_threads, before + 1, before):
        yield step(model)


@kind
def recursion_limit_asked() -> Iterator[Step]:
    model = Net(lambda self, h: h * (1000 / sys.getrecursionlimit()))
    yield step(model)
    before = sys.getrecursionlimit()
    with setting(sys.setrecursionlimit, 2 * before, before):
        yield step(model)


@kind
def folder_asked() -> Iterator[Step]:
    model = Net(lambda self, h: h / len(os.getcwd()))
    yield step(model)
    with contextlib.chdir("/"):
        yield step(model)


# Arguments


@kind
def input_that_wants_a_gradient() -> Iterator[Step]:
    model = Net(lambda self, h: h * 1.0)
    yield step(model)
    yield Step(model, (rows().requires_grad_(),))


@kind
def another_type_of_an_argument() -> Iterator[Step]:
    model = Net()
    yield Step(model, (rows(), "double"))
    yield Step(model, (rows(), 1))


@kind
def true_and_one() -> Iterator[Step]:
    class Typed(Net):
        def forward(self, x: Tensor, flag: Any = None) -> Tensor:
            return super().forward(x) * (2 if flag is True else 3)

    model = Typed()
    yield Step(model, (rows(), True))
    yield Step(model, (rows(), 1))


@kind
def dtype_of_an_argument() -> Iterator[Step]:
    model = Net(lambda self, h: h)

    class Typed(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.double()) * (2 if x.dtype == torch.float32 else 3)

    model = Typed()
    yield Step(model, (rows(),))
    yield Step(model, (rows().float(),))


@kind_without_effect
def keyword_instead_of_position() -> Iterator[Step]:
    model = Net()
    yield step(model)
    yield Step(model, (), {"x": rows()})


@kind
def default_argument_given() -> Iterator[Step]:
    model = Net()
    yield step(model)
    yield Step(model, (rows(),), {"power": 4})


@kind
def default_argument_of_the_model() -> Iterator[Step]:
    class Model(Net):
        def forward(self, x: Tensor, by: float = 2.0) -> Tensor:  # type: ignore[override]
            return super().forward(x) * by

    model = Model()
    yield step(model)
    Model.forward.__defaults__ = (5.0,)
    yield step(model)


@kind
def enum_argument() -> Iterator[Step]:
    class Model(Net):
        def forward(self, x: Tensor, mode: Mode = Mode.DOUBLE) -> Tensor:  # type: ignore[override]
            return super().forward(x) * (2 if mode is Mode.DOUBLE else 3)

    model = Model()
    yield step(model)
    yield Step(model, (rows(), Mode.TRIPLE))


@kind
def contents_of_an_argument() -> Iterator[Step]:
    class Model(Net):
        def forward(self, x: Tensor, options: Any = None) -> Tensor:  # type: ignore[override]
            return super().forward(x) * options.power

    model, options = Model(), Settings()
    yield Step(model, (rows(), options))
    options.power = 5.0
    yield Step(model, (rows(), options))


@kind
def list_argument() -> Iterator[Step]:
    class Model(Net):
        def forward(self, x: Tensor, factors: Any = ()) -> Tensor:  # type: ignore[override]
            return super().forward(x) * factors[1]

    model, factors = Model(), [1.0, 2.0]
    yield Step(model, (rows(), factors))
    factors[1] = 5.0
    yield Step(model, (rows(), factors))


# The runner


def buffers_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.detach().clone() for name, buffer in model.named_buffers()}


def numbers(call: Callable[..., Any], step: Step) -> dict[str, Any]:
    """What a call gives: loss, gradients, buffers; gradients are cleared and buffers put back."""
    model = step.model
    held = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    model.zero_grad(set_to_none=True)
    for argument in (a for a in step.args if isinstance(a, Tensor)):
        argument.grad = None
    try:
        with step.around():
            loss = call(*step.args, **step.kwargs)
        if not step.outputs_only:
            loss.backward()
        gradients = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
        inputs = [a.grad for a in step.args if isinstance(a, Tensor)]
        return {"loss": loss.detach().clone(), **gradients, **buffers_of(model), "inputs": inputs}
    finally:
        model.zero_grad(set_to_none=True)
        with torch.no_grad():
            for buffer, value in held:
                buffer.copy_(value)


def assert_equal(seen: dict[str, Any], expected: dict[str, Any]) -> None:
    assert seen.keys() == expected.keys()
    for name, value in expected.items():
        if name == "inputs" or value is None:
            assert [g is None for g in seen["inputs"]] == [g is None for g in expected["inputs"]]
            assert value is not None or seen[name] is None, f"{name} has a gradient, eager has none"
            for g, w in zip(seen["inputs"], expected["inputs"], strict=True):
                assert g is None or torch.allclose(g, w), "gradient of an input"
            continue
        assert seen[name] is not None, f"{name} has no gradient"
        low = {torch.float64: 1e-9, torch.float32: 2e-2}.get(value.dtype, 2e-2)
        torch.testing.assert_close(
            seen[name], value, rtol=low, atol=low, msg=lambda message, name=name: f"{name}: {message}"
        )


def differ(one: dict[str, Any], other: dict[str, Any]) -> bool:
    if one.keys() != other.keys():
        return True
    for name, value in one.items():
        there = other[name]
        if isinstance(value, Tensor) and isinstance(there, Tensor):
            alike = value.dtype == there.dtype and value.shape == there.shape
            if not alike or not torch.allclose(value, there, rtol=1e-11, atol=1e-14):
                return True
        elif (value is None) != (there is None) or (
            isinstance(value, list) and [v is None for v in value] != [v is None for v in there]
        ):
            return True
    return False


@pytest.fixture(autouse=True)
def hooks_are_put_back() -> Iterator[None]:
    kept = copy.copy(torch_module._global_is_full_backward_hook)
    yield
    torch_module._global_is_full_backward_hook = kept


@pytest.mark.filterwarnings("ignore:Full backward hook is firing", "ignore:dropout2d")
@pytest.mark.parametrize("microbatches", [1, 2] if LONG else [2])
@pytest.mark.parametrize("name", KINDS)
def test_a_change_between_calls(name: str, microbatches: int) -> None:
    steps = KINDS[name]()
    with contextlib.closing(steps):  # type: ignore[type-var]
        first = next(steps)
        pipe = pipecompile.compile(first.model, ["cpu", "cpu"], microbatches=microbatches, costs="count")
        before = expected = numbers(first.model, first)
        assert_equal(numbers(pipe, first), before)
        for after in steps:
            expected = numbers(after.model, after)
            assert name in SAME or differ(before, expected), "the change changes nothing"
            if after.refused:
                with pytest.raises(PipecompileError, match="; "):
                    numbers(pipe, after)
                continue
            with contextlib.suppress(*[PipecompileError] * after.may_be_refused):
                assert_equal(numbers(pipe, after), expected)


def test_a_variable_of_the_environment_that_is_not_read_may_change(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net(lambda self, h: h * float(os.environ.get("PIPECOMPILE_TEST_FACTOR", "1")))
    pipe = pipecompile.compile(model, ["cpu", "cpu"], costs="count")
    pipe(rows())
    monkeypatch.setenv("PIPECOMPILE_TEST_OTHER", "3")
    pipe(rows())
    assert len(pipe.pipeline.report.captures) == 1


def test_values_of_the_environment_are_not_in_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net(lambda self, h: h * len(os.environ["PIPECOMPILE_TEST_TOKEN"]))
    monkeypatch.setenv("PIPECOMPILE_TEST_TOKEN", "hunter2")
    pipe = pipecompile.compile(model, ["cpu", "cpu"], costs="count")
    pipe(rows())
    monkeypatch.setenv("PIPECOMPILE_TEST_TOKEN", "hunter22")
    pipe(rows())
    assert pipe.pipeline.report.captures[1] == "2: os.environ['PIPECOMPILE_TEST_TOKEN'] changed"
    assert "hunter" not in str(pipe.pipeline.report)


@pytest.mark.parametrize("kind", [threading.local, Own])
def test_a_batch_that_a_local_of_a_thread_holds_is_not_kept(kind: type[threading.local]) -> None:
    model = Net(lambda self, h: h * self.held.factor)
    model.second.held = held = kind()
    held.factor = 2.0
    pipe = pipecompile.compile(model, ["cpu", "cpu"], microbatches=2, costs="count")
    batches = []
    for seed in range(3):
        held.batch = rows(seed=seed)
        batches.append(weakref.ref(held.batch))
        torch.testing.assert_close(pipe(held.batch), model(held.batch))
    del held.batch
    gc.collect()
    assert len(pipe.pipeline.report.captures) == 1
    assert not any(batch() is not None for batch in batches)


def test_a_local_is_read_in_the_thread_of_the_call() -> None:
    model = Net(lambda self, h: h * OF_THIS_THREAD.factor)
    pipe = pipecompile.compile(model, ["cpu", "cpu"], microbatches=2, costs="count")
    torch.testing.assert_close(pipe(rows()), model(rows()))
    losses = []

    def elsewhere() -> None:
        OF_THIS_THREAD.factor = 3.0
        losses.extend([pipe(rows()), model(rows())])

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(pipe(rows()), model(rows()))


def test_what_a_forward_writes_into_an_array_is_refused_and_undone() -> None:
    def counts(self: Any, h: Tensor) -> Tensor:
        self.counts[0] += 1
        return h * self.counts[0]

    model = Net(counts)
    model.second.counts = np.zeros(3)
    pipe = pipecompile.compile(model, ["cpu", "cpu"], costs="count")
    with pytest.raises(PipecompileError, match=r"forward writes into .* in place, .*; keep the numbers in a buffer"):
        pipe(rows())
    assert model.second.counts.tolist() == [0, 0, 0]


def test_what_a_forward_writes_into_a_large_array_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(raw_data, "LARGEST", 16)

    def counts(self: Any, h: Tensor) -> Tensor:
        self.counts[0] += 1
        return h * self.counts[0]

    model = Net(counts)
    model.second.counts = np.zeros(3)
    pipe = pipecompile.compile(model, ["cpu", "cpu"], costs="count")
    with pytest.raises(PipecompileError, match=r"\(too large to be put back\) in place, and .*; keep the numbers"):
        pipe(rows())


def test_a_large_array_is_guarded_by_a_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(raw_contents, "LARGEST", 16)
    values = np.arange(100.0)
    before = raw_contents.raw_contents(values)
    assert len(before.data) < values.nbytes
    values[50] = 0.5
    assert raw_contents.raw_contents(values) != before
    values[50] = 50.0
    assert raw_contents.raw_contents(values) == before


def test_the_guards_of_an_array_share_a_copy() -> None:
    values = [np.arange(10.0), array("d", [1.0]), bytearray(b"abc"), memoryview(b"abc"), np.ones((2, 3)).T]
    for value in values:
        assert raw_contents.raw_contents(value) is (held := raw_contents.raw_contents(value)), held


def test_a_memory_map_is_compared_by_its_file_and_never_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "table"
    np.ones(8).tofile(path)
    model = Net(lambda self, h: h * float(self.table[2] + np.asarray(self.row)[1]))
    table = model.second.table = np.memmap(path, dtype=float, mode="r")
    model.second.row = table[4:6]
    read: list[Any] = []
    monkeypatch.setattr(raw_contents, "_kept", read.append)
    pipe = pipecompile.compile(model, ["cpu", "cpu"], microbatches=2, costs="count")
    for _ in range(2):
        torch.testing.assert_close(pipe(rows()), model(rows()))
    assert len(pipe.pipeline.report.captures) == 1
    writing = np.memmap(path, dtype=float, mode="r+")
    writing[5] = 3.0
    writing.flush()
    os.utime(path, ns=(0, 0))  # a clock of the file system may be too coarse to tell two moments apart
    torch.testing.assert_close(pipe(rows()), model(rows()))
    assert len(pipe.pipeline.report.captures) == 2
    model.second.row = table[2:4]
    torch.testing.assert_close(pipe(rows()), model(rows()))
    assert not read


def test_what_a_forward_writes_into_a_shared_number_is_refused_and_undone() -> None:
    def counts(self: Any, h: Tensor) -> Tensor:
        self.shared.value += 1
        return h

    model = Net(counts)
    model.second.__dict__["shared"] = multiprocessing.Value("d", 2.0)
    pipe = pipecompile.compile(model, ["cpu", "cpu"], costs="count")
    with pytest.raises(
        PipecompileError, match=r"forward writes into second\.\w+ in place, .*; keep the numbers in a buf"
    ):
        pipe(rows())
    assert model.second.shared.value == 2


def test_a_global_that_hides_a_builtin_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net(lambda self, h: h * pow)
    monkeypatch.setitem(globals(), "pow", 2.0)
    pipe = pipecompile.compile(model, ["cpu", "cpu"], microbatches=2, costs="count")
    before = numbers(pipe, step(model))
    assert_equal(before, numbers(model, step(model)))
    monkeypatch.setitem(globals(), "pow", 3.0)
    after = numbers(model, step(model))
    assert differ(before, after)
    assert_equal(numbers(pipe, step(model)), after)


def test_callbacks_of_the_garbage_collector_are_no_code_of_the_model() -> None:
    """Test runners and profilers have some, which read and set variables of their own."""
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)), torch.randn(4, 4)
    collections = [0]

    def counting(phase: str, info: Any) -> None:
        collections[0] += 1

    class Collects(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            lists = [[x] for _ in range(3000)]  # enough for a collection
            return lists[0][0] * 1.0

    gc.callbacks.append(counting)
    try:
        pipe = pipecompile.compile(nn.Sequential(Collects(), model), ["cpu", "cpu"], microbatches=1, costs="count")
        for _ in range(3):
            gc.collect()
            torch.testing.assert_close(pipe(x), model(x))
    finally:
        gc.callbacks.remove(counting)
    assert collections[0] >= 3
    assert pipe.pipeline.captures == 1
