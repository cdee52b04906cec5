"""The memory behind tensors, of layouts that have no one block of it too."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def has_storage(value: Any) -> bool:
    """Whether a value is a tensor in one block of memory; sparse ones have several, which are not counted."""
    return isinstance(value, Tensor) and value.layout == torch.strided


def nbytes(tensor: Tensor) -> int:
    """The bytes of a tensor's entries, zero for a sparse one."""
    return tensor.nbytes if has_storage(tensor) else 0
