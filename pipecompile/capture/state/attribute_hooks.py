"""Observes which Python attributes forward reads and sets during a trace.

Attribute access is patched in the classes of modules, and in the classes of objects that modules hold (a config), when
forward first reaches them. The attributes of ``torch.nn.Module`` itself are not observed: hooks, modes and tensors are
compared elsewhere. What forward reads from globals and closures is found from its code (``code_guards.py``).
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import partial
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any

from torch import Tensor, nn

from pipecompile.capture.state.container_proxies import Ledgers, is_stand_in, ledger_of
from pipecompile.capture.state.fingerprints import HEAP_TYPE, RECORDS
from pipecompile.capture.state.guards import LONGEST, MISSING, NOT_PLAIN, TORCHS_OWN, Attribute, Same, frozen
from pipecompile.capture.state.model_state import Change, Snapshot, changes_of, restore, snapshot
from pipecompile.capture.state.module_settings import settings_seen
from pipecompile.capture.state.namespaces import owns_names, referent_of
from pipecompile.capture.state.raw_data import RawData
from pipecompile.capture.state.sources import Answer, Entry, Place
from pipecompile.capture.state.thread_locals import Local
from pipecompile.ops.source_lines import is_library
from pipecompile.ops.torch_internals import FakeTensor

_NO_HOLDERS = (Tensor, type, ModuleType, FunctionType, BuiltinFunctionType, MethodType)
_NO_DICT: dict[str, Any] = {}  # of an object with slots
DEEPEST = 4  # containers within containers in which objects are looked for

Key = tuple[int, str]


class Reads:
    """The attributes that one trace has read.

    Args:
        paths: Path of each module of the model, by identity.
        states: Attributes of each module before the trace, by identity.
        ledgers: Receives the containers that forward reaches.
        ignored: Attributes, by identity of the owner and name, on which the trace does not depend.
    """

    def __init__(
        self,
        paths: Mapping[int, str],
        states: Mapping[int, Mapping[str, Any]],
        ledgers: Ledgers,
        ignored: Set[Key] = frozenset(),
    ) -> None:
        self.labels = dict(paths)
        self.states = dict(states)
        self.ledgers = ledgers
        self.seen = set(ignored)
        self.found: dict[Key, tuple[Attribute, Any]] = {}  # with the value before the trace, frozen
        self.places: dict[Any, Place] = {}  # places to read after everything is restored
        self.holders: list[tuple[Any, str, Snapshot, Set[str] | None]] = []  # owners other than the model's modules
        self.met: set[int] = set()  # observed objects that modules hold
        self.made: dict[int, Any] = {}  # objects that this call alone has, kept alive for their identity
        self.originals: dict[type, Any] = {}  # watched classes: their own __getattribute__, or None
        self.raw = RawData()
        self.locals: dict[int, Local] = {}  # stand-ins for objects of threading.local
        self.set: set[Key] = set()  # attributes of modules that were set, also to what they were

    @contextmanager
    def watching(self) -> Iterator[None]:
        self._watch(nn.Module)
        try:
            with settings_seen(self._setting()):
                yield
        finally:
            for kind, original in self.originals.items():
                if original is None:
                    del kind.__getattribute__
                else:
                    kind.__getattribute__ = original  # type: ignore[method-assign]
            self.originals.clear()

    def _watch(self, kind: type) -> None:
        if any(base in self.originals for base in kind.__mro__ if base is not object):
            return
        inherited: Any = kind.__getattribute__
        reads, thread = self, threading.get_ident()

        def watched(self: Any, name: str) -> Any:
            if threading.get_ident() != thread:  # reads of other threads do not count
                return inherited(self, name)
            try:
                value = inherited(self, name)
            except AttributeError:
                reads._see_missing(self, name)
                raise
            if name[:2] != "__":
                reads._see(self, name, value)
            elif name == "__dict__" and reads.sees(self):
                reads._see_dict(self, value, sys._getframe(1).f_code)
            return value

        original = kind.__dict__.get("__getattribute__")
        kind.__getattribute__ = watched  # type: ignore[method-assign, assignment]
        self.originals[kind] = original

    def _setting(self) -> Callable[[Any, str, Any], None]:
        """Returns a function that notes what this thread sets on modules."""
        noted, thread = self.set, threading.get_ident()

        def see(module: Any, name: str, value: Any) -> None:
            if threading.get_ident() == thread:
                noted.add((id(module), name))

        return see

    def _see(self, owner: Any, name: str, value: Any) -> None:
        key = (id(owner), name)
        if key in self.seen or name in TORCHS_OWN:
            return
        state = self._state(owner)
        if state is None:
            return
        self.seen.add(key)
        held, given = state.get(name, MISSING), value
        value = ledger_of(value).original if is_stand_in(value) else self.ledgers.original(owner, name, value)
        label = f"{self._label(owner)}{name}"
        if held is MISSING and (name in _dict_of(owner) or self._is_computed(owner, name, label)):
            return  # set by forward; or a property or method, whose own reads are observed
        if held is not MISSING and held is not value:
            return  # set by forward
        self.meet(given if type(given) is Local else value, label)
        plain = frozen(value)
        if isinstance(value, RECORDS) or (plain is NOT_PLAIN and isinstance(value, tuple)):
            self.places[key] = Attribute(owner, name, label)
        elif plain is not NOT_PLAIN:
            self.found[key] = (Attribute(owner, name, label), plain)
        elif held is value and id(value) not in self.ledgers.made and not isinstance(value, nn.Module):
            self.found[key] = (Attribute(owner, name, label), Same(value))

    def _see_dict(self, owner: Any, held: dict[str, Any], code: CodeType) -> None:
        """Notes that code has ``vars(config)``: all that is there, and the names in the code that are not."""
        if is_library(code.co_filename):
            return
        for name, value in [*held.items()]:
            self._see(owner, name, value)
        for name in code.co_consts:
            if isinstance(name, str) and name.isidentifier() and name not in held:
                self._see_missing(owner, name)

    def _see_missing(self, owner: Any, name: str) -> None:
        if name[:2] == "__" or id(owner) in self.made or self._state(owner) is None:
            return
        if getattr(type(owner), "__getattr__", None) is not nn.Module.__getattr__:
            self.places.setdefault((id(owner), name), _own(owner, name, self._label(owner) + name))
            if hasattr(type(owner), "__getattr__") and not isinstance(owner, nn.Module):
                for each, value in [*_dict_of(owner).items()]:  # it may look into its tables past the hooks
                    if isinstance(value, dict):
                        self._see(owner, each, value)
            return
        state = object.__getattribute__(owner, "__dict__")
        if not any(name in state.get(table, ()) for table in ("_parameters", "_buffers", "_modules")):
            self.found.setdefault((id(owner), name), (Attribute(owner, name, self._label(owner) + name), MISSING))

    def _state(self, owner: Any) -> Mapping[str, Any] | None:
        """Returns the attributes before the trace; for a module outside the model, those when it was first seen.

        None for a module that is first seen during its construction: forward itself created it.
        """
        if id(owner) in self.made:
            return None
        if id(owner) not in self.states and isinstance(owner, nn.Module):
            if "_modules" not in object.__getattribute__(owner, "__dict__"):
                self.made[id(owner)] = owner
                return None
            self._hold(owner, type(owner).__name__)
        return self.states.get(id(owner))

    def _is_computed(self, owner: Any, name: str, label: str) -> bool:
        """Whether an attribute is a method or property of the owner's class, which an instance attribute would hide."""
        if not _is_computed(type(owner), name):
            return False
        hides = not isinstance(owner, nn.Module) or name not in vars(nn.Module) or name == "forward"
        if hides and (isinstance(owner, threading.local) or _dict_of(owner) is not _NO_DICT):
            self.places[id(owner), name] = _own(owner, name, label)
        return True

    def meet(self, value: Any, label: str, depth: int = 0) -> None:
        """Starts to observe an object that forward reaches, and the objects in a short list, tuple or dict."""
        value = self.raw.meet(ledger_of(value).original if is_stand_in(value) else value, label)
        match value:
            case Local():
                return
            case threading.local() if type(value) is threading.local:  # found where it can have no stand-in
                self._see_all(value)
            case ContextVar():
                self.meet(value.get(None), label, depth + 1)
            case dict() | list() | tuple() if len(value) <= LONGEST and depth < DEEPEST:
                for item in [*dict.values(value)] if isinstance(value, dict) else value:
                    self.meet(item, label, depth + 1)
            case MethodType():
                self._meet(value.__self__, label)
            case partial():
                self.meet((value.func, value.args, value.keywords), label, depth + 1)
            case SimpleNamespace():
                self.meet(vars(value), label, depth + 1)
            case _ if (referent := referent_of(value)) is not None:
                self.meet(referent, label, depth + 1)
        self._meet(value, label)

    def stand_in(self, value: Any) -> Any:
        """Returns the stand-in for a ``threading.local``, whose class cannot be watched; other values unchanged."""
        if type(value) is not threading.local:
            return value
        if id(value) not in self.locals:
            self.locals[id(value)] = Local(value, self._see, self._see_missing, self._see_all)
            if id(value) not in self.states:
                self._hold(value, "a threading.local")
        return self.locals[id(value)]

    def _see_all(self, local: threading.local) -> None:
        """Notes that all attributes of a ``threading.local`` may be read."""
        label = self.labels.get(id(local), "a threading.local")
        self.places[id(local), None] = Answer(lambda: dict(vars(local)), label)
        for value in [*vars(local).values()]:
            self.meet(value, label)

    def _meet(self, value: Any, label: str) -> None:
        kind = type(value)
        if id(value) in self.met or not kind.__flags__ & HEAP_TYPE or isinstance(value, _NO_HOLDERS):
            return
        if id(value) not in self.states and _holds_fakes(value):  # created by forward (an output)
            self.made.setdefault(id(value), value)
            return
        if not owns_names(value):
            return
        try:
            self._watch(kind)
        except TypeError:  # a class that cannot be changed
            return
        self.met.add(id(value))
        if id(value) not in self.states:
            self._hold(value, label)

    def sees(self, owner: Any) -> bool:
        """Whether reads of an owner's attributes are observed."""
        return id(owner) in self.met or isinstance(owner, nn.Module)

    def hold_all(self, owners: Iterable[tuple[Any, str, Set[str] | None]]) -> None:
        """Notes the present state of other owners that forward may reach."""
        for owner, label, names in owners:
            if id(owner) not in self.states:
                self._hold(owner, label, names)

    def hold(self, attribute: Attribute) -> None:
        """Notes the state of an attribute's owner before it is changed."""
        if id(attribute.owner) not in self.states:
            with suppress(TypeError):  # a class that cannot be changed
                self._watch(type(attribute.owner))
            self._hold(attribute.owner, attribute.label.removesuffix(f".{attribute.name}"))

    def _hold(self, owner: Any, label: str, names: Set[str] | None = None) -> None:
        held = snapshot(owner, names)
        self.holders.append((owner, label, held, names))
        self.states[id(owner)] = held[0]
        self.labels[id(owner)] = label
        self.ledgers.place(owner, label, held[0])

    def changes(self) -> list[Change]:
        """Returns what forward has set on objects other than the model's modules, and restores them."""
        changed = []
        for owner, label, held, names in self.holders:
            changed += [*changes_of(owner, label, held, names)]
            restore(owner, held, names)
        return changed

    def _label(self, owner: Any) -> str:
        label = self.labels.get(id(owner), type(owner).__name__)
        return f"{label}." if label else ""


def _dict_of(owner: Any) -> dict[str, Any]:
    """Returns an object's ``__dict__``, past the hooks; ``_NO_DICT`` for one that has only slots."""
    try:
        held: dict[str, Any] = object.__getattribute__(owner, "__dict__")
    except AttributeError:
        return _NO_DICT
    return held


def _is_computed(kind: type, name: str) -> bool:
    """Whether a class defines an attribute by a descriptor: a method or a property."""
    found = next((base.__dict__[name] for base in kind.__mro__ if name in base.__dict__), None)
    return hasattr(type(found), "__get__")


def _own(owner: Any, name: str, label: str) -> Place:
    """The place of an attribute that an object has or lacks itself, whatever its class defines."""
    if isinstance(owner, threading.local):  # has a dict in each thread
        return Answer(lambda: vars(owner).get(name, MISSING), label)
    state = _dict_of(owner)
    return Attribute(owner, name, label) if state is _NO_DICT else Entry(state, name, label)


def _holds_fakes(value: Any) -> bool:
    """Whether an object other than a module has tensors of the trace among its attributes."""
    held = getattr(value, "__dict__", {})
    return not isinstance(value, nn.Module) and any(isinstance(item, FakeTensor) for item in held.values())
