"""Notes which tests reach which places of the package: ``mutation_run.py`` puts this file into its copy of the package.

Each process of pytest has a log, which the processes that its tests start share: the tests as they begin and end, and
each place when a test reaches it for the first time. What is reached before the first test is reached at import.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

_LOG = os.open(
    Path(os.environ["REACHED"], os.environ.get("PYTEST_XDIST_WORKER", "main")),
    os.O_WRONLY | os.O_APPEND | os.O_CREAT,
    0o600,
)
_seen: set[int] = set()


def note(place: int) -> None:
    """Called where a place begins."""
    if place not in _seen:
        _seen.add(place)
        os.write(_LOG, b"reached %d\n" % place)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    _seen.clear()
    os.write(_LOG, f"begin {item.nodeid}\n".encode())
    start = time.perf_counter()
    try:
        return (yield)
    finally:
        os.write(_LOG, f"end {time.perf_counter() - start:.3f}\n".encode())


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed:
        os.write(_LOG, f"failed {report.nodeid}\n".encode())
