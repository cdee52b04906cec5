"""Injects faults by seed, each beside the eager twin, in processes that are watched: the table of ``make faults``.

    python tests/faults_run.py --count 1200 --jobs 2
    python tests/faults_run.py --kind forked --count 20
    python tests/faults_run.py --case 417            one fault, with what was seen

A process that says nothing for ``LIMIT`` seconds has hung: it is ended with all stacks printed, and another goes on.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import queue
import random
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("OMP_NUM_THREADS", "1")

LIMIT = 60  # seconds for one fault, its captures included
WORN = 12  # a pipeline suffers so many faults, then a new one does
VERDICTS = ("fine", "stale", "foreign", "state", "after", "hung", "died")


@dataclass(frozen=True)
class Case:
    """One fault; everything follows from its number."""

    number: int
    kind: str
    model: str
    schedule: str
    stages: int
    microbatches: int
    warm: bool  # whether a step comes before the fault, or the fault hits the first call


def cases(count: int, kinds: list[str], start: int = 0) -> list[Case]:
    """Kinds in turn, everything else by seed."""
    from fault_scene import MODELS

    made = []
    for number in range(start, start + count):
        rng = random.Random(number)
        made.append(
            Case(
                number,
                kinds[number % len(kinds)],
                rng.choice(list(MODELS)),
                rng.choice(["1f1b", "gpipe", "sequential"]),
                rng.choice([1, 2, 3]),
                rng.choice([1, 2, 2]),
                rng.random() < 0.7,
            )
        )
    return made


def suffer(case: Case, scenes: dict[tuple[object, ...], object] | None = None) -> tuple[str, str]:
    """The verdict on one fault; a pipeline that has come through some is used again."""
    from fault_kinds import KINDS
    from fault_scene import Scene

    scenes = {} if scenes is None else scenes
    key = (case.model, case.schedule, case.stages, case.microbatches)
    scene = scenes.pop(key, None) if case.warm else None
    if not isinstance(scene, Scene) or scene.worn >= WORN:
        scene = Scene(*key)
    scene.worn += 1
    verdict = scene.suffer(KINDS[case.kind], case.number, case.warm)
    if verdict[0] == "fine":
        scenes[key] = scene
    return verdict


def all_kinds() -> list[str]:
    import fault_between  # noqa: F401  # adds its kinds
    from fault_kinds import KINDS

    return sorted(KINDS)


def work(numbers: list[int], kinds: list[str], count: int) -> None:
    """What a watched process does: a line when a fault begins, a line with its verdict."""
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    known = {case.number: case for case in cases(count, kinds)}
    scenes: dict[tuple[object, ...], object] = {}
    for number in numbers:
        print(json.dumps({"begins": number}), flush=True)
        faulthandler.dump_traceback_later(LIMIT, exit=True)
        verdict, seen = suffer(known[number], scenes)
        faulthandler.cancel_dump_traceback_later()
        print(json.dumps({"number": number, "verdict": verdict, "seen": seen}), flush=True)


class Watched:
    """One process at a time, until all faults of its share have a verdict."""

    def __init__(self, share: list[int], kinds: list[str], count: int) -> None:
        self.left = list(share)
        self.arguments = ["--kinds", ",".join(kinds), "--count", str(count)]
        self.found: dict[int, tuple[str, str]] = {}

    def run(self) -> None:
        while self.left:
            command = [sys.executable, __file__, "--work", ",".join(map(str, self.left)), *self.arguments]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            errors: list[str | None] = []
            lines: queue.Queue[str | None] = queue.Queue()
            assert process.stdout is not None
            assert process.stderr is not None
            readers = [
                threading.Thread(target=_forward, args=(process.stdout, lines.put)),
                threading.Thread(target=_forward, args=(process.stderr, errors.append)),
            ]
            for reader in readers:
                reader.start()
            began, verdict = self._follow(lines)
            process.kill()
            process.wait()
            for reader in readers:
                reader.join()
            if began is not None and began in self.left:
                told = "".join(filter(None, errors[-60:]))
                hung = verdict == "hung" or "Timeout (" in told
                self._settle(began, "hung" if hung else "died", told)
            elif verdict == "hung" or (self.left and began is None):
                raise RuntimeError("a process of the sweep did not begin: " + "".join(filter(None, errors[-20:])))

    def _follow(self, lines: queue.Queue[str | None]) -> tuple[int | None, str]:
        began: int | None = None
        while True:
            try:
                line = lines.get(timeout=(2 if began is not None else 10) * LIMIT)  # imports may take long
            except queue.Empty:
                return began, "hung"
            if line is None:
                return began, "ended"
            try:
                told = json.loads(line)
            except ValueError:  # something that a fault has printed
                continue
            if "begins" in told:
                began = told["begins"]
            else:
                self._settle(told["number"], told["verdict"], told["seen"])

    def _settle(self, number: int, verdict: str, seen: str) -> None:
        self.left.remove(number)
        self.found[number] = (verdict, seen)


def _forward(stream: object, put: object) -> None:
    for line in stream:  # type: ignore[attr-defined]
        put(line)  # type: ignore[operator]
    put(None)  # type: ignore[operator]


def table(known: list[Case], found: dict[int, tuple[str, str]]) -> str:
    """Verdicts by kind, and each that is not fine."""
    by_kind: dict[str, Counter[str]] = defaultdict(Counter)
    for case in known:
        by_kind[case.kind][found[case.number][0]] += 1
    total = Counter(verdict for verdict, _ in found.values())
    lines = [f"{'kind':36}" + "".join(f"{verdict:>9}" for verdict in VERDICTS)]
    lines += [f"{k:36}" + "".join(f"{c[v] or '.':>9}" for v in VERDICTS) for k, c in sorted(by_kind.items())]
    lines.append(f"{f'{len(by_kind)} kinds':36}" + "".join(f"{total[verdict]:>9}" for verdict in VERDICTS))
    for case in known:
        verdict, seen = found[case.number]
        if verdict != "fine":
            lines.append(f"{verdict}: {case}\n    {seen}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1200)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--kind", help="part of the names of the kinds to inject")
    parser.add_argument("--kinds", help=argparse.SUPPRESS)
    parser.add_argument("--case", type=int, help="one fault alone")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    given = parser.parse_args()
    kinds = given.kinds.split(",") if given.kinds else [k for k in all_kinds() if (given.kind or "") in k]
    all_kinds()
    if given.work:
        work([int(number) for number in given.work.split(",")], kinds, given.count)
        return 0
    known = cases(max(given.count, (given.case or 0) + 1), kinds)
    if given.case is not None:
        known = [known[given.case]]
    begun = time.monotonic()
    order = sorted(known, key=lambda case: (case.model, case.schedule, case.stages, case.microbatches))
    share = -(-len(order) // given.jobs)
    watched = [
        Watched([case.number for case in order[i : i + share]], kinds, max(given.count, (given.case or 0) + 1))
        for i in range(0, len(order), share)
    ]
    threads = [threading.Thread(target=each.run) for each in watched]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = {number: verdict for each in watched for number, verdict in each.found.items()}
    print(table(known, found))
    if given.case is not None:
        print(found[given.case][1])
    print(f"{len(found)} faults in {time.monotonic() - begun:.0f} s")
    return 0 if all(verdict == "fine" for verdict, _ in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
