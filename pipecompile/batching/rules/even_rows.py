"""Values whose entries along the batch are all equal, such as the first state of a recurrent layer.

Where two views are joined along the batch, ``cat([x, x.flip(1)])``, a sample has entries that are apart. The sizes of
``zeros(2 * batch, width)`` do not tell whether they are apart or neighbors there, and it is the same: its kind is that
of the value that it meets.
"""

from __future__ import annotations

from dataclasses import replace

import torch.fx as fx

from pipecompile.batching.rules.batch_types import Batched, Kind, Shared
from pipecompile.batching.rules.use import Use
from pipecompile.ops.operators import function_of, named

CONSTANTS = named("zeros ones full new_zeros new_ones new_full")
SPREAD = named("expand expand_as broadcast_to repeat tile")
ROW_BY_ROW = named("""
    linear add sub mul div neg tanh sigmoid relu leaky_relu sin exp log abs gelu silu softplus clone contiguous detach
    to float double half bfloat16 type_as layer_norm
""")


def met(use: Use, one: tuple[Kind, fx.Node], other: tuple[Kind, fx.Node]) -> Kind | None:
    """The kind of two operands that meet, if one of them has equal entries along the batch; else None."""
    kinds = one[0], other[0]
    if any(not isinstance(kind, Batched) or kind.ragged for kind in kinds):
        return None
    sizes = {replace(kind, outer=1, inner=kind.outer * kind.inner) for kind in kinds if isinstance(kind, Batched)}
    if len(sizes) > 1:
        return None
    if is_even(use, one[1]):
        return other[0]
    return one[0] if is_even(use, other[1]) else None


def is_even(use: Use, value: fx.Node) -> bool:
    """Whether all entries of a value along the batch are equal, as the functions that made it tell."""
    seen: set[fx.Node] = set()
    stack = [value]
    while stack:
        node = stack.pop()
        function = function_of(node.target) if node.op == "call_function" else None
        read = [n for n in node.all_input_nodes if not isinstance(use.kinds[n], Shared)]
        if function in CONSTANTS or (function in SPREAD and not read and _from_one(use, node)):
            continue
        if function not in ROW_BY_ROW or not read:
            return False
        seen.add(node)
        stack.extend(n for n in read if n not in seen)
    return True


def _from_one(use: Use, node: fx.Node) -> bool:
    """Whether a shared value has one entry, or none, along the dimension that grows with the batch."""
    (dim,) = use.scale.growing(node)
    before = use.shape(node.args[0])
    at = dim - len(use.shape(node)) + len(before)
    return at < 0 or before[at] == 1
