"""Finds names in a function's code: the globals, outer variables and attributes it reads, the attributes it sets."""

from __future__ import annotations

import builtins
import dis
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import CodeType, FunctionType, ModuleType
from typing import Any

from pipecompile.capture.state.namespaces import is_foreign
from pipecompile.capture.state.sources import Attribute, Entry, OfClass, Place

_GLOBAL = frozenset({"LOAD_GLOBAL", "LOAD_NAME"})
_OUTER = frozenset({"LOAD_DEREF", "LOAD_CLASSDEREF", "LOAD_FROM_DICT_OR_DEREF"})
_ATTRIBUTE = frozenset({"LOAD_ATTR", "LOAD_METHOD"})
_SETTERS = frozenset({"setattr", "__setattr__", "__dict__", "update"})


@dataclass(frozen=True)
class Accesses:
    """The names that a code object reads and sets.

    A chain is a name with the attributes read directly from it: ``("torch", "nn", "functional", "linear")``.

    Attributes:
        of_globals: Chains that start at a global.
        of_outer: Chains that start at a variable of an outer function.
        of_imports: Chains that start at a module that the function imports.
        attributes: Attributes read from any object, and strings, which may be arguments of ``getattr``.
        stored: Attributes set on any object.
        spelled: Strings in code that sets attributes by such names: by ``__dict__`` or ``object.__setattr__``.
    """

    of_globals: tuple[tuple[str, ...], ...]
    of_outer: tuple[tuple[str, ...], ...]
    of_imports: tuple[tuple[str, ...], ...]
    attributes: frozenset[str]
    stored: frozenset[str]
    spelled: frozenset[str]

    @staticmethod
    @lru_cache(maxsize=4096)
    def of(code: CodeType) -> Accesses:
        """Returns the accesses of a code object and of the functions defined inside it."""
        outer = frozenset(code.co_freevars)
        found: dict[str, dict[tuple[str, ...], None]] = {"global": {}, "outer": {}, "import": {}}
        attributes: set[str] = set()
        stored: set[str] = set()
        spelled: set[str] = set()
        for inner in _with_inner(code):
            strings = {c for c in inner.co_consts if isinstance(c, str) and c.isidentifier()}
            attributes |= strings
            stored |= {i.argval for i in dis.get_instructions(inner) if i.opname == "STORE_ATTR"}
            spelled |= strings if _SETTERS & {*inner.co_names} else set()
            for kind, chain in _chains(inner):
                attributes |= {*chain[1:]}
                if kind in found and (kind != "outer" or chain[0] in outer):
                    found[kind][chain] = None
        return Accesses(
            of_globals=tuple(found["global"]),
            of_outer=tuple(found["outer"]),
            of_imports=tuple(found["import"]),
            attributes=frozenset(attributes),
            stored=frozenset(stored),
            spelled=frozenset(spelled),
        )


def _with_inner(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _with_inner(constant)


def _chains(code: CodeType) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yields each loaded name with the attributes read from it: ("global", ("F", "linear"))."""
    kind, chain = "", [""]
    files: dict[str, str] = {}  # local names of modules that the function itself imports
    imported = ""
    for name, value in _instructions(code):
        if name in _ATTRIBUTE:
            chain.append(value)
            continue
        if name == "CACHE":
            continue
        yield kind, tuple(chain)
        kind, chain = "", [""]
        if name in _GLOBAL:
            kind, chain = "global", [value]
        elif name in _OUTER:
            kind, chain = "outer", [value]
        elif name == "LOAD_SUPER_ATTR":
            chain.append(value)
        elif name == "IMPORT_NAME":
            imported = value
        elif name == "IMPORT_FROM":
            yield "import", (imported, value)
        elif name == "STORE_FAST" and imported:
            files[value], imported = imported, ""
        elif name.startswith("LOAD_FAST") and value in files:
            kind, chain = "import", [files[value]]
    yield kind, tuple(chain)


def _instructions(code: CodeType) -> Iterator[tuple[str, Any]]:
    """Yields the name and the argument of each instruction. Python 3.13 has some for two local variables at once."""
    for instruction in dis.get_instructions(code):
        name, value = instruction.opname, instruction.argval
        if isinstance(value, tuple) and "_FAST_" in name:  # LOAD_FAST_LOAD_FAST, STORE_FAST_LOAD_FAST
            yield "STORE_FAST" if name.startswith("STORE") else "LOAD_FAST", value[0]
            yield "STORE_FAST" if name.endswith("STORE_FAST") else "LOAD_FAST", value[1]
        else:
            yield name, value


def global_place(namespace: dict[str, Any], name: str) -> Entry:
    """Returns the place of a global name, as functions of a file resolve it."""
    if name not in namespace and name in vars(builtins):
        return Entry(vars(builtins), name, f"builtins.{name}")
    return Entry(namespace, name, f"{namespace.get('__name__', '')}.{name}")


def along(place: Place, chain: Sequence[str]) -> Iterator[Place]:
    """Yields the places along a chain of attributes, as far as these are in files, classes and functions.

    Attributes of other objects are observed while forward reads them, but not those of the objects of the standard
    library, such as the level of a logger.
    """
    yield place
    for name in chain:
        value, label = place.value(), f"{place.label}.{name}"
        if isinstance(value, ModuleType | FunctionType):
            plain = name in vars(value) or not isinstance(value, ModuleType)
            place = Entry(vars(value), name, label) if plain else Attribute(value, name, label)
        elif isinstance(value, type):
            place = OfClass(value, name, label)
        elif is_foreign(type(value).__module__) and name in getattr(value, "__dict__", ()):
            place = Entry(vars(value), name, label)
        else:
            return
        yield place


def places_read(accesses: Accesses, namespace: dict[str, Any], outer: Callable[[str], Place | None]) -> Iterator[Place]:
    """Yields the places that a function reads; ``outer`` returns the place of a variable of an outer function."""
    for name, *rest in accesses.of_globals:
        yield from along(global_place(namespace, name), rest)
        if name == "globals" and name not in namespace:  # all, if the name is computed: globals()[name]
            for each in accesses.attributes & namespace.keys() or [*namespace]:
                yield global_place(namespace, each)
    for name, *rest in accesses.of_outer:
        place = outer(name)
        if place is not None:
            yield from along(place, rest)
    for name, *rest in accesses.of_imports:
        if name in sys.modules and all(vars(sys.modules[name]).get(part) is not None for part in rest[:1]):
            yield from along(Entry(sys.modules, name, name), rest)
