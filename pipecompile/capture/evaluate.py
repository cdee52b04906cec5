"""Runs part of the graph that is being recorded on real tensors, to get the values of some nodes."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from pipecompile.capture.origin import origin_of
from pipecompile.ops.device_args import retarget
from pipecompile.ops.modes import entered_modes
from pipecompile.ops.torch_internals import DisableTorchFunction, _disable_current_modes

META_TO_CPU = (torch.device("meta"), torch.device("cpu"))  # inputs have values even if the model is on meta


class Evaluator:
    """Computes values of nodes for one set of inputs, each of them once.

    Args:
        inputs: Real tensors by placeholder name.
        attribute: Returns the real tensor for a ``get_attr`` name.
        module: Returns what a ``call_module`` node runs.
        check: Called with each node before it is computed; raises if the node must not be computed.
        call: Calls a function of the graph.
        gradients: Whether autograd records.
    """

    def __init__(
        self,
        inputs: Mapping[str, Tensor],
        attribute: Callable[[str], Tensor],
        module: Callable[[str], Callable[..., Any]],
        check: Callable[[fx.Node], None] = lambda node: None,
        call: Callable[..., Any] = lambda function, *args, **kwargs: function(*args, **kwargs),
        gradients: bool = False,
    ) -> None:
        self.inputs = inputs
        self.attribute = attribute
        self.module = module
        self.check = check
        self.call = call
        self.gradients = gradients
        self.known: dict[fx.Node, Any] = {}

    def value(self, node: fx.Node) -> Any:
        """Returns the value of a node, computed outside all modes of the trace, but in the model's own autocasts."""
        recording = torch.set_grad_enabled(self.gradients)
        with DisableTorchFunction(), _disable_current_modes(), recording:
            return self._value(node)

    def _value(self, node: fx.Node) -> Any:
        stack = [node]
        while stack:  # no recursion: a graph may be deeper than Python's stack
            current = stack[-1]
            waiting = [source for source in current.all_input_nodes if source not in self.known]
            if current in self.known or not waiting:
                stack.pop()
                if current not in self.known:
                    self.known[current] = self._compute(current)
            else:
                stack.extend(waiting)
        return self.known[node]

    def _compute(self, node: fx.Node) -> Any:
        self.check(node)
        with entered_modes(True, origin_of(node).region.autocast):  # whether autograd records is the evaluator's choice
            return self._run(node)

    def _run(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return self.inputs[node.name]
        if node.op == "get_attr":
            tensor = self.attribute(str(node.target))
            written = not tensor.requires_grad or _is_written(node)
            return tensor.clone() if written else tensor
        args: Any = retarget(fx.map_arg(node.args, self.known.__getitem__), *META_TO_CPU)
        kwargs: Any = retarget(fx.map_arg(node.kwargs, self.known.__getitem__), *META_TO_CPU)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        if node.op == "call_module":
            return self.module(str(node.target))(*args, **kwargs)
        if node.target is operator.getitem:
            return args[0][args[1]]
        assert callable(node.target), origin_of(node)
        return self.call(node.target, *args, **kwargs)


def _is_written(attribute: fx.Node) -> bool:
    """Whether a node recorded so far writes to this parameter."""
    return any(str(attribute.target) in origin_of(node).writes for node in attribute.graph.nodes)
