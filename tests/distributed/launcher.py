"""Runs scenes: functions that each of several processes calls, as torchrun would start them.

    ended = launcher.run("control_scenes:all_wait", 3, hurt=Hurt(1, signal.SIGKILL, at="waiting"))

A scene is a function in a file of this folder, its arguments are JSON. Each run has fresh processes. They are forked
from one that has imported torch (``forks.py``), so they start at once.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from hosts import Hosts, hosts

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
POLL = 0.02  # seconds
LIMIT = 800  # seconds of a scene: less than ``conftest.HANG``; a busy machine takes minutes for what is done in seconds
START = 900.0  # seconds, at most, until the process that imports torch has forked, or says how a killed rank ended


@dataclass(frozen=True)
class Hurt:
    """A signal to a rank, when some rank announces a moment. A rank that was stopped goes on when the others ended."""

    rank: int
    signal: int
    at: str


@dataclass(frozen=True)
class Cut:
    """The host of a rank is cut off from the others, when some rank announces a moment (``hosts.py``)."""

    rank: int
    how: str
    at: str


@dataclass(frozen=True)
class Ended:
    """How a rank ended.

    Attributes:
        code: of its exit, negative for a signal; None if the launcher killed it at the limit.
        seconds: from the hurt, or else from the start, to its end.
        error: the type of its exception; None if the scene returned or the rank was killed.
        output: what it printed.
    """

    rank: int
    pid: int
    code: int | None
    seconds: float
    result: Any
    error: str | None
    text: str
    output: str


@dataclass
class _Run:
    """What is known of the ranks while they run."""

    pids: Sequence[int]
    hurt: Hurt | Cut | None
    hosts: Hosts | None
    began: float = field(default_factory=time.monotonic)
    was_hurt: bool = False
    ends: dict[int, tuple[int, float]] = field(default_factory=dict)
    killed: frozenset[int] = frozenset()

    @property
    def alive(self) -> list[int]:
        return [rank for rank in range(len(self.pids)) if rank not in self.ends]

    def end(self, rank: int, code: int) -> None:
        self.ends[rank] = (code, time.monotonic() - self.began)

    def strike(self) -> None:
        self.began, self.was_hurt = time.monotonic(), True
        if isinstance(self.hurt, Cut):
            self.hosts.cut(self.hurt.rank, self.hurt.how)
        else:
            self.kill(self.hurt.rank, self.hurt.signal)

    def kill(self, rank: int, number: int) -> None:
        if rank in self.alive:
            with suppress(ProcessLookupError):  # it has ended, and its end was not yet read
                os.kill(self.pids[rank], number)


class Launcher:
    """Starts ranks, hurts one of them, and waits for their ends. Use one for many scenes, one after another."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._read = b""

    def run(
        self,
        scene: str,
        size: int,
        *,
        hurt: Hurt | Cut | None = None,
        limit: int = LIMIT,
        agent: bool = True,
        hangs: int | None = None,
        **arguments: Any,
    ) -> list[Ended]:
        """Runs a scene on ``size`` ranks and returns how each ended.

        Args:
            hurt: what happens to one of them; if it is cut off, each is on a host of its own.
            scene: ``module:function``.
            limit: seconds after which ranks that run are killed, with their stacks in the output. Nothing but a hang
                may reach it.
            hangs: a rank that does; the limit begins when all others have ended, for which they have ``LIMIT``.
            agent: the launcher hosts the process group's store, as torchrun does; else rank 0 does.
        """
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        network = hosts(size) if isinstance(hurt, Cut) else nullcontext()
        with tempfile.TemporaryDirectory() as folder, network as apart:
            self._start()
            self._write(
                {
                    "function": scene,
                    "arguments": arguments,
                    "size": size,
                    "limit": limit,
                    "folder": folder,
                    "environment": _environment(store.port, agent) | (apart.environment if apart else {}),
                }
            )
            run = _Run(self._next(), hurt, apart)
            try:
                self._watch(run, store, limit, hangs)
            finally:
                run.killed = frozenset(run.alive)
                for rank in run.killed:
                    run.kill(rank, signal.SIGKILL)
                while run.alive:
                    run.end(*self._next())
            return [_ended(run, rank, Path(folder)) for rank in range(size)]

    def returned(self, scene: str, size: int, **options: Any) -> list[Any]:
        """What the ranks of a scene returned; fails with their output if not all did."""
        ended = self.run(scene, size, **options)
        assert all(each.code == 0 and each.error is None for each in ended), report(ended)
        return [each.result for each in ended]

    def close(self) -> None:
        """Ends the process that forks."""
        if self._process:
            self._process.stdin.close()
            self._process.stdout.close()
            self._process.wait(START)
            self._process = None

    def _watch(self, run: _Run, store: dist.Store, limit: int, hangs: int | None) -> None:
        start = time.monotonic()
        latest = start + LIMIT + limit  # or the others would have for ever
        while run.alive and time.monotonic() < min(start + limit, latest):
            if hangs is not None and run.alive != [hangs]:
                start = time.monotonic()
            if line := self._line(POLL):
                run.end(*line)
            if run.hurt and not run.was_hurt and store.check([run.hurt.at]):
                run.strike()
            if isinstance(run.hurt, Hurt) and run.alive == [run.hurt.rank]:
                run.kill(run.hurt.rank, signal.SIGCONT)  # how does one end that wakes up late?
        for rank in run.alive:
            run.kill(rank, signal.SIGCONT)
            run.kill(rank, signal.SIGUSR1)  # all stacks
        if run.alive:
            time.sleep(0.5)

    def _start(self) -> None:
        if self._process and self._process.poll() is None:
            return
        paths = [str(ROOT), str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        self._process = subprocess.Popen(
            [sys.executable, HERE / "forks.py"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )

    def _write(self, message: object) -> None:
        self._process.stdin.write(json.dumps(message).encode() + b"\n")
        self._process.stdin.flush()

    def _next(self) -> Any:
        """The next line."""
        line = self._line(START)
        if line is None:
            self._process.kill()  # what it would say later is not for the next scene
            self._process.wait()
            self._read = b""
            raise TimeoutError(f"the process that forks the ranks has said nothing for {START:g} s")
        return line

    def _line(self, seconds: float) -> Any:
        """The next line that comes in time, or None."""
        while b"\n" not in self._read:
            if not select.select([self._process.stdout], [], [], seconds)[0]:
                return None
            read = os.read(self._process.stdout.fileno(), 1 << 16)
            assert read, "the process that forks the ranks has ended"
            self._read += read
        line, _, self._read = self._read.partition(b"\n")
        return json.loads(line)


def report(ended: Sequence[Ended]) -> str:
    """All that is known, for the message of an assertion."""
    return "\n".join(f"--- rank {e.rank}: {e.code}, {e.seconds:.1f} s, {e.error}: {e.text}\n{e.output}" for e in ended)


def _environment(port: int, agent: bool) -> dict[str, str]:
    return {
        "SCENE_PORT": str(port),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port if agent else 0),
        "TORCHELASTIC_USE_AGENT_STORE": str(agent),
        "TORCHELASTIC_RUN_ID": "scene",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }


def _ended(run: _Run, rank: int, folder: Path) -> Ended:
    code, seconds = run.ends[rank]
    file = folder / f"{rank}.pt"
    result, error, text = torch.load(file, weights_only=False) if file.exists() else (None, None, "")
    output = folder / f"{rank}.txt"
    return Ended(
        rank=rank,
        pid=run.pids[rank],
        code=None if rank in run.killed else code,
        seconds=seconds,
        result=result,
        error=error,
        text=text,
        output=output.read_text(errors="replace") if output.exists() else "",
    )
