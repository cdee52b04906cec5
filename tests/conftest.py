"""One thread, fixed seeds, and no test that hangs: after ``HANG`` seconds all stacks are printed and pytest ends."""

import faulthandler
import gc
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import hypothesis
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from families import FAMILIES, LATER
from long import LONG

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["PIPECOMPILE_CACHE"] = "off"  # also in processes that tests start; the tests of the cache name a folder

HANG = 900  # seconds: more than a busy machine takes for anything, and than what tests wait for themselves
if not LONG:
    gc.set_threshold(20_000, 20, 50)  # rarely through all that has been imported
hypothesis.settings.register_profile("here", deadline=None, max_examples=100 if LONG else 40)
hypothesis.settings.load_profile("here")
DEVICES = Path(__file__).parent / "devices"
STDERR = pytest.StashKey[int]()
SECONDS = "pipecompile/seconds"  # of each file, in pytest's cache
TOOK: defaultdict[str, float] = defaultdict(float)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """Each file runs in one worker, the longest first, by what the last run here took: none is left over at the end.

    The files of ``distributed/`` run in the same one: their launcher is started once.
    """
    from xdist.scheduler import LoadFileScheduling

    cache = getattr(config, "cache", None)  # not there with -p no:cacheprovider

    class Scheduling(LoadFileScheduling):
        seconds: ClassVar[dict[str, float]] = cache.get(SECONDS, {}) if cache else {}

        def _split_scope(self, nodeid: str) -> str:
            return together(nodeid)

        def _assign_work_unit(self, node: object) -> None:
            longest = max(self.workqueue, key=lambda file: self.seconds.get(file, 0.0))
            self.workqueue.move_to_end(longest, last=False)
            super()._assign_work_unit(node)

    return Scheduling(config, log) if config.getvalue("dist") == "loadfile" else None


def together(nodeid: str) -> str:
    """What runs in one worker: the file of a test, or its folder."""
    file = nodeid.partition("::")[0]
    return "tests/distributed" if file.startswith("tests/distributed/") else file


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    TOOK[together(report.nodeid)] += report.duration


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Only the process that distributes tests keeps what they took."""
    config = session.config
    cache = getattr(config, "cache", None)
    if cache and config.getoption("dist", "no") == "loadfile" and not hasattr(config, "workerinput"):
        cache.set(SECONDS, {**cache.get(SECONDS, {}), **TOOK})


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """The virtual device stays in a process for good, so its tests run by themselves, or on real devices."""
    asked = any("devices" in Path(argument).parts for argument in config.args) or "cuda" in config.getoption("-m")
    return True if collection_path == DEVICES and not asked else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out cases of large families and what comes later, unless the run is long or names a test."""
    if LONG or any("::" in argument for argument in config.args) or config.getoption("keyword"):
        return
    seen: Counter[str] = Counter()
    kept, left_out = [], []
    for item in items:
        family = item.nodeid.partition("[")[0].removeprefix("tests/")
        seen[family] += 1
        runs = family not in LATER and (seen[family] - 1) % FAMILIES.get(family, 1) == 0
        (kept if runs else left_out).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=left_out)


def pytest_configure(config: pytest.Config) -> None:
    with config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        config.stash[STDERR] = os.dup(2)


def pytest_unconfigure(config: pytest.Config) -> None:
    os.close(config.stash[STDERR])


@pytest.fixture(autouse=True)
def _no_test_hangs(request: pytest.FixtureRequest) -> Iterator[None]:
    faulthandler.dump_traceback_later(HANG, exit=True, file=request.config.stash[STDERR])
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture(autouse=True)
def _one_thread_and_one_seed() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
