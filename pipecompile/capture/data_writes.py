"""``x.data = y`` and ``x.set_(y)``: the tensor keeps its autograd history and gets the memory of another tensor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pipecompile.capture.fake_runs import run_on_fakes
from pipecompile.capture.functionalize import storage_key
from pipecompile.capture.node_table import NodeTable
from pipecompile.capture.origin import origin_of
from pipecompile.capture.unseen_calls import check_tensors
from pipecompile.errors import CaptureError, DependsOnData
from pipecompile.ops.functional import with_data
from pipecompile.ops.modes import PLAIN


class DataWrites:
    """Records such writes during one trace.

    Args:
        table: The nodes of the trace.
    """

    def __init__(self, table: NodeTable) -> None:
        self.table = table
        self.moved: dict[str, Tensor] = {}  # parameters, buffers and constants whose .data was set

    def set_data(self, func: Callable[..., Any], tensor: Tensor, value: Tensor) -> None:
        """Records ``tensor.data = value``: the tensor keeps its autograd history and gets other values."""
        table = self.table
        tensor, value = table.fake(tensor), table.fake(value)
        if storage_key(tensor) == storage_key(value) and _geometry(tensor) == _geometry(value):
            return  # x.data += y
        if tensor.shape != value.shape or tensor.dtype != value.dtype:
            raise CaptureError(
                f"{table.scopes.here}: forward sets the .data of a {tensor.dtype} tensor of shape "
                f"{tuple(tensor.shape)} to a {value.dtype} tensor of shape {tuple(value.shape)}; it must keep its "
                f"shape and dtype"
            )
        check_tensors(table, [tensor, value])
        before, data = table.node_of(tensor), table.node_of(value)
        name = table.names.get(id(tensor))
        if name is None:  # tensors of the model are cloned where their last value is written back
            before = table.emit(torch.clone, (before,), like=before)
        table.aliases.leave(tensor)
        self._keep_values(tensor)
        run_on_fakes(func, (tensor, value), {}, table.sizes.shapes)
        node = table.emit(with_data, (before, data))
        node.meta["origin"] = replace(origin_of(node), region=PLAIN, copies=() if name is None else (name,))
        table.bind(tensor, node)
        table.aliases.add(tensor, node, [value], (node,))
        table.aliases.groups.append((before, node))
        if name is not None:
            self.moved[name] = tensor

    def set_storage(self, func: Callable[..., Any], tensor: Tensor, *source: Any, **kwargs: Any) -> None:
        """Records ``tensor.set_(source)``.

        Raises:
            DependsOnData: The source is a storage, not a tensor.
        """
        if len(source) != 1 or not isinstance(source[0], Tensor) or kwargs:
            raise self.asks_for_storage()
        self.set_data(func, tensor, source[0])

    def asks_for_storage(self) -> DependsOnData:
        """Returns the error for a forward that gets the storage of a tensor."""
        return DependsOnData(
            f"{self.table.scopes.here}: forward accesses the storage of a tensor, and the tracer cannot see writes to "
            f"a storage; write to the tensor itself, or name the module around it in leaf_modules="
        )

    def last_values(self) -> dict[str, Tensor]:
        """Returns the model's tensors whose ``.data`` forward has set.

        Raises:
            CaptureError: One of them has the memory of another tensor of the model.
        """
        keys = [storage_key(tensor) for tensor in self.moved.values()]
        for name, tensor in self.moved.items():
            if keys.count(storage_key(tensor)) > 1 or self.table.aliases.buffer_of(tensor) is not None:
                raise CaptureError(
                    f"forward gives {name!r} the memory of another tensor of the model (self.{name}.data = ...), so a "
                    f"write to one would also change the other; copy the values: self.{name}.data.copy_(...)"
                )
        return self.moved

    def _keep_values(self, tensor: Tensor) -> None:
        """Keeps the memory of a tensor that is about to change as the value of its earlier nodes."""
        held = tensor.detach().requires_grad_(tensor.requires_grad)
        self.table.alive.append(held)
        for node in self.table.graph.nodes:
            if node.meta.get("val") is tensor:
                node.meta["val"] = held


def _geometry(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype
