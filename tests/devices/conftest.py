"""Tests on accelerators: virtual ones, unless real ones are asked for with ``pytest -m cuda``.

The virtual device stays in its process for good, so these tests run by themselves: ``python -m pytest tests/devices``.
It must be there before the first backward, when autograd starts a thread for each device.

The devices decide in which order work is done, not the threads' cores. On one core the threads hand Python's lock to
each other with two thirds of the processor time, and leave the other core to other tests. Long runs use all cores.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import machines
import pytest
from long import LONG


@pytest.fixture(scope="session", autouse=True)
def _devices(request: pytest.FixtureRequest) -> None:
    if "cuda" not in request.config.getoption("-m"):
        import virtual_device  # noqa: F401

        if not LONG and hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


@pytest.fixture(autouse=True)
def _as_before(_devices: None) -> Iterator[None]:
    yield
    machines.reset()
