"""Makes ``len(x)`` of a tensor return the symbolic size ``x.shape[0]``.

Python's own ``len`` must return an int, which would fix the size. So during a trace, the files that define the model's
classes get another ``len``.
"""

from __future__ import annotations

import builtins
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from pipecompile.ops.torch_internals import FakeTensor


@contextmanager
def symbolic_lengths(model: nn.Module) -> Iterator[None]:
    """Puts a ``len`` that keeps sizes symbolic into the files of a model's classes that do not define their own."""
    names = {kind.__module__ for module in model.modules() for kind in type(module).__mro__}
    names = {name for name in names if name.partition(".")[0] not in ("torch", "builtins")}
    files = [vars(sys.modules[name]) for name in names if name in sys.modules]
    ours = [file for file in files if "len" not in file]
    for file in ours:
        file["len"] = _length
    try:
        yield
    finally:
        for file in ours:
            file.pop("len", None)


def _length(value: Any) -> Any:
    return value.shape[0] if isinstance(value, FakeTensor) and value.ndim else builtins.len(value)
