"""Hurts pipelines of several processes in random ways, and says of each whether all ranks end with one cause.

    python tests/distributed/faults_run.py --count 200 --seed 1

Good is: every rank that can speak raises the same ``RankError`` within the limit, it names the rank that was hurt, and
no process is left. A host that is cut off cannot learn what the others say; it must end as they do, with a
``RankError`` about the connection. ``--only`` draws some kinds alone; unreachable hosts need root (``hosts.py``).
Prints a table by kind: how many were good, and the seconds from the fault to the last rank's end.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from hosts import lack
from launcher import Cut, Ended, Hurt, Launcher
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
    hurt: Hurt | Cut | None = None
    silent: tuple[int, ...] = ()
    says: str = ""  # part of the cause


SIGNALS = {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP, "interrupted": signal.SIGINT}
ENDS = {"exception between calls": "raise", "ends without closing": "return", "exits at once": "exit"}
CUTS = {"link taken down": "down", "packets dropped": "drop"}
NANS = {"NaN in a forward": False, "NaN in a backward": True}
ERRORS = {
    f"{e} in a {where}": (e, where) for e in ("ValueError", "OutOfMemoryError") for where in ("forward", "backward")
}
KINDS = (*SIGNALS, *ENDS, *ERRORS, *CUTS, *NANS)


def drawn(draw: random.Random, kinds: Sequence[str]) -> Case:
    """A random fault of a random rank."""
    (size, parts), kind = draw.choice([(2, 1), (3, 1), (4, 1), (4, 2)]), draw.choice(kinds)
    rank, after = draw.randrange(size), draw.randint(0, 12)
    mesh = {"parts": parts}
    if kind in SIGNALS:
        hurt = Hurt(rank, SIGNALS[kind], at="training")
        silent = () if kind == "stopped" else (rank,)
        return Case(kind, size, parts, (rank,), "trains_on", {"steps": after, **mesh}, hurt, silent)
    if kind in ENDS:
        arguments: dict[str, object] = {"rank": rank, "how": ENDS[kind], **mesh}
        return Case(kind, size, parts, (rank,), "ends_between", arguments, silent=(rank,))
    if kind in CUTS:
        cut = Cut(rank, CUTS[kind], at="training")
        return Case(kind, size, parts, (rank,), "trains_on", {"steps": after, **mesh}, cut)
    stages = size // parts
    stage = rank % stages
    if kind in NANS:
        arguments = {"rank": stage, "backward": NANS[kind], "steps": 1 + after, **mesh}
        reached = (stage,) if NANS[kind] else range(stage, stages)  # the stages whose backward it may reach
        ranks = tuple(r for r in range(size) if r % stages in reached)
        return Case(kind, size, parts, ranks, "makes_nan", arguments, says="returned nan values")
    error, where = ERRORS[kind]
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
    if isinstance(case.hurt, Cut):
        (cut,) = (each for each in speaking if each.rank == case.hurt.rank)
        if "unreachable" not in cut.text:
            return f"the one that was cut off says: {cut.text}"
        speaking.remove(cut)
    texts = {each.text for each in speaking}
    if len(texts) != 1:
        return f"{len(texts)} causes: {texts}"
    (text,) = texts
    if case.says not in text:
        return f"does not say {case.says!r}: {text}"
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
    parser.add_argument("--only", nargs="+", choices=KINDS, default=KINDS, metavar="KIND", help=", ".join(KINDS))
    given = parser.parse_args()
    if lacking := lack():
        print(f"no unreachable hosts: {lacking}")
        given.only = [kind for kind in given.only if kind not in CUTS]
    draw, launcher = random.Random(given.seed), Launcher()
    seconds: dict[str, list[float]] = {}
    bad: dict[str, int] = {}
    try:
        for number in range(given.count):
            case = drawn(draw, given.only)
            ended = launcher.run(
                f"failing_scenes:{case.scene}", case.size, hurt=case.hurt, limit=LIMIT, **case.arguments
            )
            wrong = fault(case, ended)
            seconds.setdefault(case.kind, []).append(max(each.seconds for each in ended))
            bad[case.kind] = bad.get(case.kind, 0) + bool(wrong)
            if wrong:
                print(f"{number}: {case}: {wrong}", flush=True)
                print("\n".join(each.output for each in ended if each.code is None), flush=True)  # their stacks
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
