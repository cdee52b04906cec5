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

from pipecompile.errors import CaptureError


@dataclass(frozen=True, slots=True)
class Changes:
    """What a forward did to its model: tensors bound to the names of buffers, and other attributes it set."""

    rebound: dict[str, Tensor] = field(default_factory=dict)
    attributes: list[str] = field(default_factory=list)


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
    changes = Changes()
    modules = list(model.named_modules())
    before = [_snapshot(module) for _, module in modules]
    try:
        for path, module in modules:
            _place(module, path, fakes)
        yield changes
        for (path, module), (state, _) in zip(modules, before, strict=True):
            _read_changes(path, module, state, fakes, changes, was_read)
    finally:
        for (_, module), snapshot in zip(modules, before, strict=True):
            _restore(module, *snapshot)


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Lets a model run as it likes, and puts its attributes, modes and buffers back; parameters are not copied."""
    modules = list(model.modules())
    before = [_snapshot(module) for module in modules]
    values = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for module, snapshot in zip(modules, before, strict=True):
            _restore(module, *snapshot)
        with torch.no_grad():
            for buffer, value in values:
                buffer.copy_(value)


@contextmanager
def without_caches(model: nn.Module) -> Iterator[list[str]]:
    """Turns off the key-value caches of Hugging Face models, which training has no use for."""
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    on = [c for c in configs.values() if getattr(c, "use_cache", False) is True]
    for config in on:
        config.use_cache = False
    try:
        yield ["use_cache is off: the output holds no key-value cache"] if on else []
    finally:
        for config in on:
            config.use_cache = True


def _place(module: nn.Module, path: str, fakes: dict[str, Tensor]) -> None:
    for table in (module._parameters, module._buffers):
        for name in table:
            if table[name] is not None:
                table[name] = fakes[f"{path}.{name}" if path else name]  # type: ignore[assignment]


Snapshot = tuple[dict[str, Any], dict[str, list[Any] | dict[Any, Any] | set[Any]]]


def _snapshot(module: nn.Module) -> Snapshot:
    """A module's attributes, and copies of the lists, dicts and sets among them."""
    state = dict(module.__dict__)
    return state, {name: value.copy() for name, value in state.items() if isinstance(value, list | dict | set)}


def _restore(module: nn.Module, state: dict[str, Any], contents: dict[str, Any]) -> None:
    for name in set(module.__dict__) - set(state):
        del module.__dict__[name]
    module.__dict__.update(state)
    for name, content in contents.items():
        holder = state[name]
        holder.clear()
        holder.extend(content) if isinstance(holder, list) else holder.update(content)


def _read_changes(
    path: str,
    module: nn.Module,
    state: dict[str, Any],
    fakes: dict[str, Tensor],
    changes: Changes,
    was_read: Callable[[Tensor], bool],
) -> None:
    prefix = f"{path}." if path else ""
    for name, value in module._buffers.items():
        fake = fakes.get(prefix + name)
        if isinstance(value, FakeTensor) and fake is not None and value is not fake:
            changes.rebound[prefix + name] = value
    for name, value in module.__dict__.items():
        if value is state.get(name):
            continue
        if isinstance(value, FakeTensor) and isinstance(state.get(name), Tensor) and was_read(state[name]):
            raise CaptureError(
                f"module {path!r}: forward assigns a new tensor to self.{name}, which would be lost between stages; "
                f"make it a buffer: self.register_buffer({name!r}, ...)"
            )
        changes.attributes.append(prefix + name)
