"""A fast check of guards: the same objects are in the same places.

A sweep compares by identity, at the speed of C. It may report a change that does not matter (an equal number that was
set again); the caller then checks closely and creates a new sweep. It never misses a change.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from operator import attrgetter, contains, eq, itemgetter
from types import CellType, FunctionType, MappingProxyType, ModuleType
from typing import Any

import torch
from torch import nn

from pipecompile.capture.state.containers import kind_of
from pipecompile.capture.state.fingerprints import ASKED, HEAP_TYPE, MISSING, imprint
from pipecompile.capture.state.identities import identities
from pipecompile.capture.state.namespaces import Variables
from pipecompile.capture.state.raw_contents import is_raw, raw_contents
from pipecompile.capture.state.sources import Attribute, Cell, Code, Entry, Names, OfClass

FEW = 24  # a class with at most this many names is compared as a whole

_CODE = attrgetter("__code__", "__defaults__", "__kwdefaults__")
_TENSOR = attrgetter("requires_grad", "dtype", "shape")
_CHECKS: Any = getattr(getattr(torch._C, "_dynamo", None), "guards", None)  # torch.compile's, in C++


class Sweep:
    """The present contents of namespaces, containers and functions.

    Args:
        namespaces: ``__dict__`` of objects; all entries are compared, in any order.
        ignored: Names in the namespaces that are not compared.
        containers: Dicts, lists and sets; all items are compared, in order.
        objects: Objects whose class is compared.
        tensors: Tensors whose shape, dtype and ``requires_grad`` are compared.
        places: Other places to compare.
        apart: Identities of namespaces that the caller checks itself.
    """

    def __init__(
        self,
        namespaces: Iterable[Mapping[str, Any]] = (),
        ignored: frozenset[str] = frozenset(),
        containers: Iterable[Any] = (),
        objects: Sequence[Any] = (),
        tensors: Sequence[Any] = (),
        places: Iterable[Any] = (),
        apart: frozenset[int] = frozenset(),
    ) -> None:
        self._ignored, self._apart = ignored, apart
        self._objects, self._tensors = objects, tensors
        self._names: dict[int, tuple[Any, dict[str, None]]] = {}  # names to compare, by identity of the namespace
        self._whole: dict[int, Any] = {}  # namespaces to which nothing may be added
        self._absent: dict[tuple[int, str], tuple[Any, str]] = {}
        self._sequences: dict[Any, Any] = {}
        self._keys: dict[int, Any] = {}  # of dicts: an equal key is the same
        self._sets: dict[int, Any] = {}
        self._empty: dict[int, Any] = {}
        self._cells: list[Any] = []
        self._functions: list[FunctionType] = []
        self._live: list[Callable[[], Any]] = []  # values that must be computed to be compared
        self._raw: dict[int, Any] = {}  # arrays and bytes
        for namespace in namespaces:
            self._add_namespace(id(namespace), namespace)
        for place in places:
            self._add(place)
        for container in containers:
            self._add_container(container)
        self._getters = [(_getter(names), namespace) for namespace, names in self._names.values() if names]
        self._expected_keys = [*chain.from_iterable(self._keys.values())]
        self._nowhere = [n for n, _ in self._absent.values()], [name for _, name in self._absent.values()]
        self._sizes = self._present_sizes()
        self._expect(tuple(self._present()))
        self._expected_tensors, self._quick = [*map(_TENSOR, self._tensors)], _quick_check(self._tensors)
        self._expected_sets = [set(held) for held in self._sets.values()]
        self._expected_live = [imprint(ask()) for ask in self._live]
        self._expected_raw = [*map(raw_contents, self._raw.values())]

    def follow(self) -> None:
        """Expects the present contents of the namespaces from now on, if nothing else has changed."""
        try:
            now, held = tuple(self._present()), self._expected
        except LookupError:
            return
        names = sum(len(get(namespace)) for get, namespace in self._getters)
        self._expect((*now[:names], *held[names:]))
        if not self.holds():
            self._expect(held)

    def _expect(self, objects: tuple[Any, ...]) -> None:
        self._expected, self._identities = objects, identities(objects)  # valid while the objects are kept alive

    def holds(self) -> bool:
        """Whether nothing has changed."""
        try:
            return (
                not any(self._empty.values())
                and not any(map(contains, *self._nowhere))
                and self._present_sizes() == self._sizes
                and [*chain.from_iterable(self._keys.values())] == self._expected_keys
                and identities(tuple(self._present())) == self._identities
                and self._tensors_hold()
                and all(map(set.__eq__, self._sets.values(), self._expected_sets))
                and all(imprint(ask()) == seen for ask, seen in zip(self._live, self._expected_live, strict=True))
                and all(map(eq, map(raw_contents, self._raw.values()), self._expected_raw))
            )
        except Exception:  # something is missing or cannot be compared: the caller checks closely
            return False

    def _tensors_hold(self) -> bool:
        if self._quick(*self._tensors):
            return True
        if [*map(_TENSOR, self._tensors)] != self._expected_tensors:
            return False
        self._quick = _quick_check(self._tensors)  # the last one was created under other modes of torch
        return True

    def _present_sizes(self) -> list[int]:
        return [*map(len, self._whole.values()), *map(len, self._sequences.values())]

    def _present(self) -> Iterable[Any]:
        return chain(
            chain.from_iterable([get(namespace) for get, namespace in self._getters]),
            chain.from_iterable(self._sequences.values()),
            [cell.cell_contents for cell in self._cells],
            chain.from_iterable(map(_CODE, self._functions)),
            map(type, self._objects),
        )

    def _add(self, place: Any) -> None:
        match place:
            case _ if isinstance(place.value(), ASKED):
                self._live.append(place.value)
            case Attribute(owner=threading.local()):
                self._live.append(place.value)
            case Entry():
                self._add_name(id(place.namespace), place.namespace, place.name)
            case Names():
                self._add_namespace(id(vars(place.owner)), vars(place.owner))
            case OfClass():
                self._add_class(place.kind, place.name)
            case Attribute(owner=CellType() as cell):
                self._cells.append(cell)
            case Attribute() if isinstance(place.owner, ModuleType | Variables) and place.name in vars(place.owner):
                self._add_name(id(vars(place.owner)), vars(place.owner), place.name)
            case Attribute() if _is_kept(place):
                self._add_namespace(id(place.owner.__dict__), place.owner.__dict__)
                self._add_class(type(place.owner), place.name)
            case Attribute() if _is_missing(place):
                held = place.owner.__dict__
                for namespace in (held, *(held[table] for table in ("_parameters", "_buffers", "_modules"))):
                    self._add_name(id(namespace), namespace, place.name)
                self._add_class(type(place.owner), place.name)
            case Attribute(owner=type() as kind) if any(place.name in vars(base) for base in kind.__mro__):
                self._add_class(kind, place.name)
            case Cell() if place.value() is not MISSING:
                self._cells.append(place.cell)
            case Code():
                self._functions.append(place.function)
            case _:
                self._live.append(place.value)

    def _add_class(self, kind: type, name: str) -> None:
        for base in kind.__mro__:
            held = vars(base)  # a new object each time, so its key is the class
            if not base.__flags__ & HEAP_TYPE:  # cannot be changed
                continue
            if len(held) <= FEW:
                self._add_namespace(id(base), held)
            else:
                self._add_name(id(base), held, name)

    def _add_namespace(self, key: int, namespace: Any) -> None:
        if key in self._apart or key in self._whole:
            return
        self._whole[key] = namespace
        for name in namespace:
            if name not in self._ignored:
                self._add_name(key, namespace, name)

    def _add_name(self, key: int, namespace: Any, name: str) -> None:
        if key in self._apart:
            return
        if name in namespace:
            self._names.setdefault(key, (namespace, {}))[1][name] = None
        elif key not in self._whole:
            self._absent[key, name] = namespace, name

    def _add_container(self, container: Any) -> None:
        match container:
            case dict() | list() | set() | deque() if not container:
                self._empty[id(container)] = container
            case dict() | MappingProxyType():
                kind: Any = kind_of(container) or MappingProxyType
                self._keys[id(container)] = kind.keys(container)
                self._sequences[id(container)] = kind.values(container)
            case list() | deque():
                self._sequences[id(container)] = container
            case set():
                self._sets[id(container)] = container
            case _ if is_raw(container):
                self._raw[id(container)] = container
            case _:
                self._live.append(lambda: container)


def _getter(names: Iterable[str]) -> Callable[[Any], tuple[Any, ...]]:
    first, *others = names
    return itemgetter(first, *others) if others else itemgetter(first, first)


def _quick_check(tensors: Sequence[Any]) -> Callable[..., bool]:
    """Returns a fast check that tensors are as now, in the same modes of torch; it may always return False."""
    try:
        sizes, strides = [list(t.shape) for t in tensors], [list(t.stride()) for t in tensors]
        guards = _CHECKS.TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
        return guards.check if guards.check(*tensors) else lambda *_: False
    except Exception:  # sparse ones, or another torch
        return lambda *_: False


def _is_missing(attribute: Attribute) -> bool:
    """Whether a module lacks an attribute and looks it up with torch's own ``__getattr__``."""
    owner, kind = attribute.owner, type(attribute.owner)
    torchs = isinstance(owner, nn.Module) and kind.__getattr__ is nn.Module.__getattr__
    plain = getattr(kind, "__getattribute__", None) is object.__getattribute__
    return torchs and plain and attribute.value() is MISSING


def _is_kept(attribute: Attribute) -> bool:
    """Whether an attribute is in its owner's ``__dict__`` or class, not computed by ``__getattr__``."""
    owner, name = attribute.owner, attribute.name
    if isinstance(owner, ModuleType | type) or not hasattr(owner, "__dict__"):
        return False
    return name in owner.__dict__ or any(name in vars(base) for base in type(owner).__mro__)
