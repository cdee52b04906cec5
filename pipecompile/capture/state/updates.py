"""Recipes for the values that forward stores somewhere, computed from the tensors, sizes and numbers of a later call.

A value stored during a trace contains parts that are valid only in the trace: fake tensors, symbolic sizes, stand-ins.
Its recipe builds the same value for a real call, with new containers and objects. A value that several places share in
the trace is shared by them after the call too.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Collection, Sequence
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from pipecompile.capture.state.container_proxies import Ledger, is_stand_in, ledger_of
from pipecompile.capture.state.containers import contents, kind_of, refill
from pipecompile.capture.state.counters import is_number
from pipecompile.capture.state.guards import MISSING, Operations, Place, State, Update
from pipecompile.capture.state.namespaces import names_of, owns_names, put
from pipecompile.ops.symbols import resolve
from pipecompile.ops.tensor_args import is_real

Make = Callable[[State, Callable[[Any], None]], Any]  # announces the object before filling it: it may contain itself

_SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool)
_ATOMS = (str, bytes, bool, int, float, complex, type(None), type, ModuleType, FunctionType, MethodType, nn.Module)


class Recipes:
    """The recipes of one trace.

    Args:
        tensor: Returns the recipe for a tensor of the trace.
        known: Identities of containers that existed before the trace, which are not copied.
    """

    def __init__(self, tensor: Callable[[Tensor], Update], known: Collection[int]) -> None:
        self.tensor = tensor
        self.known = known
        self.found: dict[int, tuple[Any, Update]] = {}  # by identity, with the value, to keep it alive

    def of(self, value: Any) -> Update:
        """Returns the recipe for a value.

        Raises:
            CaptureError: The value contains a tensor that the trace has not recorded.
        """
        if is_number(value):
            return value.of  # type: ignore[no-any-return]
        if isinstance(value, _SYMBOLS):
            return lambda state: resolve(value, dict(state.sizes))
        if isinstance(value, _ATOMS) or value is MISSING:
            return lambda state: value
        if is_stand_in(value):
            place = ledger_of(value).place
            return lambda state: place.value()
        if id(value) not in self.found:
            made: list[Update] = []
            self.found[id(value)] = (value, lambda state: made[0](state))  # for a value that contains itself
            made.append(_shared(len(self.found), self._made(value)))
        return self.found[id(value)][1]

    def effect(self, ledger: Ledger) -> Operations:
        """Returns what a later call does to a container that has a ledger."""
        if ledger.is_set:
            return self.filling(ledger.place, ledger.original, contents(ledger.stand_in))
        clearing = [("clear", ())] if ledger.is_cleared else []
        steps = [(name, tuple(map(self.of, arguments))) for name, arguments in ledger.operations]
        return Operations(ledger.place, (*clearing, *steps))

    def filling(self, place: Place, holder: Any, items: Sequence[Any]) -> Operations:
        """Returns the operations that replace the contents of a container."""
        kind = kind_of(holder)
        steps: list[tuple[str, tuple[Update, ...]]]
        if issubclass(kind, dict):
            steps = [("__setitem__", (self.of(key), self.of(value))) for key, value in items]
        else:
            steps = [("update" if kind is set else "extend", (self.of(list(items)),))]
        return Operations(place, (("clear", ()), *steps))

    def _made(self, value: Any) -> Make:
        if isinstance(value, Tensor):
            of = self.tensor(value)
            return lambda state, _: of(state)
        if kind_of(value) is not None:
            return (lambda state, _: value) if id(value) in self.known else self._container(value)
        if isinstance(value, tuple | frozenset):
            return self._sequence(value)
        if self._holds_a_trace(value, set()):
            return self._object(value)
        return lambda state, _: value

    def _container(self, value: Any) -> Make:
        parts = [self._item(item) for item in contents(value)]
        names = {name: self.of(held) for name, held in _names(value).items()}
        empty = _empty(value)

        def make(state: State, announce: Callable[[Any], None]) -> Any:
            announce(new := empty())
            for name, of in names.items():
                put(new, name, of(state))
            refill(new, [part(state) for part in parts])
            return new

        return make

    def _item(self, item: Any) -> Update:
        """Returns the recipe for an item of a container; the pairs of a dict are not tuples of the model."""
        if type(item) is tuple:
            parts = [*map(self.of, item)]
            return lambda state: tuple(part(state) for part in parts)
        return self.of(item)

    def _sequence(self, value: Any) -> Make:
        parts, kind = [*map(self.of, value)], type(value)
        if hasattr(value, "_fields"):
            return lambda state, _: kind(*(part(state) for part in parts))
        return lambda state, _: kind([part(state) for part in parts])

    def _object(self, value: Any) -> Make:
        names = {name: self.of(held) for name, held in _names(value).items()}
        kind: Any = type(value)

        def make(state: State, announce: Callable[[Any], None]) -> Any:
            announce(new := kind.__new__(kind))
            for name, of in names.items():
                put(new, name, of(state))
            return new

        return make

    def _holds_a_trace(self, value: Any, seen: set[int]) -> bool:
        """Whether an object contains parts that are valid only in the trace."""
        if id(value) in seen or id(value) in self.known:
            return False
        seen.add(id(value))
        if is_number(value) or is_stand_in(value) or isinstance(value, _SYMBOLS):
            return True
        if isinstance(value, Tensor):
            return not is_real(value)
        if isinstance(value, _ATOMS):
            return False
        inner = [*_names(value).values()]
        if kind_of(value) is not None:
            inner += contents(value)
        elif isinstance(value, tuple | frozenset):
            inner += value
        return any(self._holds_a_trace(item, seen) for item in inner)


def _names(value: Any) -> dict[str, Any]:
    return names_of(value) if owns_names(value) else {}


def _empty(holder: Any) -> Callable[[], Any]:
    """Returns a function that creates an empty container of the same type."""
    kind: Any = type(holder)
    if isinstance(holder, deque):
        return partial(kind, maxlen=holder.maxlen)
    if isinstance(holder, defaultdict):
        return partial(kind, holder.default_factory)
    new: Any = kind_of(holder).__new__
    return partial(new, kind)


def _shared(number: int, make: Make) -> Update:
    """Returns an update that builds a value once for all places that share it."""

    def of(state: State) -> Any:
        if number not in state.built:
            state.built[number] = make(state, lambda value: state.built.__setitem__(number, value))
        return state.built[number]

    return of
