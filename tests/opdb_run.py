"""Trains small models around each of torch's operators split and unsplit, and prints what it finds.

    python tests/opdb_run.py                       all of them
    python tests/opdb_run.py --only 'linalg|cumsum'

Exits with 1 unless every sample is exact or ends in a refusal.
"""

from __future__ import annotations

import argparse
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

from opdb import OPERATORS, examine
from zoo.command import one_thread
from zoo.forked import Found, run_each

KINDS = ("exact", "refused", "wrong", "foreign", "hang", "died")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a pattern that names must contain")
    parser.add_argument("--jobs", type=int, default=1, help="operators at a time")
    parser.add_argument("--seconds", type=float, default=180.0, help="for each operator")
    given = parser.parse_args()
    names = [name for name in OPERATORS if re.search(given.only, name)]
    warnings.simplefilter("ignore")
    results = []
    for found in run_each(names, _work, given.jobs, given.seconds):
        results.append(found)
        for sample, said in found.facts.items():
            if said != "exact":
                print(f"{found.name} [{sample}]: {said}", flush=True)
        if found.ended:
            print(f"{found.name}: {found.ended}", flush=True)
    print(summary(results))
    return 0 if results and all(kind(said) in ("exact", "refused") for said in verdicts(results)) else 1


def verdicts(results: list[Found]) -> list[str]:
    """What was said of every sample; a process that died counts as one."""
    return [
        said
        for found in results
        for said in (*found.facts.values(), *(["died: " + found.ended] if found.ended.startswith("killed") else []))
    ]


def kind(said: str) -> str:
    """The first word of a verdict; an error outside of a sample is foreign."""
    first = said.partition(":")[0]
    return first if first in KINDS else "foreign"


def summary(results: list[Found]) -> str:
    """How many samples came to what, and what was refused, the most frequent first."""
    said = verdicts(results)
    counts = Counter(map(kind, said))
    reasons = Counter(reason(text) for text in said if kind(text) == "refused")
    tried = sum(bool(found.facts) for found in results)
    lines = [f"{tried} operators, {len(said)} runs: " + ", ".join(f"{counts[k]} {k}" for k in KINDS)]
    return "\n".join([*lines, *(f"{count:5} {text}" for text, count in reasons.most_common())])


def reason(text: str) -> str:
    """A refusal without its place and its numbers."""
    text = text.removeprefix("refused: ")
    text = re.sub(r"(module '[^']*'|the model itself)?,? ?[^ ]*\.py:\d+:? ?", "", text)
    return re.sub(r"\d+", "N", text)[:110]


def _work(name: str) -> Iterator[dict[str, Any]]:
    one_thread()
    yield from examine(name)


if __name__ == "__main__":
    sys.exit(main())
