"""Trains every model of the zoo split and unsplit, and writes what it finds to docs/models.md.

    python tests/zoo_run.py                     all of them; writes the page
    python tests/zoo_run.py --only 'llama|t5'   some, by a pattern of names or by a family
    python tests/zoo_run.py --quarter           every fourth, as the tests run it

Exits with 1 unless every model is exact or ends in an error of pipecompile.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from zoo import QUARTER, ZOO
from zoo.check import STAGES, capture_sample, examine, missing
from zoo.forked import run_each
from zoo.table import kind, page, summary, verdict

PAGE = Path("docs/models.md")


def main() -> int:
    options = _options()
    names = [name for name in (QUARTER if options.quarter else ZOO) if _wanted(name, options.only)]
    absent = {name: missing(ZOO[name]) for name in names if missing(ZOO[name])}
    for name, module in absent.items():
        print(f"{name}: not run, its loss needs {module}")
    _warm_up()
    results = []
    for found in run_each([name for name in names if name not in absent], _work, options.jobs, options.seconds):
        results.append(found)
        verdicts = [verdict(found, stages) for stages in STAGES]
        said = verdicts[0] if verdicts[0] == verdicts[1] else " / ".join(verdicts)
        print(f"{len(results):3}/{len(names) - len(absent)} {found.name}: {said}", flush=True)
    print("\n" + summary(ZOO, results))
    if not options.only and not options.quarter:
        PAGE.write_text(page(ZOO, results, "make zoo"))
    fine = all(kind(found, stages) in ("exact", "ours") for found in results for stages in STAGES)
    return 0 if results and fine else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a pattern that names must contain, or a family")
    parser.add_argument("--jobs", type=int, default=1, help="models at a time")
    parser.add_argument("--seconds", type=float, default=120.0, help="for each model")
    parser.add_argument("--quarter", action="store_true", help="every fourth model")
    return parser.parse_args()


def _wanted(name: str, pattern: str) -> bool:
    return not pattern or ZOO[name].family == pattern or re.search(pattern, name) is not None


def _work(name: str) -> Iterator[dict[str, Any]]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield from examine(ZOO[name])


def _warm_up() -> None:
    """Captures a model, so that the children share what that imports; runs none: threads do not survive a fork."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torchvision  # noqa: F401
    import transformers

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    start = time.perf_counter()
    capture_sample(ZOO["llama"], ZOO["llama"].build())
    print(f"warmed up in {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
