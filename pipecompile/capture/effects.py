"""What a call does beside giving a result, seen below autograd: it draws random numbers, and writes to memory.

Autograd's version counters do not tell of every write: one through ``x.data`` has a counter of its own, and some
functions have none. The operations that reach the tensors themselves say in their schemas what they write.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from pipecompile.capture.functionalize import storage_key
from pipecompile.errors import DependsOnData
from pipecompile.ops.operators import function_of, named
from pipecompile.ops.torch_internals import FakeTensor, OpOverload, TorchDispatchMode

_COMPRESSED = named("""
    sparse_compressed_tensor _sparse_compressed_tensor_unsafe _to_sparse_csr _to_sparse_csc _to_sparse_bsr
    _to_sparse_bsc
""")


class Effects(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees the operations that run in it.

    Raises:
        DependsOnData: one makes a sparse matrix of compressed rows, which no fake tensor can be: torch's own error on
            it recurs until Python gives up, and leaves the thread in the midst of a dispatch.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.draws = False
        self.written: set[int | None] = set()  # memory, by ``storage_key``

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function_of(func) in _COMPRESSED and any(isinstance(argument, FakeTensor) for argument in args):
            raise DependsOnData("a sparse matrix of compressed rows is made, which no graph holds")
        self.draws |= torch.Tag.nondeterministic_seeded in func.tags
        self.written.update(storage_key(tensor) for tensor in written_by(func, args, kwargs))
        return func(*args, **kwargs)

    def among(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        """Those of the tensors whose memory was written."""
        return [t for t in tensors if self.written and storage_key(t) in self.written - {None}]


def written_by(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that an aten operation writes to, by its schema; none for other functions."""
    if not isinstance(func, OpOverload) or not func._schema.is_mutable:
        return []
    written: list[Tensor] = []
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = kwargs.get(argument.name, args[position] if position < len(args) else None)
            written += [value] if isinstance(value, Tensor) else [t for t in value or () if isinstance(t, Tensor)]
    return written
