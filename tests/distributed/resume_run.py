"""Kills trainings over several processes at random moments, starts them again, and compares the whole loss curves.

    python tests/distributed/resume_run.py --count 20 --seed 1
    python tests/distributed/resume_run.py --count 3 --torchrun      # its --max-restarts starts them again

Good is: every loss that any attempt computed is, bit for bit, that of a training that was not killed, also for the
steps that were repeated; the ranks that were not killed end with a ``RankError``; and what a kill loses is at most the
interval since the last checkpoint, or two if it was being written in the background.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from launcher import HERE, ROOT, Ended, Launcher, report

LIMIT = 120  # seconds of an attempt
STEPS, EVERY = 60, 4
NEW_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # or processes that start again find the dead ones' addresses
Curve = dict[int, str]


@dataclass(frozen=True)
class Case:
    """A training that is killed once or twice.

    Attributes:
        kills: of each attempt: how many of its steps, with a part of one, come before, and the ranks.
    """

    size: int
    asynchronous: bool
    kills: tuple[tuple[float, tuple[int, ...]], ...]


@dataclass(frozen=True)
class Found:
    """What came of it.

    Attributes:
        wrong: empty if it is good.
        resumed_at: the first step of each attempt after the first.
        repeated: the number of steps that each of these computed again.
        kills: the number of ranks that were killed in each attempt; a kill may come after the last step.
    """

    wrong: str
    resumed_at: tuple[int, ...] = ()
    repeated: tuple[int, ...] = ()
    kills: tuple[int, ...] = ()


def drawn(draw: random.Random) -> Case:
    size = draw.randint(2, 4)
    kills = []
    for _ in range(draw.choice([1, 1, 2])):
        ranks = range(size) if draw.random() < 0.25 else [draw.randrange(size)]
        kills.append((draw.uniform(0, STEPS), tuple(ranks)))
    return Case(size, draw.random() < 0.7, tuple(kills))


def arguments(folder: str, asynchronous: bool, after: float = 0.0, victims: tuple[int, ...] = ()) -> dict[str, Any]:
    given = {"folder": folder, "after": after, "victims": list(victims), "asynchronous": asynchronous}
    return {"steps": STEPS, "every": EVERY, **given}


def straight(launcher: Launcher, size: int) -> Curve:
    """The losses of a training that is not killed."""
    with tempfile.TemporaryDirectory() as folder:
        launcher.returned("checkpoint_scenes:trains", size, limit=LIMIT, **arguments(folder, True))
        (curve,) = attempts(folder)
    assert len(curve) == STEPS
    return curve


def attempts(folder: str) -> list[Curve]:
    """The losses that each attempt noted; one that was killed may have noted none."""
    found: list[Curve] = []
    notes = Path(folder, "losses.jsonl")
    for line in notes.read_text().splitlines() if notes.exists() else ():
        step, loss = json.loads(line)
        if not found or step != max(found[-1]) + 1:
            found.append({})
        found[-1][step] = loss
    return found


def killed(launcher: Launcher, case: Case, expected: Curve) -> Found:
    kills = []
    with tempfile.TemporaryDirectory() as folder:
        for after, ranks in (*case.kills, (0.0, ())):
            given = arguments(folder, case.asynchronous, after, ranks)
            ended = launcher.run("checkpoint_scenes:trains", case.size, limit=LIMIT, **given)
            if wrong := _ended_otherwise(ended, ranks):
                return Found(f"{wrong}\n{report(ended)}")
            kills.append(sum(each.code == -signal.SIGKILL for each in ended))
        return replace(judged(folder, case.asynchronous, expected), kills=tuple(kills))


def restarted(case: Case, expected: Curve) -> Found:
    """As ``killed``, with one kill, by a torchrun that starts the processes again."""
    paths = os.pathsep.join(map(str, (ROOT, HERE, HERE.parent)))
    with tempfile.TemporaryDirectory() as folder:
        given = json.dumps(arguments(folder, case.asynchronous, *case.kills[0]))
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts", "2"]
        done = subprocess.run(
            [*torchrun, "--nproc-per-node", str(case.size), HERE / "checkpoint_scenes.py", given],
            env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **NEW_STORE},
            capture_output=True,
            text=True,
            timeout=3 * LIMIT,
            check=False,
        )
        if done.returncode:
            return Found(f"torchrun ended with {done.returncode}\n{done.stderr[-3000:]}")
        hit = len(case.kills[0][1]) if "exitcode: -9" in done.stderr else 0
        return replace(judged(folder, case.asynchronous, expected), kills=(hit,))


def judged(folder: str, asynchronous: bool, expected: Curve) -> Found:
    found = attempts(folder)
    odd = [step for curve in found for step, loss in curve.items() if loss != expected[step]]
    missing = sorted(expected.keys() - {step for curve in found for step in curve})
    repeated = tuple(max(one) + 1 - min(next_one) for one, next_one in pairwise(found))
    wrong = f"losses of steps {odd} differ" if odd else f"steps {missing} are missing" if missing else ""
    if max(repeated, default=0) > (2 * EVERY if asynchronous else EVERY):
        wrong = wrong or "more steps are repeated than an interval has"
    return Found(wrong, tuple(min(curve) for curve in found[1:]), repeated)


def _ended_otherwise(ended: list[Ended], victims: tuple[int, ...]) -> str:
    """Which rank ended in another way than by its kill or by the error of the killed one; a kill may be too late."""
    if all(each.code == 0 for each in ended):
        return ""
    for each in ended:
        was_killed = each.rank in victims and each.code == -signal.SIGKILL
        if not victims or not (was_killed or each.error == "RankError" or each.code == 0):
            return f"rank {each.rank} ended otherwise"
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--torchrun", action="store_true", help="let torchrun start the processes again")
    given = parser.parse_args()
    draw, launcher, bad = random.Random(given.seed), Launcher(), 0
    repeated: dict[bool, list[int]] = {False: [], True: []}
    kills = whole = 0
    try:
        expected = {size: straight(launcher, size) for size in (2, 3, 4)}
        for number in range(given.count):
            case = drawn(draw)
            start, curve = time.monotonic(), expected[case.size]
            found = restarted(case, curve) if given.torchrun else killed(launcher, case, curve)
            bad += bool(found.wrong)
            repeated[case.asynchronous] += found.repeated
            kills, whole = kills + sum(map(bool, found.kills)), whole + found.kills.count(case.size)
            print(
                f"{number}: {case}: {found.wrong or 'the same curve'}, killed {found.kills}, resumed at "
                f"{found.resumed_at}, repeated {found.repeated} steps, {time.monotonic() - start:.1f} s",
                flush=True,
            )
    finally:
        launcher.close()
    print(f"{given.count - bad} of {given.count} trainings have the same curve; {kills} kills, {whole} of all ranks")
    for kind, each in repeated.items():
        if each:
            said = f"written {'in the background' if kind else 'at once'} every {EVERY} steps"
            print(f"{said}: repeated {median(each):g} steps in the median, {max(each)} at most")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
