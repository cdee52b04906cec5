"""The accelerators that a test runs on: virtual ones, in each way of running queued work, or real ones."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import pytest
import torch


@dataclass(frozen=True)
class Machine:
    """Devices of one type.

    Attributes:
        type: ``virt``, ``cuda`` or ``cpu``.
        mode, seed: When a virtual device runs what is queued.
    """

    type: str
    mode: str = ""
    seed: int = 0

    def __str__(self) -> str:
        return f"{self.mode or self.type}{self.seed or ''}"

    @property
    def is_virtual(self) -> bool:
        return self.type == "virt"

    def start(self) -> None:
        """Puts the machine into its mode; a virtual device is built and loaded if need be."""
        if self.is_virtual:
            import virtual_device as vd

            vd.run(self.mode, self.seed, 200 if self.mode == "threads" else 0)

    def __getitem__(self, index: int) -> torch.device:
        if self.type == "cpu":
            return torch.device("cpu")
        return torch.device(self.type, index % torch.accelerator.device_count())


CPU = Machine("cpu")
SYNC = Machine("virt", "sync")
LATE, EARLY = Machine("virt", "late"), Machine("virt", "early")
RANDOM = tuple(Machine("virt", "random", seed) for seed in range(1, 6))
THREADS = Machine("virt", "threads")
NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


def reset() -> None:
    """Puts virtual devices back into their first state."""
    vd: Any = sys.modules.get("virtual_device")
    if vd is None:
        return
    vd.fail_after(-1)
    for device in range(vd.DEVICES):
        vd.fail_kernel(device, -1)
    vd.run("threads")
    vd.strict(False)
    vd.peers(True)
    for device in range(vd.DEVICES):
        vd.limit(device, 1 << 30)
        vd.slowness(device, 1.0)
    vd.waits()
