"""The memory of tensors, also for layouts without a single block of memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def has_storage(value: Any) -> bool:
    """Whether a value is a tensor in a single block of memory. Sparse tensors have several, which are not counted."""
    return isinstance(value, Tensor) and value.layout == torch.strided


def nbytes(tensor: Tensor) -> int:
    """The bytes of a tensor's elements; 0 for a sparse tensor."""
    return tensor.nbytes if has_storage(tensor) else 0
