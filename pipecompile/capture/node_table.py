"""The table of one trace: which node of the graph has the present value of a tensor.

A tensor is looked up by identity; all tensors are kept alive during the trace, so that no identity is used twice. A
real tensor that forward uses gets a fake, and a ``get_attr`` node where it is first read.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.fx as fx
from torch import Tensor, nn

from pipecompile.capture.autograd_history import Histories
from pipecompile.capture.functionalize import Aliases
from pipecompile.capture.origin import Origin
from pipecompile.capture.scopes import Scopes
from pipecompile.capture.state.counters import Argument, Number, WholeArgument, is_number
from pipecompile.errors import CaptureError, DependsOnData
from pipecompile.ops.modes import PLAIN
from pipecompile.ops.names import in_code
from pipecompile.ops.source_lines import user_line
from pipecompile.ops.symbols import Sizes
from pipecompile.ops.tensor_args import is_real
from pipecompile.ops.torch_internals import pytree


class NodeTable:
    """The nodes of the tensors that one trace has seen.

    Args:
        graph: Receives the nodes.
        sizes: Turns symbolic sizes into nodes.
        scopes: What is around each call.
        constant: Returns a name and a fake for a real tensor that is not a parameter or buffer.
        number: Returns the node of a number that Python computes before each step.
    """

    def __init__(
        self,
        graph: fx.Graph,
        sizes: Sizes,
        scopes: Scopes,
        constant: Callable[[Tensor], tuple[str, Tensor]],
        number: Callable[[Number], fx.Node],
    ) -> None:
        self.graph = graph
        self.sizes = sizes
        self.scopes = scopes
        self.constant = constant
        self.number = number
        self.nodes: dict[int, fx.Node] = {}
        self.names: dict[int, str] = {}  # parameters, buffers and constants
        self.trainable: set[str] = set()  # those that are parameters
        self.attributes: dict[str, fx.Node] = {}  # the nodes that read them
        self.fakes: dict[int, Tensor] = {}  # by the identity of the real tensor
        self.layouts: dict[int, torch.layout] = {}  # of tensors whose fakes are dense
        self.alive: list[Any] = []
        self.aliases = Aliases(self.emit, self.nodes.__setitem__)
        self.histories = Histories(self.is_known, sizes.shapes)

    def add_input(self, tensor: Tensor, placeholder: fx.Node) -> None:
        self.bind(tensor, placeholder)
        self.aliases.add(tensor, placeholder, [], ())

    def add_attribute(self, name: str, fake: Tensor, real: Tensor) -> None:
        """Adds a parameter, buffer or constant that the graph reads under ``name``."""
        self.names.setdefault(id(fake), name)
        if isinstance(real, nn.Parameter):
            self.trainable.add(name)
        if real.layout != torch.strided:
            self.layouts[id(fake)] = real.layout
        self.fakes[id(real)] = fake
        self.alive += [fake, real]
        self.aliases.add_buffer(name, fake)

    def is_known(self, tensor: Tensor) -> bool:
        return id(tensor) in self.nodes or id(tensor) in self.names

    def node_of(self, tensor: Tensor) -> fx.Node:
        """Returns the present node of a tensor.

        Raises:
            DependsOnData: It is a fake tensor that no recorded function created.
        """
        node = self.nodes.get(id(tensor))
        if node is not None:
            return node
        name = self.names.get(id(tensor))
        if name is None:
            if is_real(tensor):
                return self.node_of(self.fake(tensor))
            raise self.out_of_sight(tensor)
        node = self.graph.get_attr(in_code(name))
        node.meta["val"] = tensor
        self.bind(tensor, node)
        self.aliases.add(tensor, node, [], ())
        self.attributes[name] = node
        return node

    def out_of_sight(self, tensor: Tensor) -> DependsOnData:
        """Returns the error for a tensor that no recorded call created."""
        return DependsOnData(
            f"{self.scopes.here}: a tensor of shape {tuple(tensor.shape)} was created by a call that the tracer did "
            f"not see; name the module around it in leaf_modules="
        )

    def attribute(self, name: str, tensor: Tensor) -> fx.Node:
        """Returns the node that reads the value of a parameter, buffer or constant before forward."""
        if name not in self.attributes:
            self.node_of(tensor)
        return self.attributes[name]

    def fake(self, value: Any) -> Any:
        """Returns arguments with each real tensor replaced by its fake."""
        if isinstance(value, Tensor):
            if not is_real(value):
                return value
            if id(value) not in self.fakes:
                name, fake = self.constant(value)
                self.add_attribute(name, fake, value)
            return self.fakes[id(value)]
        if isinstance(value, slice):
            return slice(self.fake(value.start), self.fake(value.stop), self.fake(value.step))
        if isinstance(value, list | tuple | dict):
            return pytree.tree_map(lambda leaf: self.fake(leaf) if isinstance(leaf, Tensor | slice) else leaf, value)
        return value

    def lower(self, value: Any) -> Any:
        """Returns an argument with its tensors and symbolic sizes replaced by nodes."""
        if is_number(value):
            return value.concrete()
        if type(value) in (Argument, WholeArgument):
            return self.number(value.number)
        match value:
            case Tensor():
                return self.node_of(value)
            case torch.SymInt() | torch.SymFloat() | torch.SymBool():
                return self.sizes.node(value)
            case torch.Size() | list() | tuple():
                items = [self.lower(item) for item in value]
                if isinstance(value, tuple) and _is_made_of_fields(type(value)):
                    return type(value)(*items)
                return items if isinstance(value, list) else tuple(items)
            case dict():
                return {key: self.lower(item) for key, item in value.items()}
            case slice():
                return slice(self.lower(value.start), self.lower(value.stop), self.lower(value.step))
            case np.ndarray():
                return value.tolist()
            case _ if type(value).__module__ == "numpy" and hasattr(value, "item") and getattr(value, "ndim", 1) == 0:
                return value.item()
            case _:
                return value

    def emit(
        self,
        func: Any,
        args: Any,
        kwargs: Any = None,
        like: fx.Node | None = None,
        written: Sequence[Tensor] = (),
    ) -> fx.Node:
        """Appends a call that writes to ``written``. Its value has the metadata of ``like``, if that is given."""
        node = self.graph.call_function(func, tuple(args), kwargs or {})
        region = self.scopes.region if like is None else like.meta.get("origin", Origin()).region
        region = PLAIN if func is torch.clone and like is not None else region
        buffers = tuple(name for name in map(self.aliases.buffer_of, written) if name is not None)
        node.meta["origin"] = Origin(
            path=self.scopes.path,
            source=user_line(),
            region=region,
            writes=buffers,
            mutates=bool(written),
            recompute=self.scopes.recompute,
        )
        if like is not None:
            node.meta["val"] = like.meta.get("val")
        return node

    def bind(self, tensor: Tensor, node: fx.Node) -> None:
        """Makes a node that of a tensor."""
        self.nodes[id(tensor)] = node
        self.alive.append(tensor)
        node.meta.setdefault("val", tensor)
        (self.histories.forget if self.scopes.inside_transform else self.histories.note)(tensor)

    def bind_results(self, node: fx.Node, out: Any, sources: list[Tensor]) -> None:
        """Binds what a call returned, possibly views of its ``sources``.

        Raises:
            CaptureError: It returned something other than tensors, lists and tuples.
        """
        if isinstance(out, Tensor):
            self.bind(out, node)
            self.aliases.add(out, node, sources, (node,))
        elif isinstance(out, tuple | list):
            node.meta.setdefault("val", out)
            self.bind_items(node, out, sources, (node,))
        elif out is not None:
            raise CaptureError(
                f"{self.scopes.here}: {node.target} returns a {type(out).__name__}, which cannot be recorded in the "
                f"graph; name the module around it in leaf_modules="
            )

    def bind_items(self, node: fx.Node, out: Any, sources: list[Tensor], recipe: tuple[fx.Node, ...]) -> None:
        """Binds each tensor in a list or tuple to a node that selects it from the value of ``node``.

        Args:
            node: The call that returned the items, or an item of it.
            out: The items.
            sources: Tensors that the items may be views of.
            recipe: The nodes that compute ``out`` from one of these.
        """
        for index, item in enumerate(out):
            if isinstance(item, Tensor):
                picked = self.emit(operator.getitem, (node, index))
                self.bind(item, picked)
                self.aliases.add(item, picked, sources, (*recipe, picked))
            elif isinstance(item, tuple | list):
                picked = self.emit(operator.getitem, (node, index))
                picked.meta["val"] = item
                self.bind_items(picked, item, sources, (*recipe, picked))


def _is_made_of_fields(kind: type) -> bool:
    """Whether a type is a named tuple without a ``__new__`` of its own, which could not take nodes."""
    owner = next((each for each in kind.__mro__ if "_fields" in vars(each)), None)
    return owner is not None and kind.__new__ is owner.__new__
