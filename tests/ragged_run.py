"""Trains the models of the zoo on padded, ragged batches, split and unsplit.

    python tests/ragged_run.py --write             all that take labels for tokens; writes docs/ragged.md
    python tests/ragged_run.py --only 'llama|t5'   some, by a pattern of names or by a family

Exits with 1 unless every step is exact or refused in words of pipecompile.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from zoo import ZOO
from zoo.check import missing
from zoo.command import chosen, one_thread, options, warm_up
from zoo.forked import run_each
from zoo.ragged import examine_ragged, takes_ragged
from zoo.ragged_table import line, page, summary, troubles

PAGE = Path("docs/ragged.md")


def main() -> int:
    given = options(__doc__).parse_args()
    names = [n for n in chosen(ZOO, given.only) if not missing(ZOO[n]) and takes_ragged(ZOO[n])]
    warm_up()
    start, results = time.perf_counter(), []
    for found in run_each(names, _work, given.jobs, given.seconds):
        results.append(found)
        print(f"{len(results):3}/{len(names)} {line(found)}", flush=True)
    print(f"\n{summary(results)}\n{time.perf_counter() - start:.0f} s")
    if given.write and not given.only:
        PAGE.write_text(page(ZOO, results, "make ragged"))
    return 0 if results and not any(map(troubles, results)) else 1


def _work(name: str) -> Iterator[dict[str, Any]]:
    one_thread()
    yield from examine_ragged(ZOO[name])


if __name__ == "__main__":
    sys.exit(main())
