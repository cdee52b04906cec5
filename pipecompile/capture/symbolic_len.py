"""``len(x)`` of a tensor: the symbolic size that ``x.shape[0]`` gives.

Python's own ``len`` must return a true integer, which would fix the size for good. So for the time of a trace, the
files that a model's classes are written in have a ``len`` of ours.
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
    """Gives the files of a model's classes a ``len`` that leaves sizes open, where they have none of their own."""
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
