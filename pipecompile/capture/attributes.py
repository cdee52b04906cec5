"""What a capture knows of Python attributes: which values its trace holds for, and what the forward makes of them.

A forward that reads ``self.flag`` has another graph for another flag. So each plain attribute that the trace has read,
of modules and of the objects that they hold (a config), is guarded by its value before the call.

A forward that sets ``self.calls += 1`` does so once a call. The trace undoes its changes; the pipeline makes them
after each call, once for the whole batch, as the unsplit model does. A number that a forward both reads and sets is
guarded by the answers to what the forward asked of it (``numbers.py``): its value is another on each call.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from types import BuiltinFunctionType, FunctionType, NoneType, SimpleNamespace
from typing import Any

import torch
from torch import nn

from pipecompile.capture.containers import clone, contents, kind_of, refill
from pipecompile.capture.symbols import resolve

TABLES = frozenset({"_parameters", "_buffers", "_modules"})  # what a module keeps its tensors and children in
TORCHS_OWN = frozenset(nn.Module().__dict__) | {"_compiled_call_impl"}  # attributes of every module
LONGEST = 64  # a longer list or dict is data, and not compared

_SCALARS = frozenset({bool, int, float, complex, str, bytes, NoneType, torch.dtype, torch.device, torch.memory_format})
_NAMED = (Enum, FunctionType, BuiltinFunctionType, type)  # known by identity


class _Nothing:
    """The value of an attribute that is not there, or is no plain value; equal to itself alone."""

    def __repr__(self) -> str:
        return "nothing"


MISSING = _Nothing()
NOT_PLAIN = _Nothing()


@dataclass(frozen=True, slots=True)
class Attribute:
    """One attribute of one object; ``label`` is what a person calls it: ``h.0.attn.scale``."""

    owner: Any
    name: str
    label: str

    def value(self) -> Any:
        return getattr(self.owner, self.name, MISSING)


@dataclass(frozen=True, slots=True)
class State:
    """What an update is computed from: the numbers before the call, and the sizes of the whole batch."""

    numbers: Mapping[tuple[int, str], float]
    sizes: Mapping[Any, int]


Update = Callable[[State], Any]


@dataclass(frozen=True)
class Attributes:
    """Guards and updates of a capture.

    ``questions`` holds functions of the ``numbers`` with the answers that the trace holds for. An update sets an
    attribute, or the contents of the list, dict or set that it holds.
    """

    read: tuple[tuple[Attribute, Any], ...] = ()  # with the frozen value
    numbers: tuple[Attribute, ...] = ()
    questions: tuple[tuple[Update, Any], ...] = ()
    updates: tuple[tuple[Attribute, Update], ...] = ()
    _fast: list[tuple[Any, str, Any, type]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._fast.extend((a.owner, a.name, value, type(value)) for a, value in self.read)

    def changed(self) -> str:
        """Why the trace does not hold for the attributes' present values; empty if it does."""
        for owner, name, expected, kind in self._fast:
            seen = getattr(owner, name, MISSING)
            if seen is expected or (type(seen) is kind and seen == expected and kind is not tuple):
                continue
            if kind is not tuple or frozen(seen) != expected:
                label = next(a.label for a, _ in self.read if a.owner is owner and a.name == name)
                return f"{label} is {_short(seen)}, the trace holds for {_short(expected)}"
        return self._changed_answer() if self.numbers else ""

    def _changed_answer(self) -> str:
        state = self._state({})
        for number in self.numbers:
            if type(number.value()) not in (int, float):
                return f"{number.label} is {_short(number.value())}, the trace holds for numbers"
        for question, answer in self.questions:
            if question(state) != answer:
                asked = ", ".join(f"{number.label} = {number.value()}" for number in self.numbers)
                return f"a question that forward asks of {asked} has another answer than in the trace"
        return ""

    def update(self, sizes: Mapping[Any, int]) -> None:
        """Makes the changes that one run of the forward on the whole batch makes."""
        state = self._state(sizes)
        for attribute, value in [(attribute, update(state)) for attribute, update in self.updates]:
            held = attribute.value()
            if kind_of(value) is not None and type(held) is type(value):
                refill(held, contents(value))
            else:
                setattr(attribute.owner, attribute.name, value)

    def _state(self, sizes: Mapping[Any, int]) -> State:
        return State({(id(n.owner), n.name): n.value() for n in self.numbers}, sizes)


def frozen(value: Any) -> Any:
    """A plain value in a form that later changes do not reach, and that compares; NOT_PLAIN for all else."""
    kind = type(value)
    if kind in _SCALARS or isinstance(value, _NAMED):
        return value
    if isinstance(value, set | frozenset):
        return (kind, frozenset(value)) if all(type(item) in _SCALARS for item in value) else NOT_PLAIN
    items = _items(value)
    if items is None or len(items) > LONGEST:
        return NOT_PLAIN
    parts = tuple((type(item), frozen(item)) for item in items)  # for 1 == True
    return NOT_PLAIN if any(part is NOT_PLAIN for _, part in parts) else (kind, parts)


def _items(value: Any) -> list[Any] | None:
    """What a container or a record without methods of its own holds."""
    if isinstance(value, list | tuple):
        return list(value)
    if isinstance(value, dict):
        return list(value.items())
    if isinstance(value, SimpleNamespace | Namespace):
        return list(vars(value).items())
    if is_dataclass(value) and not hasattr(value, "__dict__"):
        return [getattr(value, f.name, None) for f in fields(value)]
    return None


def constant(value: Any) -> Update | None:
    """The update to a plain value or to a size; None for other values, such as tensors."""
    if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
        return lambda state: resolve(value, dict(state.sizes))
    if frozen(value) is NOT_PLAIN:
        return None
    return (lambda state: clone(value)) if kind_of(value) is not None else (lambda state: value)


def _short(value: Any) -> str:
    return f"{value!r:.60}"
