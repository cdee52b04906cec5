"""What a trace depends on in code: the functions that ran, and what they read beside their arguments.

Each function that has run is held to its code and its defaults, and to what stands now where it looks: in globals,
variables of outer functions, and on classes. So a function exchanged in a file, a method set on a class and a flag set
in a module are seen before the next call.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Set
from types import CellType, CodeType, FrameType, FunctionType
from typing import Any

from torch import Tensor, nn

from pipecompile.capture.state.executed_code import Ran
from pipecompile.capture.state.fingerprints import HEAP_TYPE
from pipecompile.capture.state.name_accesses import Accesses, places_read
from pipecompile.capture.state.sources import Cell, Code, Entry, Fact, OfClass, Place

_ALWAYS = frozenset({"forward", "__call__", "__getattr__", "__getattribute__"})  # Python itself looks for these


class CodeRead:
    """What the functions of one trace read.

    Args:
        ran: the functions.
    """

    def __init__(self, ran: Ran) -> None:
        self.ran = ran
        self._accesses: dict[int, tuple[CodeType, Accesses]] = {}

    def begun(self, frame: FrameType) -> Iterator[tuple[Any, str]]:
        """What a function that now begins to run may read, with what a person calls it."""

        def outer(name: str) -> Place | None:
            return Entry(frame.f_locals, name, name)

        for place in places_read(self._of(frame.f_code), frame.f_globals, outer):
            yield place.value(), place.label

    def stored(self) -> set[str]:
        """The names of attributes that the functions set, on whatever object."""
        return {name for function in self.ran.functions.values() for name in self._of(function.__code__).stored}

    def facts(self, kinds: Iterable[type], known: Set[Any], containers: Container[int]) -> list[Fact]:
        """What stands now in the places that the functions read.

        Args:
            kinds: classes of objects that the forward has worked with.
            known: places, by namespace and name, that are guarded otherwise.
            containers: the same for containers, by identity.
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
            return id(place.function), "code"
        case _:
            return id(getattr(place, "kind", None) or getattr(place, "owner", place)), place.name


def _is_known(place: Place, known: Set[Any]) -> bool:
    return isinstance(place, OfClass) and any((id(base), place.name) in known for base in place.kind.__mro__)


def known_place(owner: Any, name: str) -> Any:
    """How the facts would know a place: an attribute of an object, a class or a file, or what a cell holds."""
    if isinstance(owner, CellType):
        return id(owner)
    return id(owner if isinstance(owner, type) else getattr(owner, "__dict__", owner)), name


def _of_classes(kinds: Iterable[type], names: set[str]) -> Iterator[OfClass]:
    """The names that classes have something under, of all that functions ask for."""
    for kind in {*kinds, Tensor}:
        own = {name for base in kind.__mro__ if base not in (nn.Module, object) for name in vars(base)}
        for name in sorted(names & (own | _ALWAYS)):
            yield OfClass(kind, name, f"{kind.__qualname__}.{name}")


def _is_class(value: Any) -> bool:
    return isinstance(value, type) and bool(value.__flags__ & HEAP_TYPE) and value.__module__.split(".")[0] != "torch"
