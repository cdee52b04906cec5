"""Guards and updates of Python attributes in a capture.

If forward reads ``self.flag``, another flag may need another graph. So each plain attribute that the trace has read, of
modules and of the objects they hold (a config), is guarded by its value before the call. Code, and what it reads
elsewhere, is guarded too (``code_guards.py``).

If forward runs ``self.calls += 1``, it must do so once per call. The trace undoes its changes; the pipeline makes them
after each call, once for the whole batch, as the unsplit model does. A number that forward both reads and sets differs
in each call, so it is guarded by the answers to what forward asked of it (``counters.py``).
"""

from __future__ import annotations

import operator
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from functools import cached_property
from types import BuiltinFunctionType, FunctionType, NoneType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from pipecompile.capture.state.containers import contents, kind_of
from pipecompile.capture.state.fast_check import Sweep
from pipecompile.capture.state.fingerprints import MISSING as MISSING
from pipecompile.capture.state.fingerprints import RECORDS, Nothing, imprint, same
from pipecompile.capture.state.fingerprints import Same as Same
from pipecompile.capture.state.python_random import Ahead, Draws
from pipecompile.capture.state.sources import Attribute as Attribute
from pipecompile.capture.state.sources import Entry, Fact

TABLES = frozenset({"_parameters", "_buffers", "_modules"})  # where a module keeps its tensors and children
TORCHS_OWN = frozenset(nn.Module().__dict__) | {"_compiled_call_impl", "_flat_weight_refs"}  # attributes set by torch
LONGEST = 64  # a longer list or dict counts as data and is not compared

_SCALARS = frozenset({bool, int, float, complex, str, bytes, NoneType, torch.dtype, torch.device, torch.memory_format})
_NAMED = (Enum, FunctionType, BuiltinFunctionType, type)  # known by identity


NOT_PLAIN = Nothing()


@dataclass(frozen=True, slots=True)
class Item:
    """The value under a key of a container; ``label`` is its name for the user: ``h.0.losses['aux']``."""

    holder: Place
    key: Any

    @property
    def label(self) -> str:
        return f"{self.holder.label}[{self.key!r:.20}]"

    def value(self) -> Any:
        try:
            return self.holder.value()[self.key]
        except (LookupError, TypeError):
            return MISSING


@dataclass(frozen=True, slots=True)
class Itself:
    """A container without a name, such as the default of an argument."""

    holder: Any
    label: str

    def value(self) -> Any:
        return self.holder


Place = Attribute | Item | Itself


@dataclass(frozen=True, slots=True)
class State:
    """What an update is computed from.

    Attributes:
        numbers: Numbers before the call, by identity of the owner and name.
        sizes: Sizes of the whole batch, by symbol.
        tensors: Tensors of the whole batch, by name of the graph's node or input.
        draws: Random numbers of Python and numpy, in the order in which forward draws them.
        built: Values built so far, so that a value shared by two places is built once.
    """

    numbers: Mapping[tuple[int, str], float]
    sizes: Mapping[Any, int]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    draws: tuple[Any, ...] = ()
    built: dict[int, Any] = field(default_factory=dict)


Update = Callable[[State], Any]


@dataclass(frozen=True)
class OfKind:
    """Any value of a type."""

    kind: type


@dataclass(frozen=True)
class Held:
    """What a trace has read from a container: values under keys, or all contents."""

    place: Place
    kind: type
    keys: tuple[tuple[Any, Any], ...]
    items: tuple[Any, ...] | None

    def changed(self) -> str:
        """Returns why the capture is not valid for the present contents; empty if it is."""
        now: Any = self.place.value()
        if type(self.place.value()) is not self.kind:
            return f"{self.place.label} is {_short(now)}, captured with a {self.kind.__name__}"
        for key, expected in self.keys:
            seen = now.get(key, MISSING) if issubclass(self.kind, dict) else key in now
            if not _alike(seen, expected):
                if isinstance(expected, Contents):
                    return f"{self.place.label}[{key!r:.20}] changed"
                return f"{self.place.label}[{key!r:.20}] is {_short(seen)}, captured with {_short(expected)}"
        if self.items is not None and not _all_alike(contents(now), self.items):
            return f"the contents of {self.place.label} differ from those in the capture"
        return ""


@dataclass(frozen=True)
class Operations:
    """What forward does to a container: methods of the built-in type with their arguments, in order."""

    place: Place
    steps: tuple[tuple[str, tuple[Update, ...]], ...]

    def ready(self, state: State) -> Callable[[], None]:
        """Computes the arguments. Returns a function that runs the operations."""
        holder, kind = self.place.value(), kind_of(self.place.value())
        steps = [(name, [argument(state) for argument in arguments]) for name, arguments in self.steps]

        def apply() -> None:
            for name, arguments in steps:
                getattr(kind, name)(holder, *arguments)

        return apply


@dataclass(frozen=True)
class Setting:
    """An attribute that forward sets or deletes."""

    place: Attribute
    to: Update

    def ready(self, state: State) -> Callable[[], None]:
        """Computes the value. Returns a function that sets or deletes the attribute."""
        value, owner, name = self.to(state), self.place.owner, self.place.name
        return (lambda: delattr(owner, name)) if value is MISSING else (lambda: setattr(owner, name, value))


Effect = Operations | Setting


@dataclass(frozen=True)
class Attributes:
    """Guards and updates of a capture.

    Attributes:
        read: Attributes that were read, with their frozen values.
        held: Reads of containers.
        numbers: Attributes with numbers that forward both reads and sets.
        questions: Functions of ``numbers``, with the answers for which the capture is valid.
        updates: Changes that forward makes: an attribute is set, or the contents of a list, dict or set change.
        draws: Random numbers of Python and numpy that forward draws.
        facts: Guards on code, and on what it reads elsewhere.
        apart: Identities of namespaces that the caller checks itself.
    """

    read: tuple[tuple[Attribute, Any], ...] = ()
    held: tuple[Held, ...] = ()
    numbers: tuple[Attribute, ...] = ()
    questions: tuple[tuple[Update, Any], ...] = ()
    updates: tuple[Effect, ...] = ()
    draws: Draws = field(default_factory=Draws)
    facts: tuple[Fact, ...] = ()
    apart: frozenset[int] = frozenset()
    _ahead: list[Ahead] = field(default_factory=list)  # what the present call draws
    _seen: list[tuple[Sweep, int]] = field(default_factory=list)  # the last sweep at which all guards held
    _fast: list[tuple[Attribute, Any, str, Any, type]] = field(default_factory=list)

    def __post_init__(self) -> None:
        for a, value in self.read:
            expected = value.value if isinstance(value, Same) else value.kind if isinstance(value, OfKind) else value
            self._fast.append((a, a.owner, a.name, expected, type(value)))

    def changed(self, state: int = -1) -> str:
        """Returns why the capture is not valid for the present state; empty if it is.

        Args:
            state: Version of the namespaces in ``apart``: while it is the same, nothing in them has changed. Without
                one, everything is checked closely.
        """
        sweep, seen = self._seen[0] if self._seen else (None, -1)
        quiet = state >= 0 and sweep is not None and sweep.holds()
        if not quiet or seen != state:
            if changed := self._looked_at(apart_alone=quiet):
                return changed
            kept = sweep if quiet and not self._holds_containers_apart else None
            self._seen[:] = [(kept or self._sweep(), state)]
        if self.draws.made:
            self._ahead[:] = [self.draws.ahead()]
        return self._changed_answer() if self.numbers or self.draws.made else ""

    @cached_property
    def are_followed(self) -> bool:
        """Whether there are updates of attributes, and none of these attributes is guarded by value."""
        places = [effect.place for effect in self.updates if isinstance(effect, Setting)]
        read = {(id(attribute.owner), attribute.name) for attribute, _ in self.read}
        return bool(places) and not any((id(place.owner), place.name) in read for place in places)

    @cached_property
    def _holds_containers_apart(self) -> bool:
        apart = [attribute for attribute, _ in self.read if self._is_apart(attribute)]
        return any(not isinstance(imprint(attribute.value()), Same) for attribute in apart) or bool(self.held)

    def _is_apart(self, place: Any) -> bool:
        owner = getattr(place, "owner", None)
        return id(place.namespace if isinstance(place, Entry) else getattr(owner, "__dict__", None)) in self.apart

    def _sweep(self) -> Sweep:
        """Returns a sweep of all places and of all containers in them."""
        places: list[Any] = [*(attribute for attribute, _ in self.read), *(fact.place for fact in self.facts)]
        containers: list[Any] = []
        for held in self.held:
            place: Place = held.place
            while isinstance(place, Item):
                containers.append(place.value())
                place = place.holder
            places.append(place)
        for place in places:
            imprint(place.value(), containers.append)
        return Sweep(places=places, containers=containers, apart=self.apart)

    def _looked_at(self, apart_alone: bool) -> str:
        """Checks closely. Returns what has changed in the namespaces ``apart``, or anywhere; empty if nothing."""
        for attribute, owner, name, expected, kind in self._fast:
            if apart_alone and not self._is_apart(attribute):
                continue
            seen = getattr(owner, name, MISSING)
            if seen is expected or (type(seen) is kind and seen == expected and kind is not tuple):
                continue
            if kind is OfKind and type(seen) is expected:
                continue
            if kind is not tuple or frozen(seen) != expected:
                label = attribute.label
                if kind is Same and type(seen) is type(expected):
                    return f"{label} is another {type(seen).__name__} than in the capture"
                return f"{label} is {_short(seen)}, captured with {_short(expected)}"
        if changed := next(filter(None, (held.changed() for held in self.held)), ""):
            return changed
        facts = (fact for fact in self.facts if not apart_alone or self._is_apart(fact.place))
        return next(filter(None, (fact.changed() for fact in facts)), "")

    def _changed_answer(self) -> str:
        state = self.state({}, {})
        for number in self.numbers:
            if type(number.value()) not in (int, float):
                return f"{number.label} is {_short(number.value())}, captured with a number"
        for question, answer in self.questions:
            if not same(question(state), answer):
                if not self.numbers:
                    return "what forward decides from a random number differs from the capture"
                asked = ", ".join(f"{number.label} = {number.value()}" for number in self.numbers)
                return f"what forward decides from {asked} differs from the capture"
        return ""

    def update(self, sizes: Mapping[Any, int], tensors: Mapping[str, Tensor]) -> None:
        """Makes the changes that one run of forward on the whole batch makes."""
        state = self.state(sizes, tensors)
        for apply in [effect.ready(state) for effect in self.updates]:
            apply()
        for ahead in self._ahead:
            ahead.take()
        self._ahead.clear()

    @contextmanager
    def tried(self) -> Iterator[None]:
        """A context in which the present call may run early: afterwards, its random numbers are still to be drawn."""
        ahead = [*self._ahead]
        try:
            yield
        finally:
            self._ahead[:] = ahead

    def state(self, sizes: Mapping[Any, int], tensors: Mapping[str, Tensor]) -> State:
        """Returns what the numbers and updates of the present call are computed from."""
        draws = self._ahead[0].values if self._ahead else ()
        return State({(id(n.owner), n.name): n.value() for n in self.numbers}, sizes, tensors, draws)


def frozen(value: Any) -> Any:
    """Returns a plain value in an immutable form that can be compared; ``NOT_PLAIN`` for any other value."""
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
    """Returns the items of a container or of a plain record."""
    if isinstance(value, list | tuple):
        return list(value)
    if isinstance(value, dict):
        return list(value.items())
    if isinstance(value, SimpleNamespace | Namespace):
        return list(vars(value).items())
    if is_dataclass(value) and not hasattr(value, "__dict__"):
        return [getattr(value, f.name, None) for f in fields(value)]
    return None


@dataclass(frozen=True)
class Contents:
    """The contents of an item of a container that forward has read, which is no container itself."""

    of: Any

    @staticmethod
    def kept(item: Any) -> Any:
        """The item itself, if nothing can change in it; its contents if something can."""
        if type(item) is tuple:
            kept = tuple(map(Contents.kept, item))
            return item if all(map(operator.is_, kept, item)) else kept
        return Contents(imprint(item)) if isinstance(item, RECORDS) else item


def _alike(seen: Any, expected: Any) -> bool:
    """Whether a value is the same as before; for a nested container, which has a ledger of its own, its type."""
    if isinstance(expected, Contents):
        return bool(imprint(seen) == expected.of)
    if seen is expected or (kind_of(expected) is not None and type(seen) is type(expected)):
        return True
    if type(seen) is type(expected) is tuple:
        return len(seen) == len(expected) and all(map(_alike, seen, expected))
    plain = frozen(expected)
    return plain is not NOT_PLAIN and type(seen) is type(expected) and bool(frozen(seen) == plain)


def _all_alike(now: Sequence[Any], before: Sequence[Any]) -> bool:
    return len(now) == len(before) and all(map(_alike, now, before))


def _short(value: Any) -> str:
    return f"{value!r:.60}"
