"""Finds what forward may read and change other than its arguments, without running it.

Starting at the modules, values are followed to the objects they hold, and code to the code it may call: the names in a
function are looked up in its file and its closure, and a method of a reached class may run if a reached function names
it. This finds more than what runs, and misses what is reached by computed names. So it is used to save and restore
state, not to decide what forward depends on.
"""

from __future__ import annotations

import random
import sys
from collections import deque
from collections.abc import Callable, Iterable, Set
from dataclasses import dataclass, field, replace
from functools import _lru_cache_wrapper, lru_cache, partial, partialmethod
from threading import Thread
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, MappingProxyType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipecompile.capture.state.containers import contents, kind_of
from pipecompile.capture.state.namespaces import file_of, has_no_models, is_foreign, names_of, owns_names, referent_of

MOST = 30_000  # objects, in addition to OF_A_MODULE per module; further objects are ignored
OF_A_MODULE = 50
LONGEST = 20_000  # the items of a longer container are not followed
_RUN_UNNAMED = frozenset(f"__{n}__" for n in ("init", "call", "getattr", "getitem", "setitem", "enter", "exit", "iter"))

_PLAIN = (str, int, float, type(None))  # hold nothing

Generator = np.random.Generator | np.random.RandomState | random.Random | torch.Generator
_GENERATORS = (np.random.Generator, np.random.RandomState, random.Random, torch.Generator)


@dataclass
class Reach:
    """What forward may reach, with labels for the user.

    Attributes:
        owners: Objects, classes, files and cells with named values; for a file, with the names that code mentions.
        containers: Lists, dicts, sets and deques.
        memos: Caches of functions (``lru_cache``).
        generators: Random generators that the model holds.
        tensors: Tensors that are not parameters or buffers.
        files: Number of imported files that may hold state of a model.
    """

    owners: list[tuple[Any, str, Set[str] | None]] = field(default_factory=list)
    containers: list[tuple[Any, str]] = field(default_factory=list)
    memos: list[_lru_cache_wrapper[Any]] = field(default_factory=list)
    generators: list[Generator] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    files: int = 0


def reach_of(model: nn.Module, functions: Iterable[Callable[..., Any]] = (), known: Reach | None = None) -> Reach:
    """Returns what the forward of a model, and other functions, may read and change.

    Args:
        model: The model.
        functions: Other functions.
        known: What they reached before the model was captured, in the same call. A capture leaves a model as it was,
            so this is returned, unless files have been imported meanwhile.
    """
    files = _own_files(len(sys.modules))
    if known is not None and known.files == files:
        return known
    return replace(_Walk().run(model, functions), files=files)


@lru_cache(maxsize=1)
def _own_files(imported: int) -> int:
    """Returns the number of imported files that may hold state of a model; ``imported`` only keys the cache."""
    return sum(not is_foreign(name) for name in tuple(sys.modules))


class _Walk:
    def __init__(self) -> None:
        self.reach = Reach()
        self.seen: dict[int, Any] = {}  # kept alive, so that no identity is used twice
        self.waiting: deque[tuple[Any, str]] = deque()  # breadth first, from the model
        self.mentioned = {"forward", *_RUN_UNNAMED}
        self.unmentioned: dict[str, list[tuple[Any, str]]] = {}  # other names -> classes and files that define them
        self.files: dict[int, tuple[Any, set[str]]] = {}
        self.tables: set[int] = set()  # the ``__dict__`` of each module, which a pipe shares with its model

    def run(self, model: nn.Module, functions: Iterable[Callable[..., Any]]) -> Reach:
        for tensor in (*model.parameters(), *model.buffers()):
            self.seen[id(tensor)] = tensor
        for path, module in model.named_modules():
            self.waiting.append((module, path))
        self.waiting += [(function, "") for function in functions]
        most = MOST + OF_A_MODULE * len(self.waiting)
        while self.waiting and len(self.seen) < most:
            value, label = self.waiting.popleft()
            if id(value) not in self.seen:
                self.seen[id(value)] = value
                self._visit(value, label)
        for file, names in self.files.values():
            self.reach.owners.append((file, getattr(file, "__name__", ""), names))
        return self.reach

    def _mention(self, names: Iterable[str]) -> None:
        """Adds names that code mentions, and follows the entries of classes and files found earlier under them."""
        for name in [name for name in names if name not in self.mentioned]:
            self.mentioned.add(name)
            for holder, label in self.unmentioned.pop(name, ()):
                self._want_named(holder, name, label)

    def _hold(self, holder: Any, label: str) -> None:
        """Adds a class or a file, of which only the names that code mentions are followed."""
        later = (holder, label)
        for name in list(vars(holder)):
            if name in self.mentioned:
                self._want_named(holder, name, label)
            else:
                self.unmentioned.setdefault(name, []).append(later)

    def _want_named(self, holder: Any, name: str, label: str) -> None:
        held = vars(holder)
        if id(held) in self.files:
            self.files[id(held)][1].add(name)
        if name in held:
            self._want(held[name], f"{label}.{name}" if label else name)

    def _want(self, value: Any, label: str) -> None:
        if id(value) not in self.seen:
            self.waiting.append((value, label))

    def _visit(self, value: Any, label: str) -> None:
        if isinstance(value, Tensor):
            self.reach.tensors.append(value)
        elif isinstance(value, _GENERATORS) and not isinstance(value, random.SystemRandom):
            self.reach.generators.append(value)
        elif isinstance(value, type):
            self._visit_class(value)
        elif isinstance(value, ModuleType):
            if not has_no_models(value):
                self._visit_file(value)
        elif isinstance(value, _lru_cache_wrapper):
            self.reach.memos.append(value)
            self._want(value.__wrapped__, label)
        elif isinstance(value, FunctionType):
            self._visit_function(value)
        else:
            for part in _parts(value):
                self._want(part, label)
            self._visit_object(value, label)

    def _visit_object(self, value: Any, label: str) -> None:
        if isinstance(value, Thread) and value.is_alive():  # it writes its attributes itself, as a progress bar's does
            return
        if kind_of(value) is not None:
            self.reach.containers.append((value, label))
            if len(value) <= LONGEST:
                for item in contents(value):
                    self._want_item(item, label)
        elif isinstance(value, tuple | frozenset):
            for item in value:
                self._want_item(item, label)
        if owns_names(value):
            self._note(value, label)
            self._want(type(value), type(value).__name__)

    def _want_item(self, item: Any, label: str) -> None:
        if isinstance(item, tuple):
            self.seen[id(item)] = item
            for part in item:
                self._want_item(part, label)
        elif not isinstance(item, _PLAIN):
            self._want(item, label)

    def _visit_class(self, kind: type) -> None:
        for base in kind.__mro__:
            if not has_no_models(sys.modules.get(base.__module__)) and (base is kind or id(base) not in self.seen):
                self.seen[id(base)] = base
                self._hold(base, base.__name__)
                self._note(base, base.__name__)

    def _visit_file(self, file: Any) -> None:
        if id(vars(file)) not in self.files:
            self.files[id(vars(file))] = file, set()
            self._hold(file, "")

    def _visit_function(self, function: FunctionType) -> None:
        names = _names(function.__code__)
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=False):
            self._visit_cell(cell, name)
        for value in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
            self._want(value, function.__name__)
        self.reach.owners.append((function, function.__name__, None))
        for value in vars(function).values():
            self._want(value, function.__name__)
        table = function.__globals__
        file = file_of(table)
        if has_no_models(file):
            return
        self._visit_file(file)
        self.files[id(table)][1].update(names)  # including names that do not exist yet
        self._mention(names)

    def _visit_cell(self, cell: CellType, name: str) -> None:
        if id(cell) in self.seen:
            return
        self.seen[id(cell)] = cell
        try:
            value = cell.cell_contents
        except ValueError:  # not filled yet
            return
        self.reach.owners.append((cell, name, None))
        self._want(value, name)

    def _note(self, owner: Any, label: str) -> None:
        if isinstance(owner, nn.Module):
            if id(vars(owner)) in self.tables:
                return
            self.tables.add(id(vars(owner)))
        self.reach.owners.append((owner, label, None))
        for name, value in names_of(owner).items():
            if not isinstance(value, _PLAIN):
                self._want(value, f"{label}.{name}" if label else name)


def _parts(value: Any) -> tuple[Any, ...]:
    """Returns the functions and objects inside a wrapper such as a bound method, property or partial."""
    match value:
        case staticmethod() | classmethod():
            return (value.__func__,)
        case MethodType():
            return (value.__func__, value.__self__)
        case BuiltinFunctionType():
            return (value.__self__,)
        case property():
            return (value.fget, value.fset)
        case partial():
            return (value.func, value.args, value.keywords)
        case partialmethod():
            return (value.func, value.args, value.keywords)
        case MappingProxyType():
            return tuple(value.values())
        case _:
            referent = referent_of(value)
            return () if referent is None else (referent,)


@lru_cache(maxsize=8192)
def _names(code: CodeType) -> tuple[str, ...]:
    """Returns the names that code mentions, and strings that may be names: ``getattr(self, "cache")``."""
    names = dict.fromkeys(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names.update(dict.fromkeys(_names(constant)))
        elif isinstance(constant, str) and constant.isidentifier():
            names[constant] = None
    return tuple(names)
