"""Writes the values that tensors of the model have at the end of forward to them: ``self.buffer = y``, ``x.data = y``.

The write is the last of the tensor's nodes. What reads the value from before forward reads a clone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from pipecompile.capture.node_table import NodeTable
from pipecompile.capture.origin import Origin, origin_of
from pipecompile.capture.real_tensors import RealTensors
from pipecompile.ops.functional import write_back
from pipecompile.ops.torch_internals import FakeTensorMode


def write_final_values(
    values: Mapping[str, Tensor], table: NodeTable, tensors: RealTensors, mode: FakeTensorMode
) -> None:
    """Adds the writes to the graph.

    Args:
        values: By the name of the parameter, buffer or constant.
        table: The nodes of the trace.
        tensors: What the names are names of.
        mode: Of the trace.
    """
    for name, value in values.items():
        real = tensors.named(name)
        with mode:
            buffer, new = table.attribute(name, table.fakes[id(real)]), table.node_of(value)
        node = table.emit(write_back, (buffer, new))
        made = origin_of(new)  # the write has no line of its own: forward has ended
        origin = replace(origin_of(node), path=made.path, source=made.source, writes=(name,), mutates=True)
        node.meta.update(val=value, origin=origin)
        with table.graph.inserting_after(buffer):  # readers of the old value must not see the write
            old = table.graph.call_function(torch.clone, (buffer,))
        old.meta.update(buffer.meta, origin=Origin())
        keep = {old, node}
        buffer.replace_all_uses_with(old, delete_user_cb=lambda user, keep=keep: user not in keep)  # type: ignore[misc]
