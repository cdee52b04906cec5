"""Tests on accelerators: virtual ones, unless real ones are asked for with ``pytest -m cuda``.

The virtual device stays in its process for good, so these tests run by themselves: ``python -m pytest tests/devices``.
It must be there before the first backward, when autograd starts a thread for each device.
"""

from __future__ import annotations

from collections.abc import Iterator

import machines
import pytest


@pytest.fixture(scope="session", autouse=True)
def _devices(request: pytest.FixtureRequest) -> None:
    if "cuda" not in request.config.getoption("-m"):
        import virtual_device  # noqa: F401


@pytest.fixture(autouse=True)
def _as_before(_devices: None) -> Iterator[None]:
    yield
    machines.reset()
