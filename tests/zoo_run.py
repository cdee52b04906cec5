"""Trains every model of the zoo split and unsplit, and says for each whether it is exact.

    python tests/zoo_run.py --write             all of them; writes docs/models.md
    python tests/zoo_run.py --only 'llama|t5'   some, by a pattern of names or by a family
    python tests/zoo_run.py --quarter           every fourth

Exits with 1 unless every model is exact or ends in an error of pipecompile.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from zoo import QUARTER, ZOO
from zoo.check import STAGES, examine, missing
from zoo.command import chosen, one_thread, options, warm_up
from zoo.forked import run_each
from zoo.table import elsewhere, kind, page, summary, verdict

PAGE = Path("docs/models.md")


def main() -> int:
    parser = options(__doc__)
    parser.add_argument("--quarter", action="store_true", help="every fourth model")
    given = parser.parse_args()
    names = chosen(QUARTER if given.quarter else ZOO, given.only)
    absent = {name: missing(ZOO[name]) for name in names if missing(ZOO[name])}
    for name, module in absent.items():
        print(f"{name}: not run, its loss needs {module}")
    warm_up()
    results = []
    for found in run_each([name for name in names if name not in absent], _work, given.jobs, given.seconds):
        results.append(found)
        verdicts = [verdict(found, stages) for stages in STAGES]
        said = verdicts[0] if verdicts[0] == verdicts[1] else " / ".join(verdicts)
        print(f"{len(results):3}/{len(names) - len(absent)} {found.name}: {said}", flush=True)
    print("\n" + summary(ZOO, results))
    if given.write and not given.only and not given.quarter:
        found = page(ZOO, results, "make zoo")
        PAGE.write_text(found + elsewhere(PAGE.read_text()))
    fine = all(kind(found, stages) in ("exact", "ours") for found in results for stages in STAGES)
    return 0 if results and fine else 1


def _work(name: str) -> Iterator[dict[str, Any]]:
    one_thread()
    yield from examine(ZOO[name])


if __name__ == "__main__":
    sys.exit(main())
