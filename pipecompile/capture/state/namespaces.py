"""Owners of named values that forward may read and set: objects, classes, files and the cells of closures.

The variables of a file are attributes of its module; a variable of a closure is the only attribute of its cell.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Collection, Iterator
from contextlib import suppress
from functools import lru_cache
from types import CellType, FunctionType, ModuleType
from typing import Any
from weakref import ProxyTypes, WeakKeyDictionary, ref

from torch import Tensor, nn

FOREIGN = sys.stdlib_module_names | {"torch", "numpy", "scipy", "sympy", "pipecompile"}  # hold no state of a model
_OF_EVERY_CLASS = ("__dict__", "__weakref__")  # slots without a name of their own
_INSTALLED = frozenset({"site-packages", "dist-packages"})
_PLAIN = frozenset(
    {"types", "argparse", "weakref", "collections", "configparser", "_thread"}
)  # instances of their classes may hold model state
_EXAMINED: WeakKeyDictionary[ModuleType, int] = WeakKeyDictionary()  # files without torch: their number of variables
_SLOTTED: WeakKeyDictionary[type, tuple[str, ...]] = WeakKeyDictionary()  # results of _find_slots


class Variables:
    """The variables of code outside imported files (``exec``), as attributes."""

    def __init__(self, table: dict[str, Any]) -> None:
        self.__dict__ = table


def is_foreign(name: str | None) -> bool:
    """Whether a module's name is that of a library without state of a model."""
    return (name or "").partition(".")[0] in FOREIGN


def has_no_models(file: ModuleType | None) -> bool:
    """Whether a file contains no model: it is of a foreign library, or of an installed one that does not use torch.

    So the objects behind a progress bar, or behind the tool that runs the script, are not followed.
    """
    name = getattr(file, "__name__", None)
    if file is None or is_foreign(name):
        return is_foreign(name)
    installed = not _INSTALLED.isdisjoint(str(getattr(file, "__file__", None) or "").split(os.sep))
    return installed and not _names_torch(str(name).partition(".")[0], len(sys.modules))


@lru_cache(maxsize=256)
def _names_torch(package: str, imported: int) -> bool:
    """Whether a file of a package has something of torch among its variables; ``imported`` only keys the cache.

    A file is examined once: imports, of whatever package, happen all the time. One that names torch settles it.
    """
    files = [f for n, f in [*sys.modules.items()] if n.partition(".")[0] == package and isinstance(f, ModuleType)]
    for file in files:
        if _EXAMINED.get(file) != len(vars(file)):
            if any(map(_is_torchs, list(vars(file).values()))):
                return True
            _EXAMINED[file] = len(vars(file))
    return False


def _is_torchs(value: Any) -> bool:
    if isinstance(value, ModuleType):
        return value.__name__.partition(".")[0] == "torch"
    return isinstance(value, type | FunctionType) and str(value.__module__).partition(".")[0] == "torch"


def owns_names(value: Any) -> bool:
    """Whether an object's attributes may be state of a model."""
    kind = type(value)
    if isinstance(value, nn.Module | CellType):
        return True
    if isinstance(value, (type, ModuleType)) or (_dict_of(value) is None and next(_slots(value), None) is None):
        return False
    return not is_foreign(kind.__module__) or kind.__module__ in _PLAIN


def referent_of(value: Any) -> Any:
    """Returns the object that a weak reference or a weak proxy is of; None for other values and for a dead one.

    Recurrent layers refer weakly to their weights, also to fakes of them after a trace: tensors are not followed.
    """
    referent = None
    if isinstance(value, ref):
        referent = value()
    elif type(value) in ProxyTypes:
        with suppress(ReferenceError):
            referent = value.__init__.__self__
    return None if isinstance(referent, Tensor) else referent


def label_of(owner: Any, label: str, name: str) -> str:
    """Returns a value's name for the user: ``h.0.scale``; the value of a cell has the cell's own name."""
    if isinstance(owner, CellType):
        return label
    return f"{label}.{name}" if label else name


def names_of(owner: Any, wanted: Collection[str] | None = None) -> dict[str, Any]:
    """Returns the values by name; for a file, those of the ``wanted`` names that exist."""
    if (held := _dict_of(owner)) is None:
        if isinstance(owner, CellType):
            return {"cell_contents": owner.cell_contents}
        if isinstance(owner, type):
            return {name: value for name, value in vars(owner).items() if _is_data(name, value)}
        return dict(_slots(owner))
    named = held.copy() if wanted is None else {name: held[name] for name in wanted if name in held}
    if _slot_names(type(owner)):
        named.update(_slots(owner))
    return named


def put(owner: Any, name: str, value: Any) -> None:
    """Sets a value by name, bypassing the owner's own ``__setattr__``."""
    held = None if isinstance(owner, CellType | type) else _dict_of(owner)
    if held is not None and not any(name == slot for slot, _ in _slots(owner)):
        held[name] = value
    elif isinstance(owner, type):
        type.__setattr__(owner, name, value)
    else:
        object.__setattr__(owner, name, value)


def drop(owner: Any, name: str) -> None:
    """Removes a name."""
    held = None if isinstance(owner, CellType | type) else _dict_of(owner)
    if held is not None and name in held:
        del held[name]
    else:
        (type if isinstance(owner, type) else object).__delattr__(owner, name)


def file_of(table: dict[str, Any]) -> Any:
    """Returns the owner of a function's global variables."""
    module = sys.modules.get(str(table.get("__name__")))
    return module if module is not None and vars(module) is table else Variables(table)


def _dict_of(value: Any) -> dict[str, Any] | None:
    of_thread = issubclass(type(value), threading.local)  # has a dict in each thread, and may have an empty one too
    try:
        held = value.__dict__ if of_thread else object.__getattribute__(value, "__dict__")
    except AttributeError:
        return None
    return held if type(held) is dict else None


def _slots(owner: Any) -> Iterator[tuple[str, Any]]:
    for name in _slot_names(type(owner)):
        if hasattr(owner, name):
            yield name, object.__getattribute__(owner, name)


def _slot_names(kind: type) -> tuple[str, ...]:
    """Returns the slots of a class in which its objects may hold state of a model."""
    if type(kind).__hash__ is not object.__hash__:  # not a key: its metaclass says what is equal
        return _find_slots(kind)
    names = _SLOTTED.get(kind)
    if names is None:
        names = _SLOTTED[kind] = _find_slots(kind)
    return names


def _find_slots(kind: type) -> tuple[str, ...]:
    if issubclass(kind, (ModuleType, nn.Module)):
        return ()
    found = []
    for base in kind.__mro__:
        names = () if is_foreign(base.__module__) else base.__dict__.get("__slots__", ())
        found += [name for name in ((names,) if isinstance(names, str) else names) if name not in _OF_EVERY_CLASS]
    return tuple(found)


def _is_data(name: str, value: Any) -> bool:
    """Whether an entry of a class is data, not code."""
    return not (name[:2] == "__" and name[-2:] == "__") and not hasattr(type(value), "__get__")
