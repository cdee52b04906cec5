"""Places from which a trace has read values; before each call, their values are compared with those of the trace."""

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
    """A place that holds a value; ``label`` is its name for the user."""

    @property
    def label(self) -> str: ...

    def value(self) -> Any: ...


@dataclass(frozen=True, slots=True)
class Attribute:
    """One attribute of one object; ``label`` is its name for the user: ``h.0.attn.scale``."""

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
    """What a class or its bases define under a name: a function, a property, a value."""

    kind: type
    name: str
    label: str

    def value(self) -> Any:
        return next((vars(base)[self.name] for base in self.kind.__mro__ if self.name in vars(base)), MISSING)


@dataclass(frozen=True, slots=True)
class Code:
    """The code of a function and its default arguments.

    A default that is a dict of tensors, or an empty dict, is a table that forward fills; it is compared by identity.
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
class Names:
    """Which of some names an object has as attributes: ``getattr(f, "scale", 1)`` asks for one that may be absent."""

    owner: Any
    names: frozenset[str]
    label: str

    def value(self) -> Any:
        held = vars(self.owner)  # of thousands of tensors, most of which have none
        return ", ".join(sorted(name for name in held if name in self.names)) if held else ""


@dataclass(frozen=True, slots=True)
class Answer:
    """The return value of a function without arguments: ``torch.is_grad_enabled()``."""

    function: Callable[[], Any]
    label: str

    def value(self) -> Any:
        return self.function()


@dataclass(frozen=True, slots=True)
class Fact:
    """The value of a place at the time of a trace, which is valid while the place has this value."""

    place: Place
    imprint: Any
    shown: str

    @staticmethod
    def of(place: Place) -> Fact:
        """Returns the fact that a place has its present value."""
        value = place.value()
        return Fact(place, imprint(value), shown(value))

    def changed(self) -> str:
        """Returns how the place has changed; empty if it has not."""
        value = self.place.value()
        if imprint(value) == self.imprint:
            return ""
        now = shown(value)
        if now == self.shown or isinstance(self.place, Code):
            return f"{self.place.label} changed"
        return f"{self.place.label} is {now}, captured with {self.shown}"


def shown(value: Any) -> str:
    """Returns a short text for a value; for an object, its class, because its own ``__repr__`` may do anything."""
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
