"""Trains models of other libraries split and unsplit, and writes what it finds to docs/models.md.

    python tests/wild_run.py                          all libraries; writes the section "Other libraries"
    python tests/wild_run.py --library timm,monai     some
    python tests/wild_run.py --only 'unet|conformer'  some, by a pattern of names
    python tests/wild_run.py --results out/wild.json  keeps what was found, and adds to what is there

Needs the environment that ``make wild`` makes. Exits with 1 unless every model is exact or ends in an error of
pipecompile that names a remedy, and 0.97 of them are exact.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from wild import NAMES, entries
from wild.check import examine
from wild.stubs import stub_packages
from wild.table import Result, fails, line, section, with_section
from zoo.command import one_thread
from zoo.entry import Entry
from zoo.forked import run_each

PAGE = Path("docs/models.md")


def main() -> int:
    given = _options().parse_args()
    _quiet()
    results = _known(given.results)
    for library in given.library.split(","):
        results |= {(r.library, r.name): r for r in _run(library, given)}
        _keep(given.results, results)
    found = list(results.values())
    print("\n" + section(found, every=False))
    if given.write:
        PAGE.write_text(with_section(PAGE.read_text(), section(found)))
    return 1 if fails(found) else 0


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", default=",".join(NAMES), help="one or several, by commas")
    parser.add_argument("--only", default="", help="a pattern that names must contain")
    parser.add_argument("--jobs", type=int, default=1, help="models at a time")
    parser.add_argument("--seconds", type=float, default=300.0, help="for each model")
    parser.add_argument("--results", type=Path, help="a JSON file of what has been found")
    parser.add_argument("--write", action="store_true", help="write the section of docs/models.md")
    return parser


def _run(library: str, given: Any) -> Iterator[Result]:
    start = time.perf_counter()
    table: dict[str, Entry] = {e.name: e for e in entries(library) if re.search(given.only, e.name)}
    print(f"{library}: {len(table)} models, ready in {time.perf_counter() - start:.0f} s", flush=True)

    def work(name: str) -> Iterator[dict[str, Any]]:
        one_thread()
        yield from examine(table[name])

    for found in run_each(list(table), work, given.jobs, given.seconds):
        result = Result.of(library, found)
        print(line(result), flush=True)
        yield result


def _quiet() -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    stub_packages()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)


def _known(path: Path | None) -> dict[tuple[str, str], Result]:
    if path is None or not path.exists():
        return {}
    rows = [Result(**row) for row in json.loads(path.read_text())]
    return {(row.library, row.name): row for row in rows}


def _keep(path: Path | None, results: dict[tuple[str, str], Result]) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps([vars(result) for result in results.values()], indent=1))


if __name__ == "__main__":
    sys.exit(main())
