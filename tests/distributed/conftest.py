"""One launcher for all tests: the import of torch is the dear part of a process."""

from collections.abc import Iterator

import pytest
from launcher import Launcher


@pytest.fixture(scope="session")
def launcher() -> Iterator[Launcher]:
    launcher = Launcher()
    yield launcher
    launcher.close()
