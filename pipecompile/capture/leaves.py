"""Modules kept whole: one call of the graph, run as ordinary Python inside its stage.

What a module does may depend on activations (which experts are hit, when to stop), so that no single graph records it.
Such a module becomes a leaf: a ``call_module`` node under its own path. Its arguments are flattened, so that only
tensors flow along the graph's edges; everything else about the call is kept with the leaf.

What a leaf returns is learnt: by running it on fakes where that is possible, else by running it once for real, on what
the recorded graph computes from the sample.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from pipecompile.capture.values import DependsOnData
from pipecompile.randomness import compared


@dataclass(frozen=True, slots=True)
class Slot:
    """Stands for the n-th tensor among the arguments of a leaf."""

    position: int


@dataclass(frozen=True)
class LeafCall:
    """One call of a leaf: the module, and its arguments with a slot for each tensor."""

    path: str
    module: nn.Module
    spec: pytree.TreeSpec
    leaves: tuple[Any, ...]

    @staticmethod
    def of(path: str, module: nn.Module, args: Any, kwargs: Any) -> tuple[LeafCall, list[Tensor]]:
        """The call, and the tensors among its arguments."""
        flat, spec = pytree.tree_flatten((args, kwargs))
        tensors = [leaf for leaf in flat if isinstance(leaf, Tensor)]
        slots = iter(range(len(tensors)))
        leaves = tuple(Slot(next(slots)) if isinstance(leaf, Tensor) else leaf for leaf in flat)
        return LeafCall(path, module, spec, leaves), tensors

    def rebuild(self, tensors: tuple[Any, ...]) -> Any:
        """Positional and keyword arguments around other tensors."""
        leaves = [tensors[leaf.position] if isinstance(leaf, Slot) else leaf for leaf in self.leaves]
        return pytree.tree_unflatten(leaves, self.spec)


class Leaf(nn.Module):
    """A leaf inside a stage: takes and gives tensors alone.

    It has the parameters and buffers of a copy of the module under the module's own names, so that the stage may swap
    them.

    Args:
        calls: the recorded calls of one module; ``forward`` is told which of them it is to make.
        tensors: the model's parameters and buffers by full name.
    """

    def __init__(self, calls: Sequence[LeafCall], tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        inner = copy_of(calls[0].module, calls[0].path, tensors)
        self.__dict__["inner"] = inner  # not a submodule: names would change
        self._parameters, self._buffers, self._modules = inner._parameters, inner._buffers, inner._modules
        self.calls = tuple(calls)

    def forward(self, number: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        args, kwargs = self.calls[number].rebuild(tensors)
        before = dict(self.named_buffers())
        with compared():
            out = self.__dict__["inner"](*args, **kwargs)
        self._write_back(before)
        return tensors_of(out, self.calls[number].path)

    def _write_back(self, before: Mapping[str, Tensor]) -> None:
        """What the module has bound to the name of a buffer goes into the model's own buffer, which the copy shares."""
        for name, buffer in before.items():
            *parents, last = name.split(".")
            owner = self.get_submodule(".".join(parents))
            bound = owner._buffers[last]
            if bound is not buffer and bound is not None:
                with torch.no_grad():
                    buffer.copy_(bound)
                owner._buffers[last] = buffer


def attribute_of(path: str) -> str:
    """A leaf's name in a stage: its path, or one made up if the model does not own the module."""
    return re.sub(r"[^\w.]", "_", path) if "<" in path else path


def copy_of(module: nn.Module, path: str, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A module of its own with the same structure and attributes, on given tensors; hooks and modes are kept."""
    prefix = f"{path}." if path else ""
    copy = module.__class__.__new__(module.__class__)
    copy.__dict__ = dict(module.__dict__)
    copy.__dict__["_parameters"] = {
        n: t if t is None else tensors.get(prefix + n, t) for n, t in module._parameters.items()
    }
    copy.__dict__["_buffers"] = {n: t if t is None else tensors.get(prefix + n, t) for n, t in module._buffers.items()}
    copy.__dict__["_modules"] = {
        name: child if child is None else copy_of(child, prefix + name, tensors)
        for name, child in module._modules.items()
    }
    return copy


def tensors_of(output: Any, path: str) -> tuple[Tensor, ...]:
    """The tensors of a leaf's output.

    Raises:
        DependsOnData: the output holds something else that may change from call to call.
    """
    flat = pytree.tree_leaves(output)
    other = [leaf for leaf in flat if not isinstance(leaf, Tensor) and leaf is not None and not isinstance(leaf, str)]
    if other:
        raise DependsOnData(
            f"module {path!r} is kept whole but returns a {type(other[0]).__name__}, which cannot pass along the "
            f"graph; name a module further out in leaf_modules="
        )
    return tuple(leaf for leaf in flat if isinstance(leaf, Tensor))
