"""What a capture knows of Python attributes: which values its trace holds for, and what the forward makes of them.

A forward that reads ``self.flag`` has another graph for another flag. So each plain attribute that the trace has read,
of modules and of the objects that they hold (a config), is guarded by its value before the call, and so are code and
what it reads elsewhere (``code_guards.py``).

A forward that sets ``self.calls += 1`` does so once a call. The trace undoes its changes; the pipeline makes them
after each call, once for the whole batch, as the unsplit model does. A number that a forward both reads and sets is
guarded by the answers to what the forward asked of it (``counters.py``): its value is another on each call.
"""

from __future__ import annotations

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
from pipecompile.capture.state.fingerprints import Nothing, imprint, same
from pipecompile.capture.state.fingerprints import Same as Same
from pipecompile.capture.state.python_random import Ahead, Draws
from pipecompile.capture.state.sources import Attribute as Attribute
from pipecompile.capture.state.sources import Entry, Fact

TABLES = frozenset({"_parameters", "_buffers", "_modules"})  # what a module keeps its tensors and children in
TORCHS_OWN = frozenset(nn.Module().__dict__) | {"_compiled_call_impl", "_flat_weight_refs"}  # attributes of torch's
LONGEST = 64  # a longer list or dict is data, and not compared

_SCALARS = frozenset({bool, int, float, complex, str, bytes, NoneType, torch.dtype, torch.device, torch.memory_format})
_NAMED = (Enum, FunctionType, BuiltinFunctionType, type)  # known by identity


NOT_PLAIN = Nothing()


@dataclass(frozen=True, slots=True)
class Item:
    """What is kept under a key of a container; ``label`` is what a person calls it: ``h.0.losses['aux']``."""

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
    """A container that is known by no name, as the default of an argument."""

    holder: Any
    label: str

    def value(self) -> Any:
        return self.holder


Place = Attribute | Item | Itself


@dataclass(frozen=True, slots=True)
class State:
    """What an update is computed from: the numbers before the call, and the whole batch's sizes and tensors.

    ``built`` holds what has been made of it by now, so that what two places share is made once.
    """

    numbers: Mapping[tuple[int, str], float]
    sizes: Mapping[Any, int]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)  # by the names of the graph's nodes and inputs
    draws: tuple[Any, ...] = ()  # random numbers of Python and numpy, in the order in which forward draws them
    built: dict[int, Any] = field(default_factory=dict)


Update = Callable[[State], Any]


@dataclass(frozen=True)
class OfKind:
    """Any value of a type."""

    kind: type


@dataclass(frozen=True)
class Held:
    """What a trace has read of what a container holds: values under keys, or all of it."""

    place: Place
    kind: type
    keys: tuple[tuple[Any, Any], ...]
    items: tuple[Any, ...] | None

    def changed(self) -> str:
        """Why the trace does not hold for the present contents; empty if it does."""
        now: Any = self.place.value()
        if type(self.place.value()) is not self.kind:
            return f"{self.place.label} is {_short(now)}, the trace holds for a {self.kind.__name__}"
        for key, expected in self.keys:
            seen = now.get(key, MISSING) if issubclass(self.kind, dict) else key in now
            if not _alike(seen, expected):
                return f"{self.place.label}[{key!r:.20}] is {_short(seen)}, the trace holds for {_short(expected)}"
        if self.items is not None and not _all_alike(contents(now), self.items):
            return f"{self.place.label} holds other things than in the trace"
        return ""


@dataclass(frozen=True)
class Operations:
    """What a forward does to a container: methods of the built-in type, with arguments, one after the other."""

    place: Place
    steps: tuple[tuple[str, tuple[Update, ...]], ...]

    def ready(self, state: State) -> Callable[[], None]:
        """Makes the operations, once all arguments are known."""
        holder, kind = self.place.value(), kind_of(self.place.value())
        steps = [(name, [argument(state) for argument in arguments]) for name, arguments in self.steps]

        def apply() -> None:
            for name, arguments in steps:
                getattr(kind, name)(holder, *arguments)

        return apply


@dataclass(frozen=True)
class Setting:
    """An attribute that a forward sets, or takes away."""

    place: Attribute
    to: Update

    def ready(self, state: State) -> Callable[[], None]:
        """Sets the attribute, once the value is known."""
        value, owner, name = self.to(state), self.place.owner, self.place.name
        return (lambda: delattr(owner, name)) if value is MISSING else (lambda: setattr(owner, name, value))


Effect = Operations | Setting


@dataclass(frozen=True)
class Attributes:
    """Guards and updates of a capture.

    ``questions`` holds functions of the ``numbers`` with the answers that the trace holds for. An update sets an
    attribute, or changes what a list, dict or set holds.
    """

    read: tuple[tuple[Attribute, Any], ...] = ()  # with the frozen value
    held: tuple[Held, ...] = ()
    numbers: tuple[Attribute, ...] = ()
    questions: tuple[tuple[Update, Any], ...] = ()
    updates: tuple[Effect, ...] = ()
    draws: Draws = field(default_factory=Draws)
    facts: tuple[Fact, ...] = ()  # of code, and of what it reads elsewhere
    apart: frozenset[int] = frozenset()  # identities of the namespaces that the caller looks after
    _ahead: list[Ahead] = field(default_factory=list)  # what the present call draws
    _seen: list[tuple[Sweep, int]] = field(default_factory=list)  # the last look at which everything held
    _fast: list[tuple[Attribute, Any, str, Any, type]] = field(default_factory=list)

    def __post_init__(self) -> None:
        for a, value in self.read:
            expected = value.value if isinstance(value, Same) else value.kind if isinstance(value, OfKind) else value
            self._fast.append((a, a.owner, a.name, expected, type(value)))

    def changed(self, state: int = -1) -> str:
        """Why the trace does not hold for what stands in its places now; empty if it does.

        Args:
            state: that of the namespaces ``apart``: as long as it is the same, nothing in them has changed. Without one
                everything is looked at closely.
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
        """Whether there are updates of attributes, and none is one that the trace holds for."""
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
        """A sweep of all places, and of all containers in them."""
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
        """What has changed, by a close look; at what stands in namespaces apart alone, or everywhere."""
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
                    return f"{label} is another {type(seen).__name__} than in the trace"
                return f"{label} is {_short(seen)}, the trace holds for {_short(expected)}"
        if changed := next(filter(None, (held.changed() for held in self.held)), ""):
            return changed
        facts = (fact for fact in self.facts if not apart_alone or self._is_apart(fact.place))
        return next(filter(None, (fact.changed() for fact in facts)), "")

    def _changed_answer(self) -> str:
        state = self.state({}, {})
        for number in self.numbers:
            if type(number.value()) not in (int, float):
                return f"{number.label} is {_short(number.value())}, the trace holds for numbers"
        for question, answer in self.questions:
            if not same(question(state), answer):
                if not self.numbers:
                    return "a random number that forward draws leads elsewhere than in the trace"
                asked = ", ".join(f"{number.label} = {number.value()}" for number in self.numbers)
                return f"a question that forward asks of {asked} has another answer than in the trace"
        return ""

    def update(self, sizes: Mapping[Any, int], tensors: Mapping[str, Tensor]) -> None:
        """Makes the changes that one run of the forward on the whole batch makes."""
        state = self.state(sizes, tensors)
        for apply in [effect.ready(state) for effect in self.updates]:
            apply()
        for ahead in self._ahead:
            ahead.take()
        self._ahead.clear()

    @contextmanager
    def tried(self) -> Iterator[None]:
        """In which the present call may be run beforehand: at its end, what it draws is still to be drawn."""
        ahead = [*self._ahead]
        try:
            yield
        finally:
            self._ahead[:] = ahead

    def state(self, sizes: Mapping[Any, int], tensors: Mapping[str, Tensor]) -> State:
        """What the present call's numbers and updates are computed from."""
        draws = self._ahead[0].values if self._ahead else ()
        return State({(id(n.owner), n.name): n.value() for n in self.numbers}, sizes, tensors, draws)


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


def _alike(seen: Any, expected: Any) -> bool:
    """Whether a value is the one before; of a container in a container, its type: it has a ledger of its own."""
    if seen is expected or (kind_of(expected) is not None and type(seen) is type(expected)):
        return True
    plain = frozen(expected)
    return plain is not NOT_PLAIN and type(seen) is type(expected) and bool(frozen(seen) == plain)


def _all_alike(now: Sequence[Any], before: Sequence[Any]) -> bool:
    def same(a: Any, b: Any) -> bool:
        if type(a) is tuple and type(b) is tuple:
            return len(a) == len(b) and all(map(_alike, a, b))
        return _alike(a, b)

    return len(now) == len(before) and all(map(same, now, before))


def _short(value: Any) -> str:
    return f"{value!r:.60}"
