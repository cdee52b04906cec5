"""The call of one node, on its own tensors."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor, nn

from pipecompile.capture.functionalize import storage_key
from pipecompile.capture.origin import origin_of
from pipecompile.ops.modes import entered_modes
from pipecompile.profile.allocations import Allocations
from pipecompile.profile.storages import has_storage, nbytes


class Call:
    """The call of a node on its own leaf tensors, so that its backward can run alone.

    Args:
        on_views: whether an operand is a view in a stage; here all operands are leaves.
    """

    def __init__(self, node: fx.Node, function: Any, args: Any, kwargs: Any, on_views: bool = False) -> None:
        self.function = function
        self.region = origin_of(node).region
        self.mutates = origin_of(node).mutates
        self.on_views = on_views
        self.args, self.kwargs = args, kwargs
        own = list(function.parameters()) if isinstance(function, nn.Module) else []
        self.leaves: list[Tensor] = [t for t in [*tensors_of((args, kwargs)), *own] if t.requires_grad]
        self.differentiable = False

    def value(self) -> tuple[Any, list[Tensor]]:
        """The value for later nodes, and the tensors that autograd keeps.

        An in-place write goes to the memory that later nodes read, without gradients. The tensors that autograd would
        keep are found on copies, and mapped back to the originals.
        """
        if not self.mutates:
            return self._watched(self.args, self.kwargs)
        copies = self.operands()
        out, saved = self._watched(*copies)
        value = self.written()
        pairs = zip(tensors_of((copies, out)), tensors_of(((self.args, self.kwargs), value)), strict=True)
        original = {storage_key(copy): tensor for copy, tensor in pairs if has_storage(copy)}
        return value, [original.get(storage_key(t), t) for t in saved]

    def written(self) -> Any:
        """Runs a call that writes in place to the memory that later nodes read, without gradients."""
        with torch.no_grad():
            return self._run(self.args, self.kwargs)

    def _watched(self, args: Any, kwargs: Any) -> tuple[Any, list[Tensor]]:
        saved: list[Tensor] = []

        def pack(tensor: Tensor) -> None:
            saved.append(tensor)

        with torch.autograd.graph.saved_tensors_hooks(pack, _never_unpacked):
            value = self._run(args, kwargs)
        # autograd keeps ``pack`` and what it returns: an output that its own graph keeps would never be freed
        found = list(saved)
        saved.clear()
        return value, found

    def forward(self) -> list[Tensor]:
        """Runs the call, any number of times. Returns the outputs that a backward can start from."""
        outputs = tensors_of(self._run(*self.operands()))
        self.differentiable = bool(self.leaves) and any(t.grad_fn is not None for t in outputs)
        return outputs

    def operands(self) -> tuple[Any, Any]:
        """The arguments for one more run, which may write to them."""
        return map_tensors(self._copy, (self.args, self.kwargs)) if self.mutates else (self.args, self.kwargs)

    def backward(self, outputs: list[Tensor], seeds: list[Tensor] | None = None) -> None:
        """Runs the backward of ``outputs``, from the gradients ``seeds`` or ones."""
        roots = [t for t in outputs if t.grad_fn is not None]
        torch.autograd.grad(roots, self.leaves, seeds or _ones(roots), allow_unused=True)

    def seeds(self, outputs: list[Tensor]) -> list[Tensor]:
        """Gradients of ``outputs`` that a backward can start from. In a stage, these come from the next one."""
        return _ones([t for t in outputs if t.grad_fn is not None])

    def allocated(self) -> tuple[int, int]:
        """Peak bytes that a forward and a backward allocate; 0 for a backward that cannot run alone."""
        with Allocations() as during_forward:
            outputs = self.forward()
        if not self.differentiable:
            return during_forward.most, 0
        seeds = self.seeds(outputs)
        try:
            with Allocations() as during_backward:
                self.backward(outputs, seeds)
        except RuntimeError:
            return during_forward.most, 0
        return during_forward.most, during_backward.most

    @property
    def is_half(self) -> bool:
        """Whether the call computes in 16 bits."""
        floats = [t for t in tensors_of((self.args, self.kwargs)) if t.is_floating_point()]
        return any(t.itemsize == 2 for t in floats)

    def traffic(self, outputs: list[Tensor]) -> int:
        """Bytes that a forward reads and writes; 0 if its outputs are views."""
        read = tensors_of((self.args, self.kwargs))
        known = {storage_key(t) for t in read} - {None}
        is_view = all(storage_key(t) in known for t in outputs)
        return 0 if is_view else sum(map(nbytes, read + outputs))

    def _copy(self, tensor: Tensor) -> Tensor:
        """A copy; of a view, a view: the backward of a write into one copies the gradient (torch's ``CopySlices``)."""
        copy = tensor.clone()
        return copy.view(copy.shape) if self.on_views and has_storage(copy) else copy

    def entered(self) -> ExitStack:
        """A context with the modes of its region."""
        return entered_modes(self.region.grad, self.region.autocast)

    def _run(self, args: Any, kwargs: Any) -> Any:
        with self.entered():
            return self.function(*args, **kwargs)


def _never_unpacked(packed: None) -> Tensor:
    raise AssertionError("the value of a node has no backward")


def _ones(tensors: list[Tensor]) -> list[Tensor]:
    return [torch.ones_like(tensor) for tensor in tensors]


def tensors_of(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, tuple | list):
        return [tensor for item in value for tensor in tensors_of(item)]
    if isinstance(value, dict):
        return [tensor for item in value.values() for tensor in tensors_of(item)]
    return []


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    return torch.utils._pytree.tree_map_only(Tensor, function, value)


def as_recorded(value: Any, recorded: Any) -> Any:
    """A node's value as leaves for later nodes, with ``requires_grad`` as recorded in the trace."""
    wants = iter([t.requires_grad for t in tensors_of(recorded)])
    return map_tensors(lambda t: t.detach().requires_grad_(next(wants, False)), value)


def described(value: Any) -> Any:
    """A hashable description of arguments: equal for equal operations on equal shapes."""
    if isinstance(value, Tensor):
        order = value.stride() if has_storage(value) else value.layout
        return (tuple(value.shape), order, value.dtype, value.requires_grad)
    if isinstance(value, tuple | list):
        return tuple(map(described, value))
    if isinstance(value, dict):
        return tuple((key, described(item)) for key, item in value.items())
    return repr(value)
