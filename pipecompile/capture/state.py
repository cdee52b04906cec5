"""A model's own state during a trace: fakes in place of its tensors, and everything put back afterwards.

The model's forward runs as Python and may change the model. What it binds to the name of a buffer becomes a write-back
of the graph. All else is undone when the trace ends: the trace must leave no mark on the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from pipecompile.capture.attributes import MISSING, NOT_PLAIN, TABLES, Attribute, frozen
from pipecompile.capture.containers import clone, contents, is_same, kind_of, put_back
from pipecompile.capture.tables import Table
from pipecompile.errors import CaptureError


@dataclass(frozen=True, slots=True)
class Changes:
    """What a forward did to its model: tensors bound to the names of buffers, and what it set other attributes to."""

    before: dict[int, dict[str, Any]] = field(default_factory=dict)  # each module's attributes, by identity
    rebound: dict[str, Tensor] = field(default_factory=dict)
    attributes: list[tuple[Attribute, Any]] = field(default_factory=list)


def named_tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters, then buffers, under every name they have."""
    return [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]


def fakes_of(model: nn.Module, mode: FakeTensorMode, device: torch.device) -> dict[str, Tensor]:
    """A fake on ``device`` for each parameter and buffer by name; tied ones share one fake."""
    made: dict[int, Tensor] = {}
    for _, tensor in named_tensors(model):
        if id(tensor) not in made:
            made[id(tensor)] = fake_of(tensor, mode, device)
    return {name: made[id(tensor)] for name, tensor in named_tensors(model)}


def fake_of(tensor: Tensor, mode: FakeTensorMode, device: torch.device) -> Tensor:
    """A fake of a real tensor, on ``device``."""
    fake = mode.from_tensor(tensor, static_shapes=True)
    if fake.device == device:
        return fake
    with mode, torch.no_grad():
        moved = torch.empty_like(fake, device=device)
    return nn.Parameter(moved, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else moved


@contextmanager
def with_fakes(model: nn.Module, fakes: dict[str, Tensor], was_read: Callable[[Tensor], bool]) -> Iterator[Changes]:
    """Puts fakes in place of the model's tensors; yields the changes that the forward made, complete afterwards.

    Args:
        was_read: whether the trace has read a real tensor that is no parameter or buffer.

    Raises:
        CaptureError: the forward read a tensor kept in an attribute that is no buffer, and bound another one to it.
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
            _read_changes(path, module, held, fakes, changes, was_read)
    finally:
        for (_, module), held in zip(modules, before, strict=True):
            restore(module, held)


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Lets a model run as it likes, and puts its attributes, modes and buffers back; parameters are not copied."""
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
    """Whatever sets attributes of the model's modules in it, they are as before at the end."""
    modules = list(model.modules())
    before = [snapshot(module) for module in modules]
    try:
        yield
    finally:
        for module, held in zip(modules, before, strict=True):
            restore(module, held)


@contextmanager
def without_caches(model: nn.Module) -> Iterator[tuple[list[str], frozenset[tuple[int, str]]]]:
    """Turns off the key-value caches of Hugging Face models, which training has no use for.

    Yields notes, and the attributes, by owner's identity and name, on which no trace depends for that.
    """
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    on = [c for c in configs.values() if getattr(c, "use_cache", False) is True]
    for config in on:
        config.use_cache = False
    try:
        notes = ["use_cache is off: the output holds no key-value cache"] if on else []
        yield notes, frozenset((key, "use_cache") for key in configs)
    finally:
        for config in on:
            config.use_cache = True


def _place(module: nn.Module, path: str, fakes: dict[str, Tensor], tables: dict[int, Table]) -> None:
    """Gives a module tables of fakes; two modules with one table get one."""
    prefix = f"{path}." if path else ""
    for kind in ("_parameters", "_buffers"):
        own = module.__dict__[kind]
        if id(own) not in tables:
            held = {name: None if tensor is None else fakes[prefix + name] for name, tensor in own.items()}
            tables[id(own)] = Table(held, own)
        module.__dict__[kind] = tables[id(own)]


Snapshot = tuple[dict[str, Any], dict[str, list[Any]]]


def snapshot(owner: Any) -> Snapshot:
    """An object's attributes, and what the lists, dicts and sets among them hold."""
    state = dict(owner.__dict__)
    return state, {name: contents(value) for name, value in state.items() if kind_of(value) is not None}


def restore(owner: Any, before: Snapshot) -> None:
    """Puts an object's attributes back."""
    state, held = before
    for name in set(owner.__dict__) - set(state):
        del owner.__dict__[name]
    owner.__dict__.update(state)
    for name, items in held.items():
        put_back(state[name], items)


def changed_attributes(owner: Any, label: str, before: Snapshot) -> Iterator[tuple[Attribute, Any]]:
    """What an object's attributes have been set to, and copies of the lists, dicts and sets with other contents."""
    state, held = before
    prefix = f"{label}." if label else ""
    for name, value in list(owner.__dict__.items()):
        if isinstance(value, Table):
            continue
        if value is not state.get(name, MISSING):
            yield Attribute(owner, name, prefix + name), value
        elif name in held and name not in TABLES and _differ(contents(value), held[name]):
            yield Attribute(owner, name, prefix + name), clone(value)


def _differ(now: list[Any], before: list[Any]) -> bool:
    """Whether contents are others: plain values by value, objects by identity."""
    plain = frozen(now), frozen(before)
    return bool(plain[0] != plain[1]) if NOT_PLAIN not in plain else not is_same(now, before)


def _read_changes(
    path: str,
    module: nn.Module,
    before: Snapshot,
    fakes: dict[str, Tensor],
    changes: Changes,
    was_read: Callable[[Tensor], bool],
) -> None:
    prefix = f"{path}." if path else ""
    for name, value in module._buffers.items():
        fake = fakes.get(prefix + name)
        if isinstance(value, FakeTensor) and fake is not None and value is not fake:
            changes.rebound[prefix + name] = value
    for attribute, value in changed_attributes(module, path, before):
        held = before[0].get(attribute.name)
        if isinstance(value, FakeTensor) and isinstance(held, Tensor) and was_read(held):
            raise CaptureError(
                f"module {path!r}: forward assigns a new tensor to self.{attribute.name}, which would be lost between "
                f"stages; make it a buffer: self.register_buffer({attribute.name!r}, ...)"
            )
        changes.attributes.append((attribute, value))
