"""Records the side effects of a step (on buffers, parameters, Python state), then restores the state."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pipecompile.capture.pytrees import with_paths
from pipecompile.capture.state.containers import contents, is_same, kind_of
from pipecompile.capture.state.guards import NOT_PLAIN, TORCHS_OWN, frozen
from pipecompile.capture.state.namespaces import names_of
from pipecompile.capture.state.reachable import Reach
from pipecompile.capture.state.restore import left_as_before
from pipecompile.ops.torch_internals import pytree

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


@dataclass
class Seen:
    """The changes of a step to its model, taken before the state is restored."""

    changed: Callable[[], Iterator[tuple[str, Any]]]  # attributes and containers changed so far
    buffers: dict[str, Tensor] = field(default_factory=dict)
    parameters: dict[str, Tensor] = field(default_factory=dict)
    attributes: dict[str, Any] = field(default_factory=dict)

    def left(self) -> dict[str, Tensor]:
        """The tensors that the step has stored in the model so far, by place, with their autograd graph."""
        leaves = [leaf for label, value in self.changed() for leaf in _leaves(label, value)]
        return {n: t for n, t in leaves if isinstance(t, Tensor) and t.is_floating_point() and not _is_leaf(t)}


@contextmanager
def observed(model: nn.Module, functions: Sequence[Callable[..., Any]], reach: Reach) -> Iterator[Seen]:
    """Records what a step changes in a model and in the objects it reaches, then restores everything."""
    before = [(label, owner, names, names_of(owner, names)) for owner, label, names in reach.owners]
    tables = {id(vars(module).get(name)) for module in model.modules() for name in TORCHS_OWN}
    containers = [(holder, label, contents(holder)) for holder, label in reach.containers if id(holder) not in tables]
    weights = {name: (p, p.data, p.detach().clone(), p.grad) for name, p in model.named_parameters()}
    trained = {name: p.requires_grad for name, p in model.named_parameters()}

    def changed() -> Iterator[tuple[str, Any]]:
        for label, owner, names, state in before:
            yield from _changes(label, names_of(owner, names), state)
        for holder, label, items in containers:
            if not is_same(contents(holder), items):
                yield label, holder

    seen = Seen(changed)
    with left_as_before(model, functions, reach=reach):
        try:
            for p, *_ in weights.values():
                p.grad = None  # a backward inside the model may add to it
            yield seen
            seen.buffers.update({name: b.detach().clone() for name, b in model.named_buffers()})
            for name, (p, _, value, _) in weights.items():
                if not _same(p.detach(), value):
                    seen.parameters[name] = p.detach().clone()
                if p.requires_grad != trained[name]:
                    seen.attributes[f"{name}.requires_grad"] = p.requires_grad
            for label, value in changed():
                seen.attributes.update(_comparable(label, value))
        finally:
            for name, (p, memory, value, gradient) in weights.items():
                p.requires_grad_(trained[name])
                if p.data_ptr() != memory.data_ptr():
                    p.data = memory
                if not _same(p.detach(), value):
                    p.data.copy_(value)
                p.grad = gradient


def _changes(label: str, now: Mapping[str, Any], before: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The attributes of one owner that were set or deleted; torch's own tables are compared elsewhere."""
    for name, value in now.items():
        if name.startswith("__"):
            continue  # set by decorators on functions, as by torch at the first run of a checkpoint
        if name not in TORCHS_OWN and (name not in before or not _is_as_before(value, before[name])):
            yield (f"{label}.{name}" if label else name), value
    for name in before.keys() - now.keys():
        yield (f"{label}.{name}" if label else name), "deleted"


def _is_as_before(value: Any, before: Any) -> bool:
    """Whether an attribute holds the same object, or a container with the same contents."""
    if value is before:
        return True
    return type(value) is type(before) and kind_of(value) is not None and is_same(contents(value), contents(before))


def _same(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a, b) or torch.equal(a.nan_to_num(), b.nan_to_num())


def _comparable(label: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The tensors and plain Python values in an attribute, by name; other objects are skipped."""
    for name, leaf in _leaves(label, value):
        if isinstance(leaf, Tensor):
            yield name, leaf.detach().clone()
        elif frozen(leaf) is not NOT_PLAIN:
            yield name, leaf


def _leaves(label: str, value: Any) -> Iterator[tuple[str, Any]]:
    for path, leaf in with_paths(value)[0]:
        yield label + _ADDRESS.sub("", pytree.keystr(path)), leaf  # drops addresses, so that names are stable


def _is_leaf(tensor: Tensor) -> bool:
    """Whether a tensor is a parameter or an input that requires a gradient, not computed by a step."""
    return tensor.requires_grad and tensor.grad_fn is None
