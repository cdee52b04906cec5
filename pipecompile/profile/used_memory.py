"""Free memory as a training step finds it: used before, so that the system need not provide and clear it again.

The first use of a page takes longer than an operation on it. In a profile all memory would be new, in a step none is.
glibc gives memory back to the system when the free block at the end of its heap is large, and takes blocks of some size
from the system each time. It raises both thresholds when a large block is freed, which a step does early. A block that
stays in use at the end holds what is free before it.

Source: the GNU C Library's manual, "Malloc Tunable Parameters".
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

BLOCK, PAGE = 1 << 20, 1 << 12  # bytes
LARGEST = (32 << 20) - (64 << 10)  # bytes of a block whose size glibc learns when it is freed


@contextmanager
def used_memory(nbytes: int) -> Iterator[None]:
    """A context in which at least so much free memory has been used, where glibc allocates."""
    _bytes(LARGEST)
    blocks = [_bytes(BLOCK) for _ in range(1 + nbytes // BLOCK)]
    for place in range(len(blocks)):
        blocks[place][::PAGE] = 0
    blocks = [max(blocks, key=Tensor.data_ptr)]
    yield
    blocks.clear()


def _bytes(count: int) -> Tensor:
    return torch.empty(count, dtype=torch.uint8)
