"""A trace with inputs of some rows, on which a part of it is run by itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor, nn

from pipecompile.capture import Captured
from pipecompile.capture.evaluate import Evaluator
from pipecompile.capture.opaque_calls import Leaf
from pipecompile.ops.randomness import undropped
from pipecompile.ops.torch_internals import _DropoutNd, pytree


class Bench:
    """Runs parts of a trace on so many rows of the sample, which is repeated where it has fewer."""

    def __init__(self, captured: Captured, rows: int) -> None:
        self.captured = captured
        self.rows = rows
        batch = captured.call.batch or 1
        picked = torch.arange(rows) % batch
        batched = captured.call.batched
        tensors = {name: tensor.detach() for name, tensor in captured.call.tensors.items()}
        self.inputs = {
            name: tensor[picked.to(tensor.device)] if name in batched else tensor for name, tensor in tensors.items()
        }
        self.evaluator = self._evaluator()

    def value(self, node: fx.Node) -> Any:
        """The value of a node for the sample."""
        return self.evaluator.value(node)

    def run(self, outputs: Sequence[fx.Node], values: Mapping[fx.Node, Any], seed: int = 0) -> dict[fx.Node, Any]:
        """The values of nodes, from those of others; random numbers are drawn from the seed.

        Without dropout, which drops entries of each sample whatever the others are, and would hide what else happens.
        """
        return self._run(self._evaluator(), outputs, values, seed)

    def gradients(
        self, outputs: Sequence[fx.Node], values: Mapping[fx.Node, Any], incoming: Callable[[int, Tensor], Tensor]
    ) -> dict[fx.Node, Tensor]:
        """The gradients of the values that get one, from those that come into the outputs.

        Args:
            incoming: gives the gradient of an output, by its position among the outputs' tensors, and its value.
        """
        wanted = {n: v.detach().clone().requires_grad_() for n, v in values.items() if _is_float(v)}
        found = self._run(self._evaluator(True), outputs, {**values, **wanted}, 0)
        tensors = [t for n in outputs for t in pytree.tree_leaves(found[n])]
        ends = [(i, t) for i, t in enumerate(tensors) if isinstance(t, Tensor) and t.requires_grad]
        if not ends or not wanted:
            return {}
        given = [incoming(i, t.detach()) for i, t in ends]
        gradients = torch.autograd.grad([t for _, t in ends], [*wanted.values()], given, allow_unused=True)
        return {n: g for n, g in zip(wanted, gradients, strict=True) if g is not None}

    @staticmethod
    def _run(
        evaluator: Evaluator, outputs: Sequence[fx.Node], values: Mapping[fx.Node, Any], seed: int
    ) -> dict[fx.Node, Any]:
        with torch.set_grad_enabled(evaluator.gradients):
            evaluator.known.update({n: v.clone() if isinstance(v, Tensor) else v for n, v in values.items()})
        state = torch.get_rng_state()
        torch.manual_seed(seed)
        try:
            return {n: evaluator.value(n) for n in outputs}
        finally:
            torch.set_rng_state(state)

    def _evaluator(self, gradients: bool = False) -> Evaluator:
        tensors = self.captured.tensors
        if gradients:  # a backward of the user's may add to the gradients of weights: to those of copies
            tensors = {name: _copy(tensor) for name, tensor in tensors.items()}
        leaf = partial(_undropping, self.captured, tensors)
        return Evaluator(self.inputs, tensors.__getitem__, leaf, call=undropped, gradients=gradients)


def _undropping(captured: Captured, tensors: Mapping[str, Tensor], target: str) -> Leaf:
    """A module that is kept whole, with the dropout modules inside its copy in evaluation."""
    leaf = captured.leaf(target, tensors)
    for module in leaf.__dict__["inner"].modules():
        if isinstance(module, _DropoutNd):
            module.training = False
    return leaf


def _copy(tensor: Tensor) -> Tensor:
    copy = tensor.detach().clone()
    return nn.Parameter(copy, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copy


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())
