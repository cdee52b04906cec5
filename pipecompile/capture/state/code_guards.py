"""Guards on code: the functions that ran, and what they read other than their arguments.

Each function that ran is guarded by its code and its defaults, and by the present values of what it reads: globals,
variables of outer functions, and attributes of classes, functions and tensors. So a replaced function in a module, a
method set on a class and a flag set in a module, on a function or on a parameter are detected before the next call.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Set
from types import CellType, CodeType, FrameType, FunctionType
from typing import Any

from torch import Tensor, nn

from pipecompile.capture.state.executed_code import Ran
from pipecompile.capture.state.fingerprints import HEAP_TYPE
from pipecompile.capture.state.name_accesses import Accesses, places_read
from pipecompile.capture.state.namespaces import is_foreign
from pipecompile.capture.state.sources import Cell, Code, Entry, Fact, Names, OfClass, Place

_ALWAYS = frozenset({"forward", "__call__", "__getattr__", "__getattribute__"})  # looked up without being named


class CodeRead:
    """What the functions of one trace read.

    Args:
        ran: The functions that ran.
    """

    def __init__(self, ran: Ran) -> None:
        self.ran = ran
        self._accesses: dict[int, tuple[CodeType, Accesses]] = {}

    def begun(self, frame: FrameType, in_leaf: bool = False) -> Iterator[tuple[Any, str]]:
        """Yields the values that a function which starts to run may read, with labels for the user.

        Of a function that a leaf defines itself, the outer variables are the leaf's own: einops parses a pattern with
        a function inside a method, and fills the object that it makes.
        """
        own = in_leaf and self.ran.defines(frame.f_code)

        def outer(name: str) -> Place | None:
            return None if own else Entry(frame.f_locals, name, name)

        for place in places_read(self._of(frame.f_code), frame.f_globals, outer):
            yield place.value(), place.label

    def stored(self) -> tuple[set[str], set[str]]:
        """Returns the names of attributes that the functions set, and those that they may set by other means."""
        found = [self._of(function.__code__) for function in self.ran.functions.values()]
        return {name for it in found for name in it.stored}, {name for it in found for name in it.spelled}

    def facts(
        self, kinds: Iterable[type], held: Iterable[tuple[Any, str]], known: Set[Any], containers: Container[int]
    ) -> list[Fact]:
        """Returns the present values of the places that the functions read.

        Args:
            kinds: Classes of objects that forward has used.
            held: Functions and tensors that forward may have read from objects, with labels: reads of their attributes
                are not observed.
            known: Places, by namespace and name, that are guarded elsewhere.
            containers: Containers, by identity, that are guarded elsewhere.
        """
        functions = [function for function in self.ran.functions.values() if not self.ran.made_meanwhile(function)]
        places: dict[Any, Place] = {}
        names = set(_ALWAYS)
        for function in functions:
            accesses = self._of(function.__code__)
            names |= accesses.attributes
            for place in (
                Code(function),
                *places_read(accesses, function.__globals__, _outer(function)),
            ):
                places[_key(place)] = place
        classes = {*kinds, *(value for place in places.values() if _is_class(value := place.value()))}
        for place in _of_classes(classes, names):
            places[_key(place)] = place
        read = [value for place in places.values() if isinstance(value := place.value(), FunctionType)]
        named = [(function, function.__qualname__) for function in (*functions, *read)]
        for place in _of_unobserved({id(owner): (owner, label) for owner, label in (*held, *named)}, names, known):
            places[_key(place)] = place
        return [
            Fact.of(place)
            for key, place in places.items()
            if key not in known and id(place.value()) not in containers and not _is_known(place, known)
        ]

    def _of(self, code: CodeType) -> Accesses:
        if id(code) not in self._accesses:
            self._accesses[id(code)] = code, Accesses.of(code)
        return self._accesses[id(code)][1]


def _outer(function: FunctionType) -> Any:
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    return lambda name: Cell(cells[name], f"{name} of {function.__qualname__}") if name in cells else None


def _key(place: Any) -> Any:
    match place:
        case Entry():
            return id(place.namespace), place.name
        case Cell():
            return id(place.cell)
        case Code():
            return id(place.function), Code
        case Names():
            return id(place.owner), Names
        case _:
            return id(getattr(place, "kind", None) or getattr(place, "owner", place)), place.name


def _is_known(place: Place, known: Set[Any]) -> bool:
    return isinstance(place, OfClass) and any((id(base), place.name) in known for base in place.kind.__mro__)


def known_place(owner: Any, name: str) -> Any:
    """Returns the key under which facts know a place: an attribute of an object, class or file, or a cell."""
    if isinstance(owner, CellType):
        return id(owner)
    return id(owner if isinstance(owner, type) else getattr(owner, "__dict__", owner)), name


def _of_classes(kinds: Iterable[type], names: set[str]) -> Iterator[OfClass]:
    """Yields the names that functions look up and that the classes define."""
    for kind in {*kinds, Tensor}:
        own = {name for base in kind.__mro__ if base not in (nn.Module, object) for name in vars(base)}
        for name in sorted(names & (own | _ALWAYS)):
            yield OfClass(kind, name, f"{kind.__qualname__}.{name}")


def _of_unobserved(owners: Mapping[int, tuple[Any, str]], names: Set[str], known: Set[Any]) -> Iterator[Entry | Names]:
    """Yields the names that code mentions in functions and tensors: those that one has, and which these are."""
    mentioned = frozenset(names)  # one set for all
    for owner, label in owners.values():
        if isinstance(owner, FunctionType) and is_foreign(owner.__module__):
            continue
        held = vars(owner)
        for name in held.keys() & names:
            yield Entry(held, name, f"{label}.{name}")
        own = {key[1] for key in known if isinstance(key, tuple) and key[0] == id(held)} if known else ()
        which = mentioned.difference(own) if own else mentioned
        yield Names(owner, which, f"the list of attributes of {label}")


def _is_class(value: Any) -> bool:
    return isinstance(value, type) and bool(value.__flags__ & HEAP_TYPE) and value.__module__.split(".")[0] != "torch"
