"""Builds the virtual device with g++ against the headers in torch's wheel, and caches the result.

    python tests/virtual_device/build.py

Takes half a minute on two cores. The file is named after the sources, torch's version and the flags, so that a changed
source is compiled again. ``VIRTUAL_DEVICE_BUILD`` names another folder than ``virtual_device`` in the environment.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch.utils import cpp_extension

SOURCES = Path(__file__).parent / "csrc"
FLAGS = ("-std=c++20", "-O1", "-fPIC", "-w", f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}")


def built() -> Path:
    """The compiled library.

    Raises:
        RuntimeError: There is no g++, or it fails.
    """
    library = _folder() / f"virt_{_digest()}.so"
    if not library.exists():
        _folder().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=_folder()) as scratch:
            os.replace(_compile(Path(scratch)), library)  # processes that build at the same time do not meet
    return library


def _folder() -> Path:
    return Path(os.environ.get("VIRTUAL_DEVICE_BUILD", Path(sys.prefix) / "virtual_device"))


def _digest() -> str:
    texts = [path.read_text() for path in sorted(SOURCES.iterdir())]
    return hashlib.sha256("".join([*texts, torch.__version__, *FLAGS]).encode()).hexdigest()[:16]


def _compile(scratch: Path) -> Path:
    compiler = shutil.which("g++")
    if compiler is None:
        raise RuntimeError(
            "the tests of tests/devices run on a virtual accelerator in C++, but there is no g++; install one "
            "(Debian, Ubuntu: apt install g++), or run the other tests: python -m pytest"
        )
    print("compiling the virtual device ...", file=sys.stderr, flush=True)
    include = [f"-I{path}" for path in cpp_extension.include_paths()]
    objects, waiting = [], sorted(SOURCES.glob("*.cpp"), key=lambda path: -path.stat().st_size)
    running: list[subprocess.Popen[bytes]] = []
    while waiting or running:
        while waiting and len(running) < 2:
            source = waiting.pop(0)
            objects.append(str(scratch / f"{source.stem}.o"))
            running.append(subprocess.Popen([compiler, *FLAGS, *include, "-c", str(source), "-o", objects[-1]]))
        if running.pop(0).wait():
            raise RuntimeError(f"the virtual device in {SOURCES} does not compile with torch {torch.__version__}")
    folders = [f"-L{path}" for path in cpp_extension.library_paths()]
    library = scratch / "library.so"
    subprocess.run([compiler, "-shared", *objects, "-o", str(library), *folders, "-ltorch_cpu", "-lc10"], check=True)
    return library


if __name__ == "__main__":
    try:
        print(built())
    except RuntimeError as error:
        sys.exit(str(error))
