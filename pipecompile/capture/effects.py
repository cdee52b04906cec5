"""Observes the side effects of a call below autograd: drawing random numbers and writing to memory.

Autograd's version counters do not show every write: ``x.data`` has a counter of its own, and some functions count
nothing. The schemas of the aten operations that a call reaches say what each of them writes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from pipecompile.capture.functionalize import storage_key
from pipecompile.capture.repeated_views import RepeatedViews
from pipecompile.errors import DependsOnData
from pipecompile.ops.operators import function_of, named
from pipecompile.ops.torch_internals import FakeTensor, OpOverload, TorchDispatchMode

_COMPRESSED = named("""
    sparse_compressed_tensor _sparse_compressed_tensor_unsafe _to_sparse_csr _to_sparse_csc _to_sparse_bsr
    _to_sparse_bsc
""")


class Effects(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Observes the operations that run inside it.

    Args:
        views: The views that the trace has made, which it makes again.

    Raises:
        DependsOnData: An operation creates a compressed sparse matrix, which a fake tensor cannot represent. torch's
            own error there recurses to Python's limit and leaves the thread inside a dispatch.
    """

    def __init__(self, views: RepeatedViews | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.views = views
        self.draws = False
        self.written: set[int | None] = set()  # memory, by ``storage_key``

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function_of(func) in _COMPRESSED and any(isinstance(argument, FakeTensor) for argument in args):
            raise DependsOnData("the model creates a compressed sparse matrix, which a graph cannot hold")
        self.draws |= torch.Tag.nondeterministic_seeded in func.tags
        self.written.update(storage_key(tensor) for tensor in written_by(func, args, kwargs))
        return func(*args, **kwargs) if self.views is None else self.views.run(func, args, kwargs)

    def among(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        """Returns the tensors whose memory was written."""
        return [t for t in tensors if self.written and storage_key(t) in self.written - {None}]


def written_by(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Returns the tensors that an aten operation writes to according to its schema; none for other functions."""
    if not isinstance(func, OpOverload) or not func._schema.is_mutable:
        return []
    written: list[Tensor] = []
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = kwargs.get(argument.name, args[position] if position < len(args) else None)
            written += [value] if isinstance(value, Tensor) else [t for t in value or () if isinstance(t, Tensor)]
    return written
