"""Hurts pipelines of several processes in random ways, and says of each whether all ranks end with one cause.

    python tests/distributed/faults_run.py --count 200 --seed 1

Good is: every rank that can speak raises the same ``RankError`` within the limit, it names the rank that was hurt, and
no process is left. Prints a table by kind: how many were good, and the seconds from the fault to the last rank's end.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
from dataclasses import dataclass
from statistics import median

from launcher import Ended, Hurt, Launcher
from rich.console import Console
from rich.table import Table

LIMIT = 60  # seconds of a run


@dataclass(frozen=True)
class Case:
    """One fault.

    Attributes:
        scene: of ``failing_scenes``.
        parts: of the batch, each with a pipeline of its own.
        ranks: of which one is to be blamed; parts run the same stages.
        silent: ranks that cannot raise the error of the others.
    """

    kind: str
    size: int
    parts: int
    ranks: tuple[int, ...]
    scene: str
    arguments: dict[str, object]
    hurt: Hurt | None = None
    silent: tuple[int, ...] = ()


SIGNALS = {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP, "interrupted": signal.SIGINT}
ENDS = {"exception between calls": "raise", "ends without closing": "return", "exits at once": "exit"}
ERRORS = {
    f"{e} in a {where}": (e, where) for e in ("ValueError", "OutOfMemoryError") for where in ("forward", "backward")
}


def drawn(draw: random.Random) -> Case:
    """A random fault of a random rank."""
    (size, parts), kind = draw.choice([(2, 1), (3, 1), (4, 1), (4, 2)]), draw.choice([*SIGNALS, *ENDS, *ERRORS])
    rank, after = draw.randrange(size), draw.randint(0, 12)
    mesh = {"parts": parts}
    if kind in SIGNALS:
        hurt = Hurt(rank, SIGNALS[kind], at="training")
        silent = () if kind == "stopped" else (rank,)
        return Case(kind, size, parts, (rank,), "trains_on", {"steps": after, **mesh}, hurt, silent)
    if kind in ENDS:
        arguments: dict[str, object] = {"rank": rank, "how": ENDS[kind], **mesh}
        return Case(kind, size, parts, (rank,), "ends_between", arguments, silent=(rank,))
    (error, where), stages = ERRORS[kind], size // parts
    stage = rank % stages
    arguments = {"rank": stage, "at": 1 + after, "backward": where == "backward", "error": error, **mesh}
    return Case(kind, size, parts, tuple(range(stage, size, stages)), "raises_in", arguments)


def fault(case: Case, ended: list[Ended]) -> str:
    """What is wrong with the end of a run; empty if nothing is."""
    speaking = [each for each in ended if each.rank not in case.silent]
    if late := [each.rank for each in ended if each.code is None]:
        return f"ranks {late} ran past the limit"
    if left := [each.pid for each in ended if _is_alive(each.pid)]:
        return f"processes {left} are left"
    if odd := [f"rank {each.rank}: {each.error} {each.text}" for each in speaking if each.error != "RankError"]:
        return "; ".join(odd)
    texts = {each.text for each in speaking}
    if len(texts) != 1:
        return f"{len(texts)} causes: {texts}"
    (text,) = texts
    return "" if any(f"rank {rank}" in text for rank in case.ranks) else f"blames another: {text}"


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    draw, launcher = random.Random(given.seed), Launcher()
    seconds: dict[str, list[float]] = {}
    bad: dict[str, int] = {}
    try:
        for number in range(given.count):
            case = drawn(draw)
            ended = launcher.run(
                f"failing_scenes:{case.scene}", case.size, hurt=case.hurt, limit=LIMIT, **case.arguments
            )
            wrong = fault(case, ended)
            seconds.setdefault(case.kind, []).append(max(each.seconds for each in ended))
            bad[case.kind] = bad.get(case.kind, 0) + bool(wrong)
            if wrong:
                print(f"{number}: {case}: {wrong}", flush=True)
    finally:
        launcher.close()
    table = Table("fault", "runs", "one cause", "seconds to the last end, median", "most")
    for kind, each in sorted(seconds.items()):
        good = len(each) - bad[kind]
        table.add_row(kind, str(len(each)), str(good), f"{median(each):.1f}", f"{max(each):.1f}")
    Console(width=110).print(table)
    return int(any(bad.values()))


if __name__ == "__main__":
    sys.exit(main())
