"""Stand-ins for lists, dicts and sets that forward may read and change; they note what a trace does with them.

The contents of a container may differ in each call (losses that forward appends, a table by size). So a trace works on
a stand-in. It notes the operations that do not depend on the contents (``append``, ``d[k] = v``), which are repeated on
the real container after each call. It also notes what forward has read, which becomes a guard: the value under a key,
or all contents. Any other operation counts as reading and setting all contents.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from types import CellType
from typing import Any

import torch
from torch import nn

from pipecompile.capture.state.containers import contents, kind_of
from pipecompile.capture.state.counters import concrete
from pipecompile.capture.state.guards import (
    MISSING,
    NOT_PLAIN,
    TORCHS_OWN,
    Attribute,
    Contents,
    Held,
    Item,
    Place,
    frozen,
)
from pipecompile.capture.state.namespaces import label_of, names_of, owns_names, put
from pipecompile.ops.source_lines import user_line
from pipecompile.ops.torch_internals import pytree

DEEPEST = 4  # containers in containers that have stand-ins
LONGEST = 1000  # containers in a longer one have none

_BLIND = {  # neither depend on the contents nor return any
    list: ("append", "extend", "__iadd__"),
    dict: ("__setitem__", "update", "__ior__"),
    set: ("add", "update", "discard", "__ior__"),
    deque: ("append", "appendleft", "extend", "extendleft", "__iadd__"),
}
_KEYED = {  # read or change only the value under one key
    dict: ("__getitem__", "__contains__", "get", "setdefault", "pop", "__delitem__"),
    set: ("__contains__",),
    list: (),
    deque: (),
}
_CHANGING = {
    list: ("insert", "pop", "remove", "sort", "reverse", "__setitem__", "__delitem__", "__imul__"),
    dict: ("popitem", "move_to_end"),
    set: ("remove", "pop", "difference_update", "intersection_update", "symmetric_difference_update",
          "__iand__", "__isub__", "__ixor__"),
    deque: ("insert", "pop", "popleft", "remove", "reverse", "rotate", "__setitem__", "__delitem__", "__imul__"),
}  # fmt: skip
_READING = (
    "__len__", "__iter__", "__reversed__", "__getitem__", "__contains__", "__eq__", "__ne__", "__lt__", "__le__",
    "__gt__", "__ge__", "__add__", "__radd__", "__mul__", "__rmul__", "__or__", "__ror__", "__and__", "__rand__",
    "__sub__", "__rsub__", "__xor__", "__rxor__", "__repr__", "count", "index", "items", "keys", "values", "union",
    "intersection", "difference", "symmetric_difference", "isdisjoint", "issubset", "issuperset",
)  # fmt: skip


@dataclass
class Ledger:
    """What a trace has done with one container.

    Attributes:
        place: Where a later call finds the container.
        original: The container at the time of the trace.
        keys: Values before the trace that were read under single keys; ``MISSING`` if a key was absent.
        all_read: Whether the contents before the trace were read as a whole.
        operations: Operations to repeat, in order: name and arguments.
        is_set: Whether the final contents replace the whole contents.
        is_cleared: Whether it was cleared before the operations.
        own: Keys that the trace itself has set.
        is_leaf: Whether a part kept whole is running.
        by_leaf: The line at which a part kept whole changed it; empty if none did.
        stand_in: The stand-in.
        before: Contents before the trace.
    """

    place: Place
    original: Any
    keys: dict[Any, Any] = field(default_factory=dict)
    all_read: bool = False
    operations: list[tuple[str, tuple[Any, ...]]] = field(default_factory=list)
    is_set: bool = False
    is_cleared: bool = False
    own: set[Any] = field(default_factory=set)
    is_leaf: Callable[[], bool] = lambda: False
    by_leaf: str = ""
    stand_in: Any = None
    before: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.before = contents(self.original)

    @property
    def is_changed(self) -> bool:
        return bool(self.operations) or self.is_set or self.is_cleared

    def read_all(self) -> None:
        if not self.is_cleared:
            self.all_read = True

    def read(self, key: Any) -> None:
        if self.is_cleared or key in self.own or key in self.keys:
            return
        if isinstance(self.original, dict):
            self.keys[key] = dict.get(self.original, key, MISSING)
        else:
            self.keys[key] = key in self.original

    def clear(self) -> None:
        self.is_cleared, self.operations = True, []
        self.note_leaf()

    def do(self, name: str, args: tuple[Any, ...]) -> None:
        if name == "__setitem__" and isinstance(args[0], type) and self.is_leaf():
            return  # a table by class, such as einops has of backends, which a leaf fills itself, each time alike
        self.operations.append((name, args))
        self.note_leaf()

    def note_leaf(self) -> None:
        """Notes a change if a part kept whole makes it."""
        if self.is_leaf() and not self.by_leaf:
            self.by_leaf = user_line() or "in torch"

    def reading(self) -> Held | None:
        """Returns what the trace has read, for a guard; None if nothing was read or changed."""
        if not (self.is_changed or self.keys or self.all_read):
            return None
        keys = tuple((key, Contents.kept(item)) for key, item in self.keys.items())
        items = tuple(map(Contents.kept, self.before)) if self.all_read else None
        return Held(self.place, type(self.original), keys, items)


class Ledgers:
    """The stand-ins of one trace.

    Args:
        other: Returns the stand-in for a value that is not a container, given its label, or the value itself.
        is_leaf: Whether a part kept whole is running.
    """

    def __init__(self, other: Callable[[Any, str], Any], is_leaf: Callable[[], bool] = lambda: False) -> None:
        self.other = other
        self.is_leaf = is_leaf
        self.made: dict[int, Ledger] = {}  # by the identity of the container
        self.others: dict[tuple[int, str, int], Any] = {}
        self.placed: list[tuple[Any, str, Any, Any]] = []  # owner, name, stand-in, original

    def place(self, owner: Any, label: str, names: Mapping[str, Any]) -> None:
        """Replaces an owner's containers with stand-ins.

        A container of plain values on an object is compared by value and gets no stand-in.
        """
        compared = owns_names(owner) and not isinstance(owner, CellType)
        for name, value in names.items():
            if isinstance(owner, nn.Module) and name in TORCHS_OWN:
                continue
            if type(value) not in _CLASSES:
                if (stand_in := self.other(value, label_of(owner, label, name))) is not value:
                    self._put(owner, name, stand_in, value)
                    self.others[id(owner), name, id(stand_in)] = value
                continue
            if compared and value and frozen(value) is not NOT_PLAIN and not _is_deep(value):
                continue
            self._put(owner, name, self.stand_in(value, Attribute(owner, name, label_of(owner, label, name))), value)

    def _put(self, owner: Any, name: str, stand_in: Any, value: Any) -> None:
        self.placed.append((owner, name, stand_in, value))
        put(owner, name, stand_in)

    def original(self, owner: Any, name: str, value: Any) -> Any:
        """Returns the value that a stand-in replaced under a name."""
        return self.others.get((id(owner), name, id(value)), value)

    def take_back(self) -> None:
        """Restores the containers where their stand-ins are still in place."""
        for owner, name, stand_in, value in reversed(self.placed):
            if names_of(owner, (name,)).get(name) is stand_in:
                put(owner, name, value)
        self.placed.clear()

    def stand_in(self, value: Any, place: Place, depth: int = 0) -> Any:
        """Returns the stand-in for a container, one per container; other values unchanged."""
        if type(value) not in _CLASSES or depth > DEEPEST:
            return value  # a container longer than LONGEST has a stand-in, but its items do not
        if id(value) not in self.made:
            ledger = self.made[id(value)] = Ledger(place, value, is_leaf=self.is_leaf)
            ledger.stand_in = _make(value, ledger, lambda item, key: self.stand_in(item, Item(place, key), depth + 1))
        return self.made[id(value)].stand_in


def _is_deep(value: Any) -> bool:
    """Whether a container holds containers."""
    return any(kind_of(item) is not None for item in (value.values() if isinstance(value, dict) else value))


def is_stand_in(value: Any) -> bool:
    return type(value) in _STAND_INS


def ledger_of(stand_in: Any) -> Ledger:
    """Returns the ledger of a stand-in."""
    found: Ledger = stand_in.__dict__["ledger"]
    return found


def without_stand_ins(value: Any) -> Any:
    """Returns a value with stand-ins replaced by plain containers; all their contents count as read."""
    kind = type(value)
    if kind in _STAND_INS:
        ledger_of(value).read_all()
        base = _STAND_INS[kind]
        items = [without_stand_ins(item) for item in contents(value)]
        if base is deque:
            return deque(items, value.maxlen)
        return defaultdict(value.default_factory, items) if base is defaultdict else base(items)
    if kind in (list, tuple) and any(type(item) in _HOLDING for item in value):
        return kind(map(without_stand_ins, value))
    if kind is dict and any(type(item) in _HOLDING for item in value.values()):
        return {key: without_stand_ins(item) for key, item in value.items()}
    if kind in pytree.SUPPORTED_NODES and any(map(_is_stand_in, pytree.tree_leaves(value, is_leaf=_is_stand_in))):
        return pytree.tree_map(without_stand_ins, value, is_leaf=_is_stand_in)  # an output of a class of its own
    return value


def _is_stand_in(value: Any) -> bool:
    return type(value) in _STAND_INS


def _make(value: Any, ledger: Ledger, inner: Callable[[Any, Any], Any]) -> Any:
    kind, base = _CLASSES[type(value)], type(value)
    items: Iterable[Any]
    if len(value) > LONGEST:
        items = contents(value)
    elif issubclass(base, dict):
        items = [(key, inner(item, key)) for key, item in value.items()]
    elif base is set:
        items = value
    else:
        items = [inner(item, index) for index, item in enumerate(value)]
    made = kind.__new__(kind)
    if base is deque:
        deque.__init__(made, items, value.maxlen)
    elif base is defaultdict:
        defaultdict.__init__(made, value.default_factory)
    else:
        base.__init__(made)
    if issubclass(base, dict):
        for key, item in items:
            base.__setitem__(made, key, item)
    elif base is not deque:
        (list.extend if base is list else set.update)(made, items)
    made.__dict__["ledger"] = ledger
    return made


def _key(key: Any) -> Any:
    """Returns a key with symbolic sizes and followed numbers replaced by their values, which are then guarded."""
    key = concrete(key)
    if isinstance(key, torch.SymInt):
        return int(key)
    return tuple(map(_key, key)) if type(key) is tuple else key


def _blind(base: Any, name: str) -> Callable[..., Any]:
    method = getattr(base, name)

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        ledger = ledger_of(self)
        if issubclass(base, dict):
            pairs = [(_key(args[0]), args[1])] if name == "__setitem__" else [*dict(*args, **kwargs).items()]
            for key, value in pairs:
                key = _key(key)
                base.__setitem__(self, key, value)
                ledger.own.add(key)
                ledger.do("__setitem__", (key, value))
            return self if name == "__ior__" else None
        if name in ("append", "appendleft", "add", "discard"):
            ledger.do(name, args)
            if base is set:
                ledger.own.add(args[0])
            return method(self, *args)
        name_now, items = {"__iadd__": "extend", "__ior__": "update"}.get(name, name), [[*part] for part in args]
        ledger.do(name_now, tuple(items))
        getattr(base, name_now)(self, *items)
        return self if name[:3] == "__i" else None

    return run


def _keyed(base: Any, name: str) -> Callable[..., Any]:
    method = getattr(base, name)

    def run(self: Any, key: Any, *rest: Any) -> Any:
        ledger, key = ledger_of(self), _key(key)
        ledger.read(key)
        there = base.__contains__(self, key)
        out = method(self, key, *rest)
        if name == "setdefault" and not there:  # a defaultdict sets missing keys itself
            ledger.own.add(key)
            ledger.do("__setitem__", (key, out))
        elif name in ("pop", "__delitem__") and there:
            ledger.own.add(key)
            ledger.do("pop", (key, None))
        return out

    return run


def _other(base: type, name: str, changes: bool) -> Callable[..., Any]:
    method = getattr(base, name)

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        ledger = ledger_of(self)
        if name == "__setitem__" and args[0] == slice(None):
            items = [*args[1]]
            self.clear()
            self.extend(items)
            return None
        ledger.read_all()
        ledger.is_set |= changes
        if changes:
            ledger.note_leaf()
        return method(self, *args, **kwargs)

    return run


def _clearing(base: Any) -> Callable[[Any], None]:
    def clear(self: Any) -> None:
        ledger_of(self).clear()
        base.clear(self)

    return clear


def _copied(self: Any) -> Any:
    return without_stand_ins(self)


def _deeply_copied(self: Any, memo: Any) -> Any:
    return deepcopy(without_stand_ins(self), memo)


def _reduced(self: Any, protocol: Any) -> Any:
    return without_stand_ins(self).__reduce_ex__(protocol)


def _class_for(base: type) -> type:
    family = next(kind for kind in (list, dict, set, deque) if issubclass(base, kind))
    methods: dict[str, Any] = {name: _other(base, name, changes=False) for name in _READING if hasattr(base, name)}
    methods |= {name: _other(base, name, changes=True) for name in _CHANGING[family] if hasattr(base, name)}
    methods |= {name: _keyed(base, name) for name in _KEYED[family]}
    methods |= {name: _blind(base, name) for name in _BLIND[family]}
    methods |= {"clear": _clearing(base), "copy": _copied, "__copy__": _copied, "__deepcopy__": _deeply_copied}
    methods |= {"__reduce_ex__": _reduced, "__hash__": None}
    return type(base.__name__, (base,), methods)


_CLASSES: dict[type, Any] = {kind: _class_for(kind) for kind in (list, dict, OrderedDict, defaultdict, set, deque)}
_STAND_INS: dict[type, Any] = {made: kind for kind, made in _CLASSES.items()}
_HOLDING = frozenset({list, tuple, dict, *_STAND_INS})
