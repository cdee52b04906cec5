"""Numbers that Python computes before each step, as extra inputs of the graph."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.fx as fx

from pipecompile.capture.call import Call
from pipecompile.capture.origin import Origin
from pipecompile.capture.state.counters import Number
from pipecompile.ops.functional import number
from pipecompile.ops.torch_internals import FakeTensorMode


class NumberInputs:
    """The numbers that the graph of one trace takes as inputs.

    Args:
        graph: The graph; contains the placeholders of the tensors before the first number is read.
        mode: Of the trace.
    """

    def __init__(self, graph: fx.Graph, mode: FakeTensorMode) -> None:
        self.graph = graph
        self.mode = mode
        self.numbers: dict[str, Number] = {}  # by placeholder
        self._nodes: dict[str, fx.Node] = {}

    def node(self, value: Number) -> fx.Node:
        """Returns the node that reads a number from its placeholder."""
        name = next((name for name, known in self.numbers.items() if known is value), "")
        if not name:
            name = f"_number{len(self.numbers)}"
            self.numbers[name] = value
            last = [node for node in self.graph.nodes if node.op == "placeholder"][-1]
            with self.graph.inserting_after(last):
                placeholder = self.graph.create_node("placeholder", name, name=name)
            with self.mode:
                placeholder.meta.update(val=torch.empty((), dtype=_dtype_of(value)), origin=Origin())
            with self.graph.inserting_after(placeholder):
                self._nodes[name] = self.graph.call_function(number, (placeholder,))
            self._nodes[name].meta.update(val=value.value, origin=Origin())
        return self._nodes[name]

    def added_to(self, call: Call) -> Call:
        """Returns the sample with the numbers that Python computed for it."""
        numbers = {name: torch.tensor(value.value, dtype=_dtype_of(value)) for name, value in self.numbers.items()}
        return replace(call, tensors={**call.tensors, **numbers})


def _dtype_of(value: Number) -> torch.dtype:
    return torch.int64 if type(value.value) is int else torch.float64
