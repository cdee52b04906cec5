"""glibc keeps little of what is freed, unless the environment says how much."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest

from pipecompile.ops import freed_memory

SCRIPT = """
import ctypes, runpy, sys, threading
from pathlib import Path

libc, size = ctypes.CDLL(None), 16 << 20
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]


def resident():
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Rss:")) // 1024


def use():
    for _ in range(4):
        block = libc.malloc(size)
        libc.memset(block, 1, size)
        libc.free(block)
    used.wait()
    go_on.wait()


runpy.run_path(sys.argv[1])["keep_little"]()
used, go_on = threading.Barrier(3), threading.Barrier(3)
before = resident()
threads = [threading.Thread(target=use) for _ in range(2)]
for thread in threads:
    thread.start()
used.wait()
print(resident() - before)
go_on.wait()
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="needs glibc")
@pytest.mark.parametrize(("environment", "is_little"), [({}, True), ({"MALLOC_TRIM_THRESHOLD_": "67108864"}, False)])
def test_what_threads_free_goes_back_unless_the_environment_says_how_much(
    environment: dict[str, str], is_little: bool
) -> None:
    own = {name: value for name, value in os.environ.items() if "MALLOC" not in name and name != "GLIBC_TUNABLES"}
    more = {**environment, "MALLOC_MMAP_THRESHOLD_": "33554432"} if environment else {}
    run = [sys.executable, "-c", SCRIPT, freed_memory.__file__]
    found = subprocess.run(run, env={**own, **more}, capture_output=True, text=True, check=True)
    assert (int(found.stdout) < 12) == is_little, found.stdout  # MiB
