"""A stage as a function of its arguments and its weights.

A stage module reads its parameters as attributes. To run it on one version of the weights, they would have to be put
into its modules and taken out again in every call (``torch.func.functional_call``), which takes longer than a small
layer. In a lifted stage they are arguments. A module kept whole, whose forward is not a graph, still gets them so.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch.fx as fx
from torch import Tensor, nn
from torch.func import functional_call

from pipecompile.capture.purity import name_of
from pipecompile.ops.functional import is_traceable
from pipecompile.ops.operators import is_opaque
from pipecompile.ops.split_backward import SPLIT
from pipecompile.ops.splittable import weights_of
from pipecompile.runtime.split import Stage, quiet


def lift(stage: Stage, splits: bool = False) -> fx.GraphModule:
    """The module of a stage, called with ``stage.arguments`` and then a tensor for each of ``stage.names``.

    Its code has the nodes of the stage's own, under the same names.

    Args:
        splits: whether its backward may leave gradients of weights in a queue (``ops/split_backward.py``).
    """
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    nodes = list(stage.module.graph.nodes)
    for node in nodes:
        if node.op == "placeholder":
            copies[node] = graph.node_copy(node)
    lifted = {name: graph.placeholder("weight") for name in stage.names}
    for node in lifted.values():
        node.target = node.name  # which no input has
    for node in nodes:
        if node.op == "get_attr" and str(node.target) in lifted:
            copies[node] = lifted[str(node.target)]
        elif node.op != "placeholder":
            copies[node] = graph.node_copy(node, copies.__getitem__)
            if node.op == "call_module":
                _lift_leaf(copies[node], stage.module.get_submodule(str(node.target)), lifted)
            elif splits:
                _split(copies[node], set(lifted.values()))
    return quiet(fx.GraphModule(stage.module, graph, class_name=f"Lifted{stage.module.__class__.__name__}"))


def read_only(stage: Stage) -> frozenset[str]:
    """The model inputs of a stage of which no call can change anything but values, such as ``requires_grad``."""
    arguments = [node for node in stage.module.graph.nodes if node.op == "placeholder"]  # inputs, then what is received
    pairs = zip(stage.inputs, arguments, strict=False)
    return frozenset(name for name, node in pairs if all(map(_only_reads, node.users)))


def only_sized(stage: Stage) -> frozenset[str]:
    """The model inputs of which a stage reads the sizes only, on whatever device they are."""
    arguments = [node for node in stage.module.graph.nodes if node.op == "placeholder"]
    pairs = zip(stage.inputs, arguments, strict=False)
    return frozenset(
        name for name, node in pairs if all((it.op, it.target) == ("call_method", "size") for it in node.users)
    )


def _only_reads(user: fx.Node) -> bool:
    """Whether a call is of a known function that sets nothing; torch's names of those that do end with "_"."""
    if user.op == "call_module" or (is_opaque(user.target) and not is_traceable(user.target)):
        return False
    return not name_of(user).endswith("_")


def _split(call: fx.Node, parameters: Set[fx.Node]) -> None:
    """Makes a call of a function with parameters one whose backward leaves their gradients."""
    weights = weights_of(call)
    if weights is not None and parameters >= set(weights):
        call.target = SPLIT[call.target]


def _lift_leaf(call: fx.Node, leaf: nn.Module, lifted: dict[str, fx.Node]) -> None:
    """Makes the call of a module kept whole one that gets the lifted tensors as its first arguments."""
    prefix = f"{call.target}."
    names = [name for name in _places(leaf) if prefix + name in lifted]
    if names:
        call.op, call.target = "call_function", OnTensors(leaf, tuple(names))
        call.args = (*(lifted[prefix + name] for name in names), *call.args)


def _places(leaf: nn.Module) -> Iterator[str]:
    """A name for each place that holds a tensor: one, if a module inside has several paths, all of a tied tensor."""
    for path, module in leaf.named_modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                yield f"{path}.{name}" if path else name


@dataclass(frozen=True, eq=False)
class OnTensors:
    """A module kept whole, called with some of its tensors, then its arguments."""

    leaf: nn.Module
    names: Sequence[str]

    @property
    def __name__(self) -> str:
        return "on_tensors"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tensors: dict[str, Tensor] = dict(zip(self.names, args, strict=False))
        return functional_call(self.leaf, tensors, args[len(self.names) :], kwargs, tie_weights=False)
