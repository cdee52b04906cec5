"""Places that a trace has read a value from: what is there before a call is compared with what was there then."""

from __future__ import annotations

import reprlib
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from types import CellType, FunctionType
from typing import Any, Protocol

from torch import Tensor

from pipecompile.capture.state.fingerprints import MISSING, SCALARS, Nothing, Same, imprint


class Place(Protocol):
    """Somewhere that a value stands; ``label`` is what a person calls it."""

    @property
    def label(self) -> str: ...

    def value(self) -> Any: ...


@dataclass(frozen=True, slots=True)
class Attribute:
    """One attribute of one object; ``label`` is what a person calls it: ``h.0.attn.scale``."""

    owner: Any
    name: str
    label: str

    def value(self) -> Any:
        return getattr(self.owner, self.name, MISSING)


@dataclass(frozen=True, slots=True)
class Entry:
    """One key of a namespace: a global of a file, an attribute in an object's ``__dict__``."""

    namespace: dict[str, Any]
    name: str
    label: str

    def value(self) -> Any:
        return self.namespace.get(self.name, MISSING)


@dataclass(frozen=True, slots=True)
class Cell:
    """A variable of an outer function that an inner one reads."""

    cell: CellType
    label: str

    def value(self) -> Any:
        try:
            return self.cell.cell_contents
        except ValueError:  # empty
            return MISSING


@dataclass(frozen=True, slots=True)
class OfClass:
    """What a class, with those that it inherits from, has under a name: a function, a property, a value."""

    kind: type
    name: str
    label: str

    def value(self) -> Any:
        return next((vars(base)[self.name] for base in self.kind.__mro__ if self.name in vars(base)), MISSING)


@dataclass(frozen=True, slots=True)
class Code:
    """What a function does: its code, and its default arguments.

    A dict of tensors among these, or an empty one, is a table that the forward fills, and is known by identity.
    """

    function: FunctionType

    @property
    def label(self) -> str:
        return f"the code or the defaults of {self.function.__qualname__}"

    def value(self) -> Any:
        function = self.function
        named = function.__kwdefaults__ or {}
        defaults = [_default(value) for value in function.__defaults__ or ()]
        return function.__code__, defaults, {name: _default(value) for name, value in named.items()}


def _default(value: Any) -> Any:
    table = isinstance(value, dict) and (not value or any(isinstance(item, Tensor) for item in value.values()))
    return Same(value) if table else value


@dataclass(frozen=True, slots=True)
class Answer:
    """What a function without arguments says: ``torch.is_grad_enabled()``."""

    function: Callable[[], Any]
    label: str

    def value(self) -> Any:
        return self.function()


@dataclass(frozen=True, slots=True)
class Fact:
    """What stood in a place when a trace was taken, which holds as long as that stands there."""

    place: Place
    imprint: Any
    shown: str

    @staticmethod
    def of(place: Place) -> Fact:
        """The fact that a place holds what it does now."""
        value = place.value()
        return Fact(place, imprint(value), shown(value))

    def changed(self) -> str:
        """How the place differs; empty if it does not."""
        value = self.place.value()
        if imprint(value) == self.imprint:
            return ""
        now = shown(value)
        if now == self.shown or isinstance(self.place, Code):
            return f"{self.place.label} changed"
        return f"{self.place.label} is {now}, the trace holds for {self.shown}"


def shown(value: Any) -> str:
    """A value, short; objects by their class, for an object's own ``__repr__`` may do anything."""
    if isinstance(value, Same):
        value = value.value
    return _REPR.repr(value)


class _Repr(reprlib.Repr):
    def repr_instance(self, x: Any, level: int) -> str:
        plain = type(x) in SCALARS or isinstance(x, Enum | Nothing)
        return f"{x!r:.60}" if plain else f"<{getattr(x, '__qualname__', type(x).__qualname__)}>"


_REPR = _Repr()
_REPR.maxlist = _REPR.maxdict = _REPR.maxtuple = _REPR.maxset = 8
_REPR.maxstring = _REPR.maxother = 60
