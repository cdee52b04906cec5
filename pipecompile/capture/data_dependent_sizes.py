"""Data-dependent sizes: how many rows a mask selects, how many entries are nonzero.

A symbol represents such a size in the trace. The operations that produce and use it run on the real data, so no
expression over the inputs' sizes is needed at run time. Only planning needs a number, and uses the largest possible.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import sympy
import torch
import torch.fx as fx
from torch import Tensor

from pipecompile.ops.symbols import resolve
from pipecompile.ops.torch_internals import pytree


def largest_sizes(graph: fx.Graph, sizes: Mapping[sympy.Symbol, int]) -> dict[sympy.Symbol, int]:
    """Returns the largest value of each data-dependent size symbol: its tensor keeps every entry that its node reads.

    Args:
        graph: The captured graph.
        sizes: Values of the inputs' size symbols.
    """
    known = dict(sizes)
    for node in graph.nodes:
        for tensor in _tensors(node.meta.get("val")):
            new = _symbols(tensor) - set(known)
            if new:
                read = [math.prod(_shape(t, known)) for n in node.all_input_nodes for t in _tensors(n.meta.get("val"))]
                rest = math.prod(_shape(tensor, {**known, **dict.fromkeys(new, 1)}))
                known.update(dict.fromkeys(new, max(1, max(read, default=1) // max(1, rest))))
    return {symbol: size for symbol, size in known.items() if symbol not in sizes}


def _tensors(value: Any) -> Iterator[Tensor]:
    return (leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor))


def _symbols(tensor: Tensor) -> set[sympy.Symbol]:
    shape: tuple[Any, ...] = tuple(tensor.shape)
    return {symbol for size in shape if isinstance(size, torch.SymInt) for symbol in size.node.expr.free_symbols}


def _shape(tensor: Tensor, sizes: Mapping[sympy.Symbol, int]) -> list[int]:
    return [int(resolve(size, sizes)) for size in tensor.shape]
