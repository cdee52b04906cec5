"""Runs parts of a trace by themselves, on inputs with a given number of rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor, nn

from pipecompile.capture import Captured
from pipecompile.capture.evaluate import Evaluator
from pipecompile.capture.opaque_calls import Leaf, kept_module
from pipecompile.ops.away import lacks_values, stand_in
from pipecompile.ops.randomness import drawing_from, undropped
from pipecompile.ops.torch_internals import _DropoutNd, pytree


class Bench:
    """Runs parts of a trace on ``rows`` rows of the sample, which is repeated if it has fewer."""

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
        """The value of a node on the sample."""
        return self.evaluator.value(node)

    def run(
        self,
        outputs: Sequence[fx.Node],
        values: Mapping[fx.Node, Any],
        seed: int = 0,
        watch: AbstractContextManager[Any] | None = None,
    ) -> dict[fx.Node, Any]:
        """Computes nodes from the given values of other nodes, with random numbers drawn from ``seed``.

        Dropout is off: it drops entries of each sample independently of the others, and would hide other effects.
        Functions and parts kept whole run inside ``watch``.
        """
        return self._run(self._evaluator(watch=watch), outputs, values, seed)

    def gradients(
        self, outputs: Sequence[fx.Node], values: Mapping[fx.Node, Any], incoming: Callable[[int, Tensor], Tensor]
    ) -> dict[fx.Node, Tensor]:
        """The gradients of ``values``, from gradients of the outputs; values without a gradient are left out.

        Args:
            incoming: gives the gradient of an output from its position among the outputs' tensors and its value.
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

    def _run(
        self, evaluator: Evaluator, outputs: Sequence[fx.Node], values: Mapping[fx.Node, Any], seed: int
    ) -> dict[fx.Node, Any]:
        with torch.set_grad_enabled(evaluator.gradients):
            evaluator.known.update({n: v.clone() if isinstance(v, Tensor) else v for n, v in values.items()})
        with drawing_from(seed, self.captured.device):
            return {n: evaluator.value(n) for n in outputs}

    def _evaluator(self, gradients: bool = False, watch: AbstractContextManager[Any] | None = None) -> Evaluator:
        tensors = self.captured.tensors
        if gradients and not lacks_values(self.captured.model):
            # a user's backward may add to gradients of weights, so it gets copies
            tensors = {name: _copy(tensor) for name, tensor in tensors.items()}
        inside = partial(_inside, nullcontext() if watch is None else watch)
        return Evaluator(
            self.inputs,
            lambda name: stand_in(tensors[name]),
            lambda target: partial(inside, _undropping(self.captured, tensors, target)),
            call=partial(inside, undropped),
            gradients=gradients,
        )


def _inside(watch: AbstractContextManager[Any], function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with watch:
        return function(*args, **kwargs)


def _undropping(captured: Captured, tensors: Mapping[str, Tensor], target: str) -> Leaf:
    """A module kept whole as a leaf, with the dropout modules inside its copy in eval mode."""
    leaf = captured.leaf(target, tensors)
    for module in kept_module(leaf).modules():
        if isinstance(module, _DropoutNd):
            module.training = False
    return leaf


def _copy(tensor: Tensor) -> Tensor:
    copy = tensor.detach().clone()
    return nn.Parameter(copy, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copy


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())
