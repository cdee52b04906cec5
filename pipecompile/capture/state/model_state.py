"""The state of a model during a trace: fakes replace its tensors, and everything is restored afterwards.

Forward runs as Python and may change the model. A tensor that it binds to the name of a buffer becomes a write-back in
the graph. Everything else is undone when the trace ends: a trace must not change the model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pipecompile.capture.state.containers import contents, is_same, kind_of, put_back
from pipecompile.capture.state.fake_tables import Table
from pipecompile.capture.state.guards import MISSING, NOT_PLAIN, TABLES, Attribute, frozen
from pipecompile.capture.state.namespaces import drop, label_of, names_of, put
from pipecompile.errors import CaptureError
from pipecompile.ops.away import is_away
from pipecompile.ops.torch_internals import FakeTensor, FakeTensorMode


@dataclass(frozen=True, slots=True)
class Changes:
    """What forward did to its model.

    Attributes:
        before: Attributes of each module before the trace, by identity.
        rebound: Tensors bound to the names of buffers.
        attributes: Changes of other attributes.
    """

    before: dict[int, dict[str, Any]] = field(default_factory=dict)
    rebound: dict[str, Tensor] = field(default_factory=dict)
    attributes: list[Change] = field(default_factory=list)


class Entries:
    """A module's parameters, buffers or children as attributes of an object."""

    __slots__ = ("module", "table")

    def __init__(self, module: nn.Module, table: str) -> None:
        object.__setattr__(self, "module", module)
        object.__setattr__(self, "table", table)

    @property
    def entries(self) -> dict[str, Any]:
        found: dict[str, Any] = self.module.__dict__[self.table]
        return found

    def __getattr__(self, name: str) -> Any:
        try:
            return self.entries[name]
        except KeyError:
            raise AttributeError(name) from None

    def __setattr__(self, name: str, value: Any) -> None:
        self.entries[name] = value

    def __delattr__(self, name: str) -> None:
        del self.entries[name]


def named_tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Returns parameters, then buffers, under every name they have."""
    return [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]


def fakes_of(model: nn.Module, mode: FakeTensorMode, device: torch.device) -> dict[str, Tensor]:
    """Returns a fake on ``device`` for each parameter and buffer by name; tied ones share one fake."""
    made: dict[int, Tensor] = {}
    for _, tensor in named_tensors(model):
        if id(tensor) not in made:
            made[id(tensor)] = fake_of(tensor, mode, device)
    return {name: made[id(tensor)] for name, tensor in named_tensors(model)}


def fake_of(tensor: Tensor, mode: FakeTensorMode, device: torch.device) -> Tensor:
    """Returns a fake of a tensor on ``device``, with the attributes that the user has set on the tensor.

    Dense for a sparse tensor, as few fake kernels accept sparse fakes, and for one whose memory is in another process.
    """
    fake = _fake_of(tensor, mode, device)
    vars(fake).update({name: value for name, value in vars(tensor).items() if name not in vars(fake)})
    return fake


def _fake_of(tensor: Tensor, mode: FakeTensorMode, device: torch.device) -> Tensor:
    if tensor.layout != torch.strided or is_away(tensor):
        with mode, torch.no_grad():
            dense = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        return nn.Parameter(dense, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else dense
    fake = mode.from_tensor(tensor, static_shapes=True)
    if fake.device == device:
        return fake
    with mode, torch.no_grad():
        moved = torch.empty_like(fake, device=device)
    return nn.Parameter(moved, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else moved


@contextmanager
def with_fakes(
    model: nn.Module, fakes: dict[str, Tensor], is_replaced: Callable[[Tensor, Tensor], bool]
) -> Iterator[Changes]:
    """Replaces the model's tensors with fakes. Yields the changes that forward makes, complete at the end.

    Args:
        model: The model.
        fakes: Fake of each parameter and buffer, by name.
        is_replaced: Whether the trace has read its first argument, a real tensor that is not a parameter or buffer, and
            computed the second to replace it.

    Raises:
        CaptureError: Forward reads a tensor in an attribute that is not a buffer and assigns another one, or creates
            parameters.
    """
    modules = list(model.named_modules())
    before = [snapshot(module) for _, module in modules]
    changes = Changes({id(module): held[0] for (_, module), held in zip(modules, before, strict=True)})
    tables: dict[int, Table] = {}
    try:
        for path, module in modules:
            _place(module, path, fakes, tables)
        yield changes
        for (path, module), held in zip(modules, before, strict=True):
            _read_changes(path, module, held, fakes, changes, is_replaced)
    finally:
        for (_, module), held in zip(modules, before, strict=True):
            restore(module, held)


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """A context in which a model may run; attributes, modes and buffers are restored, parameters are not."""
    values = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        with attributes_kept(model):
            yield
    finally:
        with torch.no_grad():
            for buffer, value in values:
                buffer.copy_(value)


@contextmanager
def attributes_kept(model: nn.Module) -> Iterator[None]:
    """A context; at its end, the attributes of the model's modules are restored."""
    modules = list(model.modules())
    before = [snapshot(module) for module in modules]
    try:
        yield
    finally:
        for module, held in zip(modules, before, strict=True):
            restore(module, held)


@contextmanager
def without_caches(model: nn.Module, given: bool = False) -> Iterator[tuple[list[str], frozenset[tuple[int, str]]]]:
    """Turns off the key-value caches of Hugging Face models, which training does not use.

    Args:
        model: The model.
        given: Whether the call passes a cache, which forward then fills.

    Yields notes, and the attributes, by identity of the owner and name, on which a trace therefore does not depend.
    """
    held: list[Any] = [getattr(m, "config", None) for m in model.modules()]
    configs = {id(config): config for config in held if hasattr(config, "__dict__")}
    on = [c for c in configs.values() if vars(c).get("use_cache") is True and not given]
    for config in on:
        config.use_cache = False
    try:
        notes = ["use_cache is off: the output has no key-value cache"] if on else []
        yield notes, frozenset() if given else frozenset((key, "use_cache") for key in configs)
    finally:
        for config in on:
            config.use_cache = True


def _place(module: nn.Module, path: str, fakes: dict[str, Tensor], tables: dict[int, Table]) -> None:
    """Gives a module tables of fakes; modules that share a table share its replacement."""
    prefix = f"{path}." if path else ""
    for kind in ("_parameters", "_buffers"):
        own = module.__dict__[kind]
        if id(own) not in tables:
            held = {name: None if tensor is None else fakes[prefix + name] for name, tensor in own.items()}
            tables[id(own)] = Table(held, own)
        module.__dict__[kind] = tables[id(own)]


Snapshot = tuple[dict[str, Any], dict[str, list[Any]]]


def snapshot(owner: Any, names: Collection[str] | None = None) -> Snapshot:
    """Returns an owner's values by name, and the contents of the lists, dicts and sets among them."""
    state = names_of(owner, names)
    return state, {name: contents(value) for name, value in state.items() if kind_of(value) is not None}


def restore(owner: Any, before: Snapshot, names: Collection[str] | None = None) -> None:
    """Restores an owner's values."""
    state, held = before
    now = names_of(owner, names)
    for name in set(now) - set(state):
        drop(owner, name)
    for name, value in state.items():
        if name not in now or now[name] is not value:
            put(owner, name, value)
    for name, items in held.items():
        put_back(state[name], items)


@dataclass(frozen=True, slots=True)
class Change:
    """The value that forward has set a name to, or the present items of the container under it."""

    place: Attribute
    value: Any
    items: list[Any] | None = None


def changes_of(owner: Any, label: str, before: Snapshot, names: Collection[str] | None = None) -> Iterator[Change]:
    """Yields the names of an owner that were set, and its lists, dicts and sets whose contents changed."""
    state, held = before
    now = names_of(owner, names)
    for name in [*now, *(state.keys() - now.keys())]:
        value = now.get(name, MISSING)
        if value is state.get(name, MISSING):
            if name in held and name not in TABLES and _differ(items := contents(value), held[name]):
                yield Change(Attribute(owner, name, label_of(owner, label, name)), value, items)
        elif not isinstance(value, Table):
            yield Change(Attribute(owner, name, label_of(owner, label, name)), value)


def _differ(now: list[Any], before: list[Any]) -> bool:
    """Whether contents differ: plain values by value, objects by identity."""
    plain = frozen(now), frozen(before)
    return bool(plain[0] != plain[1]) if NOT_PLAIN not in plain else not is_same(now, before)


def _read_changes(
    path: str,
    module: nn.Module,
    before: Snapshot,
    fakes: dict[str, Tensor],
    changes: Changes,
    is_replaced: Callable[[Tensor, Tensor], bool],
) -> None:
    for table in sorted(TABLES):
        changes.attributes.extend(_entries(path, module, table, dict(before[1].get(table, {})), fakes, changes.rebound))
    for change in changes_of(module, path, before):
        name, held = change.place.name, before[0].get(change.place.name)
        if isinstance(change.value, FakeTensor) and isinstance(held, Tensor) and is_replaced(held, change.value):
            raise CaptureError(
                f"module {path!r}: forward assigns a new tensor to self.{name} and reads the earlier one, which "
                f"microbatches cannot share; make it a buffer: self.register_buffer({name!r}, ...), or, if it is a "
                f"metric's, update the metric outside of the model, with what forward returns"
            )
        changes.attributes.append(change)


def _entries(
    path: str,
    module: nn.Module,
    table: str,
    before: dict[str, Any],
    fakes: dict[str, Tensor],
    rebound: dict[str, Tensor],
) -> Iterator[Change]:
    """Yields parameters, buffers and children that forward has registered, removed or replaced.

    A buffer replaced by a tensor of the same shape and dtype goes to ``rebound``: the graph writes to it.
    """
    now = module.__dict__.get(table)
    if not isinstance(now, dict):
        return  # of a scripted module, to which nothing can be added
    for name in [*now, *(before.keys() - now.keys())]:
        label = f"{path}.{name}" if path else name
        value, fake = now.get(name, MISSING), fakes.get(label)
        if (value is fake and value is not None) or value is before.get(name, MISSING):
            continue
        if table == "_buffers" and isinstance(value, FakeTensor) and fake is not None and _alike(value, fake):
            rebound[label] = value
        elif table == "_parameters" and isinstance(value, FakeTensor) and not any(value is f for f in fakes.values()):
            raise CaptureError(
                f"module {path!r}: forward creates a new parameter {name!r}, which no optimizer has; write to the "
                f"existing one under torch.no_grad(), or run the model once before compile() to create it"
            )
        elif isinstance(value, nn.Module) and any(isinstance(t, FakeTensor) for _, t in named_tensors(value)):
            raise CaptureError(
                f"module {path!r}: forward creates {label!r}, a {type(value).__name__}, whose parameters no optimizer "
                f"has; create it in __init__(), or run the model once before compile()"
            )
        else:
            yield Change(Attribute(Entries(module, table), name, label), value)


def first_tensor(part: str, name: str) -> CaptureError:
    """The error for a part kept whole that sets a buffer which has been None."""
    return CaptureError(
        f"{part} is kept whole and its forward sets buffer {name!r}, which has been None and which a stage cannot add "
        f"to the model; call the model once before compile(), so that the buffer exists, or give it a tensor in "
        f"__init__()"
    )


def _alike(value: Tensor, fake: Tensor) -> bool:
    return bool(value.shape == fake.shape and value.dtype == fake.dtype)
