"""Makes the inputs of a trace: a placeholder and a fake for each tensor of the call, with the sizes of a microbatch.

The batch is one symbol in all tensors. A length that is likely to change between steps is a symbol, too; equal lengths
are the same symbol.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipecompile.capture.call import Call, order_of
from pipecompile.capture.captured import SymbolicSizes
from pipecompile.capture.node_table import NodeTable
from pipecompile.capture.origin import Origin
from pipecompile.ops.symbols import Shapes, expression
from pipecompile.ops.torch_internals import FakeTensorMode


@dataclass(frozen=True)
class FakeInputs:
    """The inputs of a trace.

    Attributes:
        tensors: Fakes, by the names in the call.
        shapes: Sizes that a call must have, by placeholder: expressions or numbers.
    """

    tensors: Mapping[str, Tensor]
    shapes: Mapping[str, tuple[Any, ...]]


def fake_inputs(
    call: Call,
    microbatch: int,
    symbolic: SymbolicSizes,
    mode: FakeTensorMode,
    device: torch.device,
    table: NodeTable,
) -> FakeInputs:
    """Creates the inputs, and adds them to the table.

    Args:
        call: Sample arguments, for the whole batch.
        microbatch: Rows of the microbatch that is traced.
        symbolic: Which sizes to make symbolic.
        mode: Makes the fakes.
        device: Of the fakes.
        table: Receives the placeholders.
    """
    symbols = _Symbols(call, microbatch, symbolic, table.sizes.shapes)
    tensors: dict[str, Tensor] = {}
    shapes: dict[str, tuple[Any, ...]] = {}
    for name, real in call.tensors.items():
        shape = [symbols.size(name, real, dim) for dim in range(real.ndim)]
        order = order_of(real)
        with mode, torch.no_grad():
            fake = torch.empty([shape[d] for d in order or range(real.ndim)], dtype=real.dtype, device=device)
            fake = fake if order is None else fake.permute(sorted(range(real.ndim), key=order.__getitem__))
        fake.requires_grad_(real.requires_grad)
        placeholder = table.graph.create_node("placeholder", name, name=name)
        placeholder.meta["origin"] = Origin()
        table.add_input(fake, placeholder)
        for dim, size in enumerate(shape):
            if isinstance(size, torch.SymInt):
                table.sizes.declare(size, placeholder, dim)
        shapes[placeholder.name] = tuple(expression(size) for size in shape)
        tensors[name] = fake
    return FakeInputs(tensors, shapes)


class _Symbols:
    """The sizes of the inputs: the batch and lengths as symbols, as far as ``symbolic`` says, others as numbers."""

    def __init__(self, call: Call, microbatch: int, symbolic: SymbolicSizes, shapes: Shapes | None) -> None:
        self.call = call
        self.microbatch = microbatch
        self.symbolic = symbolic
        self.shapes = shapes
        self.known: dict[tuple[str, int], int | torch.SymInt] = {}  # by kind and size

    def size(self, name: str, real: Tensor, dim: int) -> int | torch.SymInt:
        """Returns the size of a dimension of an input."""
        if dim == 0 and name in self.call.batched:
            kind, size = "batch", self.microbatch
            is_symbol = SymbolicSizes.BATCH in self.symbolic
        elif (key := self.call.cached.get(name)) is not None:
            kind, size = f"cache {key.part}", int(real.shape[dim])
            is_symbol = SymbolicSizes.LENGTHS in self.symbolic and dim == (1 if key.is_number else real.ndim - 2)
        else:
            kind, size = "length", int(real.shape[dim])
            is_symbol = self._is_length(real, dim, size)
        if self.shapes is None or not is_symbol:
            return size
        if (kind, size) not in self.known:
            hint = max(2, size) if kind == "batch" else size
            self.known[kind, size] = self.shapes.symbol(f"{name}.{dim}", hint)
        return self.known[kind, size]

    def _is_length(self, real: Tensor, dim: int, size: int) -> bool:
        """Whether a dimension is likely to change between steps: of ids, of sequences, or as long as one of those."""
        if SymbolicSizes.LENGTHS not in self.symbolic:
            return False
        if ("length", size) in self.known:
            return True
        ids = not real.dtype.is_floating_point
        return (ids and size > 1) or (real.ndim == 3 and dim == 1)
