"""Calls with other tensors in place of a model's parameters, as ``torch.func.functional_call`` makes them.

Stages use the model's own parameters. During such a call and its backward, the parameters are put back, on the memory
of the tensors that replace them; the gradients that they get are passed to those tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pipecompile.capture.state.model_state import named_tensors
from pipecompile.errors import InputError
from pipecompile.ops.torch_internals import pytree
from pipecompile.runtime.delivery import connected


def called_with(
    model: nn.Module,
    own: Mapping[str, Tensor],
    call: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> Any:
    """Calls a pipeline with the tensors that are in the model now, differentiable by them and by the arguments.

    Args:
        own: the model's own parameters and buffers, by all their names.
        call: runs the pipeline on its model.

    Raises:
        InputError: a tensor has another shape, dtype or device than the parameter or buffer that it replaces, or the
            call, the first one, has moved the parameters to the devices of their stages.
    """
    put = {name: t for name, t in named_tensors(model) if name in own and t is not own[name]}
    for name, tensor in put.items():
        if (tensor.shape, tensor.dtype, tensor.device) != (own[name].shape, own[name].dtype, own[name].device):
            raise InputError(
                f"{name!r} of shape {tuple(own[name].shape)}, {own[name].dtype} on {own[name].device} cannot be "
                f"replaced by a tensor of shape {tuple(tensor.shape)}, {tensor.dtype} on {tensor.device}; pass one of "
                f"the same shape, dtype and device"
            )
    leaves, tree = pytree.tree_flatten((args, dict(kwargs)))
    inputs = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
    wanted = [*{id(own[name]): name for name, tensor in put.items() if tensor.requires_grad}.values()]  # once if tied
    run = _Run(model, own, put, call, leaves, tree, inputs, wanted)
    if not torch.is_grad_enabled() or not (inputs or wanted):
        return run.output(())
    outputs = [tensor.detach().requires_grad_() for tensor in run.forward()]
    for name in wanted:
        if put[name].device != own[name].device:  # autograd could not bring a gradient to what is on the old one
            raise InputError(
                f"{name!r} was computed on {put[name].device}, but this first call has moved the parameter to "
                f"{own[name].device}, the device of its stage; compute it again from the parameters and call again"
            )
    to = [*(leaves[i] for i in inputs), *(put[name] for name in wanted)]
    return run.rebuilt(connected(outputs, to, lambda _, gradients: run.backward(gradients)))


class _Run:
    """One such call, with the state that its backward needs."""

    def __init__(
        self,
        model: nn.Module,
        own: Mapping[str, Tensor],
        put: Mapping[str, Tensor],
        call: Callable[..., Any],
        leaves: list[Any],
        tree: pytree.TreeSpec,
        inputs: Sequence[int],
        wanted: Sequence[str],
    ) -> None:
        self.model, self.own, self.put, self.call = model, own, put, call
        self.leaves, self.tree, self.inputs, self.wanted = leaves, tree, inputs, wanted
        self.copies: list[Tensor] = []
        self.found: Any = None

    def output(self, copies: Sequence[Tensor]) -> Any:
        """The pipeline's output, with copies in place of the arguments that require a gradient."""
        given = dict(zip(self.inputs, copies, strict=False))
        args, kwargs = pytree.tree_unflatten([given.get(i, leaf) for i, leaf in enumerate(self.leaves)], self.tree)
        with _in_place(self.model, self.own, self.put):
            return self.call(*args, **kwargs)

    def forward(self) -> tuple[Tensor, ...]:
        """The tensors of the output that require a gradient."""
        with torch.enable_grad():
            self.copies = [self.leaves[i].detach().requires_grad_() for i in self.inputs]
            self.found = pytree.tree_flatten(self.output(self.copies))
        return tuple(leaf for leaf in self.found[0] if self._takes(leaf))

    def backward(self, gradients: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        """The gradients of the arguments, then of the tensors that replace parameters."""
        roots = [leaf for leaf in self.found[0] if self._takes(leaf)]
        given = [(root, gradient) for root, gradient in zip(roots, gradients, strict=True) if gradient is not None]
        with _in_place(self.model, self.own, self.put):
            return torch.autograd.grad(
                [root for root, _ in given],
                [*self.copies, *(self.own[name] for name in self.wanted)],
                [gradient for _, gradient in given],
                allow_unused=True,
            )

    def rebuilt(self, tensors: Sequence[Tensor]) -> Any:
        left = iter(tensors)
        leaves, tree = self.found
        return pytree.tree_unflatten([next(left) if self._takes(leaf) else leaf for leaf in leaves], tree)

    @staticmethod
    def _takes(leaf: Any) -> bool:
        return isinstance(leaf, Tensor) and leaf.requires_grad


@contextmanager
def _in_place(model: nn.Module, own: Mapping[str, Tensor], put: Mapping[str, Tensor]) -> Iterator[None]:
    """Puts a model's own tensors back, on the memory of the tensors that replace them."""
    memory = {name: (own[name].data, own[name].requires_grad) for name in put}
    standing = {name: tensor for name, tensor in named_tensors(model) if name in put}
    for name, tensor in put.items():
        _set(model, name, own[name])
        own[name].data = tensor.detach()
        if isinstance(own[name], nn.Parameter):
            own[name].requires_grad_(tensor.requires_grad)
    try:
        yield
    finally:
        for name, (data, wants) in memory.items():
            own[name].data = data.to(own[name].device)
            own[name].requires_grad_(wants)
            _set(model, name, standing[name])


def _set(model: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, last = name.rpartition(".")
    owner = model.get_submodule(path)
    table = owner._parameters if last in owner._parameters else owner._buffers
    table[last] = tensor  # type: ignore[assignment]
