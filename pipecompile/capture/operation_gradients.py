"""Which values of operations recorded inside transforms require a gradient in a stage.

Inside ``torch.func`` some operations run below autograd, such as those of which a forward derivative is made: their
values require no gradient there. A stage runs each operation by itself, where autograd sees it.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from pipecompile.capture.fake_runs import run_on_fakes
from pipecompile.capture.origin import origin_of
from pipecompile.ops.symbols import Shapes
from pipecompile.ops.torch_internals import pytree


def note_gradients(nodes: Iterable[fx.Node], shapes: Shapes | None) -> None:
    """Runs the operations among nodes again, on fake tensors, which read what requires a gradient and return none."""
    for node in nodes:
        if node.op != "call_function" or origin_of(node).mutates or not origin_of(node).region.grad:
            continue
        if _wants(node.meta.get("val")) or not any(_wants(source.meta.get("val")) for source in node.all_input_nodes):
            continue
        if node.target is operator.getitem or isinstance(node.target, torch._ops.OpOverload):
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda source: source.meta["val"])
            with torch.enable_grad():
                again = run_on_fakes(node.target, args, kwargs, shapes)
            if _wants(again):
                node.meta["val"] = again


def _wants(value: Any) -> bool:
    return any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in pytree.tree_leaves(value))
