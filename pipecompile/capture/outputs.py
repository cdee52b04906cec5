"""What leaves a graph: what the model returns, what forward stores somewhere, and what it writes to its arguments."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from pipecompile.capture.ancestors import ancestors
from pipecompile.capture.call import Call
from pipecompile.capture.captured import Given, Output
from pipecompile.capture.fake_inputs import FakeInputs
from pipecompile.capture.node_table import NodeTable
from pipecompile.capture.output_batch_dims import batch_dim
from pipecompile.capture.pytrees import flatten, is_stream
from pipecompile.capture.real_tensors import RealTensors
from pipecompile.capture.state.counters import is_number
from pipecompile.capture.state.guards import Update
from pipecompile.errors import CaptureError
from pipecompile.ops.functional import after
from pipecompile.ops.tensor_args import is_real
from pipecompile.ops.torch_internals import FakeTensorMode, pytree


class Outputs:
    """The outputs of one trace.

    Args:
        table: The nodes of the trace.
        call: Sample arguments.
        inputs: Their fakes.
        tensors: The real tensors that the graph reads.
        mode: Of the trace.
    """

    def __init__(
        self, table: NodeTable, call: Call, inputs: FakeInputs, tensors: RealTensors, mode: FakeTensorMode
    ) -> None:
        self.table = table
        self.call = call
        self.inputs = inputs
        self.tensors = tensors
        self.mode = mode
        self.batch = next((shape[0] for name, shape in inputs.shapes.items() if name in call.batched), None)
        self.left: dict[str, Output] = {}  # tensors that forward stores somewhere, by node
        self.written: dict[str, str] = {}  # tensor of the call -> node written to it

    def left_behind(self, tensor: Tensor) -> Update:
        """Returns how a later call computes a tensor that forward stores: from the model, an input, or the graph.

        Raises:
            CaptureError: The trace has not recorded how the tensor is computed.
        """
        own = self.table.names.get(id(tensor))
        if is_real(tensor) or own is not None:
            real = tensor if own is None else self.tensors.named(own)
            return lambda state: real
        with self.mode:
            node = self.table.node_of(tensor)
            if node.op != "placeholder":
                node = self._as_output(tensor, node)
        name, dim = node.name, self.call.dims.get(node.name, 0)
        if node.op == "placeholder":
            return lambda state: state.tensors[name].movedim(0, dim) if dim else state.tensors[name]
        self._leave(tensor, node)
        return lambda state: state.tensors[name]

    def note_written(self) -> None:
        """Notes the writes of forward to the caller's tensors, which the pipeline makes after each call."""
        for name, fake in self.inputs.tensors.items():
            node = self.table.node_of(fake)
            if node.op != "placeholder":
                self._leave(fake, node)
                self.written[name] = node.name

    def end(self, out: Any) -> tuple[tuple[Output, ...], pytree.TreeSpec]:
        """Ends the graph. Returns the outputs of the model and their tree.

        Args:
            out: What forward returned.

        Raises:
            CaptureError: A part of it is a generator or another iterator.
        """
        leaves, spec = flatten(out)
        for path, leaf in leaves:
            if is_stream(leaf):
                where = f" at {pytree.keystr(path)}" if path else ""
                raise CaptureError(
                    f"forward returns a {type(leaf).__name__}{where}, whose code runs only when the caller asks for "
                    f"its items, outside of the stages; return a list of its items"
                )
        with self.mode:
            lowered = [self.table.lower(leaf) for _, leaf in leaves]
        lowered = [self._as_output(leaf, self._given(low)) for (_, leaf), low in zip(leaves, lowered, strict=True)]
        outputs = tuple(self._output(path, leaf, low) for (path, leaf), low in zip(leaves, lowered, strict=True))
        nodes = {node.name: node for node in self.table.graph.nodes}
        returned = [low for low in lowered if isinstance(low, fx.Node)]
        self.table.graph.output((*returned, *(nodes[str(output.node)] for output in self.left.values())))
        return outputs, spec

    def _given(self, lowered: Any) -> Any:
        """Returns ``Given`` for a tensor of a cache that forward has left as it is: no stage passes it on."""
        own = isinstance(lowered, fx.Node) and lowered.op == "placeholder" and lowered.name in self.call.cached
        return Given(lowered.name) if own else lowered

    def _leave(self, tensor: Tensor, node: fx.Node) -> None:
        self.left.setdefault(node.name, replace(self._output((), tensor, node), name=node.name))

    def _as_output(self, leaf: Any, lowered: Any) -> Any:
        """Returns what an output is read from: a parameter through a node of its own, a size as an expression."""
        if is_number(leaf):
            return leaf.concrete()
        if isinstance(leaf, torch.SymInt | torch.SymFloat | torch.SymBool):
            return leaf.node.expr
        if isinstance(lowered, Given):
            return lowered
        if isinstance(leaf, Tensor) and self.table.aliases.buffer_of(leaf) in self.tensors.buffers:
            return self.table.emit(torch.clone, (lowered,), like=lowered)  # the next microbatch may write it
        if isinstance(lowered, fx.Node) and lowered.op == "get_attr":
            return self.table.emit(after, (lowered,), like=lowered)
        return lowered

    def _output(self, path: Any, leaf: Any, lowered: Any) -> Output:
        name = ".".join(str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path)
        if isinstance(lowered, Given):
            return Output(name, None, lowered, batch_dim=batch_dim(leaf, self.batch, self.table.sizes.shapes))
        if not isinstance(lowered, fx.Node):
            return Output(name, None, lowered)
        scalar = leaf.ndim == 0 and leaf.dtype.is_floating_point
        shared = not any(n.op == "placeholder" and n.name in self.call.batched for n in ancestors([lowered]))
        dim = batch_dim(leaf, self.batch, self.table.sizes.shapes)
        return Output(
            name=name,
            node=lowered.name,
            value=None,
            batch_dim=dim,
            is_scalar=scalar,
            is_shared=shared,
            requires_grad=leaf.requires_grad,
            retains_grad=leaf.retains_grad,
        )
