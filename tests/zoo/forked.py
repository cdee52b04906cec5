"""Runs a function for each model in a process of its own, with limits on time and memory.

The processes are forks, so that what the parent has imported is there at once. A child sends facts as lines of JSON
while it finds them; what it had found before it hung or died is kept.
"""

from __future__ import annotations

import faulthandler
import json
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from selectors import EVENT_READ, DefaultSelector
from typing import Any

LOGS = Path("out/zoo").absolute()
GRACE = 5.0  # seconds between a child's own alarm, which prints its stacks, and the end


@dataclass
class Found:
    """What is known about a model; ``ended`` is empty as long as its process runs well."""

    name: str
    facts: dict[str, Any] = field(default_factory=dict)
    ended: str = ""


@dataclass
class _Child:
    found: Found
    pid: int
    deadline: float
    pending: bytes = b""


def run_each(
    names: Sequence[str],
    work: Callable[[str], Iterable[dict[str, Any]]],
    jobs: int = 1,
    seconds: float = 120.0,
    memory_bytes: int = 12 * 2**30,
) -> Iterator[Found]:
    """What ``work(name)`` yields for each name, gathered, in the order in which they end."""
    waiting, running = list(reversed(names)), DefaultSelector()
    LOGS.mkdir(parents=True, exist_ok=True)
    while waiting or running.get_map():
        while waiting and len(running.get_map()) < jobs:
            _start(waiting.pop(), work, running, seconds, memory_bytes)
        for key, _ in running.select(timeout=1.0):
            if not _read(key.fd, key.data):
                yield _end(key, running)
        for key in [key for key in running.get_map().values() if time.monotonic() > key.data.deadline]:
            os.kill(key.data.pid, signal.SIGKILL)
            yield _end(key, running)


def _start(
    name: str, work: Callable[[str], Iterable[dict[str, Any]]], running: DefaultSelector, seconds: float, memory: int
) -> None:
    sys.stdout.flush()
    receive, send = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(receive)
        _child(name, work, send, seconds, memory)
    os.close(send)
    running.register(receive, EVENT_READ, _Child(Found(name), pid, time.monotonic() + seconds + GRACE))


def _child(name: str, work: Callable[[str], Iterable[dict[str, Any]]], send: int, seconds: float, memory: int) -> None:
    """The life of a child; whatever happens in it, it never returns into the parent's code."""
    try:
        log = os.open(LOGS / f"{name}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        faulthandler.dump_traceback_later(seconds, exit=True, file=2)
        for facts in work(name):
            os.write(send, json.dumps(facts).encode() + b"\n")
    except BaseException as error:
        traceback.print_exc()
        line = next(iter(str(error).splitlines()), "")
        os.write(send, json.dumps({"raised": f"{type(error).__name__}: {line}"}).encode() + b"\n")
    finally:
        sys.stderr.flush()
        os._exit(0)


def _read(descriptor: int, child: _Child) -> bool:
    """Takes what a child has sent; False at its end."""
    data = os.read(descriptor, 65536)
    *lines, child.pending = (child.pending + data).split(b"\n")
    for line in lines:
        child.found.facts.update(json.loads(line))
    return bool(data)


def _end(key: Any, running: DefaultSelector) -> Found:
    child: _Child = key.data
    running.unregister(key.fd)
    os.close(key.fd)
    _, status = os.waitpid(child.pid, 0)
    if os.WIFSIGNALED(status):
        child.found.ended = "killed by signal " + str(os.WTERMSIG(status))
    elif os.WEXITSTATUS(status):
        child.found.ended = "hang"
    return child.found
