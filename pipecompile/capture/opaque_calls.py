"""Modules and functions kept whole as leaves: one node of the graph, run as ordinary Python inside one stage.

What a module does may depend on activations (which experts are used, when to stop), so no single graph can represent
it. Such a module becomes a leaf: a ``call_module`` node under its own path. A function can also be a leaf (a loss whose
shapes depend on data, a matching computed outside torch): a ``call_function`` node. The arguments are flattened, so
that the edges of the graph carry only tensors and sizes; everything else about the call is stored with the leaf.

To find out what a leaf returns, it is run on fake tensors if possible, otherwise once on real tensors that the recorded
graph computes from the sample.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from pipecompile.capture.functionalize import storage_key
from pipecompile.errors import DependsOnData, ExecutionError
from pipecompile.ops.device_args import retarget
from pipecompile.ops.module_tree import called_bare
from pipecompile.ops.randomness import compared
from pipecompile.ops.tensor_args import version
from pipecompile.ops.torch_internals import pytree

_INNER, _CALLS = "leaf.inner", "leaf.calls"  # with a dot, which torch allows in no name
CHANGING = (Tensor, torch.SymInt, torch.SymFloat, torch.SymBool)


@dataclass(frozen=True, slots=True)
class Slot:
    """Placeholder for the n-th argument of a leaf that changes from call to call: a tensor or a size."""

    position: int


@dataclass(frozen=True)
class LeafCall:
    """One call of a leaf: the module or function, and its arguments with a slot for each tensor and each size.

    Attributes:
        path: Path of the module, or of the module that calls the function.
        kept: The module or function.
        spec: Tree of the arguments.
        leaves: Leaves of the tree.
        shapes: Output shapes, if a run on real tensors found them; every later run must return the same.
        writes: Parameters that the module wrote to, by their names in it.
    """

    path: str
    kept: Callable[..., Any]
    spec: pytree.TreeSpec
    leaves: tuple[Any, ...]
    shapes: tuple[tuple[int, ...], ...] | None = None
    writes: tuple[str, ...] = ()

    @staticmethod
    def of(path: str, kept: Callable[..., Any], args: Any, kwargs: Any) -> tuple[LeafCall, list[Any]]:
        """Returns the call, and its arguments that change from call to call: tensors and symbolic sizes."""
        flat, spec = pytree.tree_flatten((args, kwargs))
        changing = [leaf for leaf in flat if isinstance(leaf, CHANGING)]
        slots = iter(range(len(changing)))
        leaves = tuple(Slot(next(slots)) if isinstance(leaf, CHANGING) else leaf for leaf in flat)
        return LeafCall(path, kept, spec, leaves), changing

    @property
    def name(self) -> str:
        if isinstance(self.kept, nn.Module):
            return f"module {self.path!r}"
        return f"function {getattr(self.kept, '__qualname__', self.kept)}"

    def rebuild(self, changing: tuple[Any, ...]) -> Any:
        """Returns the positional and keyword arguments with other tensors and sizes."""
        leaves = [changing[leaf.position] if isinstance(leaf, Slot) else leaf for leaf in self.leaves]
        return pytree.tree_unflatten(leaves, self.spec)

    def tensors_of(self, output: Any) -> tuple[Tensor, ...]:
        """Returns the tensors of an output.

        Raises:
            DependsOnData: The output contains something else that may change from call to call.
            ExecutionError: The shapes differ from the captured ones.
        """
        flat = pytree.tree_leaves(output)
        other = [leaf for leaf in flat if not isinstance(leaf, Tensor | str) and leaf is not None]
        if other:
            raise DependsOnData(
                f"{self.name} is kept whole but returns a {type(other[0]).__name__}, which cannot pass between nodes "
                f"of the graph; name a module further out in leaf_modules="
            )
        tensors = tuple(leaf for leaf in flat if isinstance(leaf, Tensor))
        seen = tuple(tuple(tensor.shape) for tensor in tensors)
        if self.shapes is not None and seen != self.shapes:
            raise ExecutionError(
                f"{self.name} is kept whole and returns shapes {_listed(seen)}, but was captured with "
                f"{_listed(self.shapes)}: they depend on data; keep a larger part whole with leaf_modules="
            )
        return tensors


class FunctionLeaf:
    """Called by the graph for a function kept whole: takes tensors and sizes, returns tensors."""

    def __init__(self, call: LeafCall) -> None:
        self.call = call
        self.__name__ = str(getattr(call.kept, "__name__", "function"))

    def on(self, old: torch.device, new: torch.device) -> FunctionLeaf:
        """Returns the same call with ``old``, the device of the trace, replaced by ``new`` in its arguments."""
        return FunctionLeaf(replace(self.call, leaves=retarget(self.call.leaves, old, new)))

    def __call__(self, *changing: Any) -> tuple[Tensor, ...]:
        args, kwargs = self.call.rebuild(changing)
        with compared():
            out = self.call.kept(*args, **kwargs)
        return self.call.tensors_of(out)


class Leaf(nn.Module):
    """A module kept whole, inside a stage: takes tensors and sizes, returns tensors.

    It has the parameters, buffers and children of a copy of the module under the module's own names, so that the stage
    can swap them. torch looks them up as attributes, and finds those of the class first. So neither the class nor its
    instances have a name that ``nn.Module`` does not have: a module may be called so.

    Args:
        calls: The recorded calls of one module; the first argument of ``forward`` selects one of them.
        tensors: The model's parameters and buffers by full name.
    """

    def __init__(self, calls: Sequence[LeafCall], tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        module: Any = calls[0].kept
        inner = copy_of(module, calls[0].path, tensors)
        self.__dict__[_INNER], self.__dict__[_CALLS] = inner, tuple(calls)  # not a submodule: names would change
        self._parameters, self._buffers, self._modules = inner._parameters, inner._buffers, inner._modules

    def __call__(self, *args: Any) -> Any:
        return called_bare(self, *args)

    def forward(self, number: int, *changing: Any) -> tuple[Tensor, ...]:
        call = self.__dict__[_CALLS][number]
        args, kwargs = call.rebuild(changing)
        inner = copy_of(kept_module(self), "", {})  # keeps these tensors: its backward may run its modules again
        held = [(tensor, tensor.data, version(tensor)) for tensor in (*self.parameters(), *self.buffers())]
        with compared():
            out = inner(*args, **kwargs)
        _refuse_new_writes(self, call, held)
        _write_back(self, inner, held)
        found: tuple[Tensor, ...] = call.tensors_of(out)
        return found


def _refuse_new_writes(leaf: Leaf, call: LeafCall, held: Sequence[tuple[Tensor, Tensor, int]]) -> None:
    """Raises ``ExecutionError`` if the module writes to parameters but did not during the capture."""
    written = {id(t) for t, data, before in held if version(t) != before or storage_key(t) != storage_key(data)}
    for name, parameter in leaf.named_parameters():
        if id(parameter) in written and not call.writes:
            raise ExecutionError(
                f"{call.name} is kept whole and wrote to its parameter {name!r}, which it did not do when the "
                f"model was captured; call the module outside the pipeline for that"
            )


def _write_back(leaf: Leaf, inner: nn.Module, held: Sequence[tuple[Tensor, Tensor, int]]) -> None:
    """Copies tensors that the module bound to a buffer's name or to ``.data`` into the model's own tensors."""
    with torch.no_grad():
        for tensor, data, _ in held:
            if storage_key(tensor) != storage_key(data):
                tensor.data = data.copy_(tensor.data)
    bound = dict(inner.named_buffers())
    for name, buffer in leaf.named_buffers():
        if name in bound and bound[name] is not buffer:
            with torch.no_grad():
                buffer.copy_(bound[name])


def kept_module(leaf: Leaf) -> nn.Module:
    """Returns the copy of a module kept whole that has the tensors of its leaf."""
    found: nn.Module = leaf.__dict__[_INNER]
    return found


def attribute_of(path: str) -> str:
    """Returns a leaf's name in a stage: its path, or a derived name if the model does not own the module."""
    return re.sub(r"[^\w.]", "_", path) if "<" in path else path


def _listed(shapes: tuple[tuple[int, ...], ...]) -> str:
    return ", ".join(map(str, shapes))


def copy_of(
    module: nn.Module, path: str, tensors: Mapping[str, Tensor], made: dict[int, nn.Module] | None = None
) -> nn.Module:
    """Returns a copy of a module that uses the given tensors; structure, attributes, hooks and modes are the same."""
    made = {} if made is None else made
    if id(module) in made:
        return made[id(module)]
    prefix = f"{path}." if path else ""
    copy = made[id(module)] = module.__class__.__new__(module.__class__)
    copy.__dict__ = dict(module.__dict__)
    for table in ("_parameters", "_buffers"):
        held = module.__dict__[table]
        copy.__dict__[table] = {n: t if t is None else tensors.get(prefix + n, t) for n, t in held.items()}
    copy.__dict__["_modules"] = {
        name: child if child is None else copy_of(child, prefix + name, tensors, made)
        for name, child in module._modules.items()
    }
    return copy
