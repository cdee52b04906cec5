"""What a rank knows about the others: who failed first, who is silent, who has ended.

One daemon thread, and nothing else, uses the store, because a store whose host hangs blocks its callers for good. The
keys, under a prefix of the run and the pipeline:

    failure    the first cause: compare_set lets only the first in
    sign/2     how often rank 2 has looked around, and its host
    inside/2   the other pipeline, or the collective, in which rank 2 waits, if it does for long (``crossing.py``)
    waiting    how many ranks wait for all others for long
    end/2      the last word of rank 2
    ends       how many ranks have said their last word

Each rank watches the sign of the next rank that has begun and not ended, around the ring. So a beat costs each rank
the same few requests whatever the number of ranks, and of the ranks that are silent, one has a watcher.
"""

from __future__ import annotations

import json
import math
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from threading import Condition, Event
from typing import Protocol

import torch.distributed as dist

from pipecompile.distributed.crossing import crossed, stay_elsewhere, stay_in, stay_in_a_collective
from pipecompile.distributed.leaving import abroad

FAILED = "raised the error of the first rank that failed"
SUSPECTS = 64  # ranks of which one that finds another silent asks whether they are silent too
HASTE = 4  # part of the seconds of silence that are waited for once a connection is lost
STORE = (
    "the store of the process group does not answer: the process that hosts it (rank 0, or the launcher) has ended, "
    "hangs or is unreachable, or this host is cut off"
)


class Store(Protocol):
    """What is used of torch.distributed's stores."""

    def set(self, key: str, value: str) -> None: ...

    def get(self, key: str) -> bytes: ...

    def check(self, keys: list[str]) -> bool: ...

    def add(self, key: str, amount: int) -> int: ...

    def compare_set(self, key: str, expected: str, desired: str) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Pace:
    """How soon a failure is noticed.

    Args:
        beat: seconds between two signs of a rank, and between two looks at the others.
        silent: seconds without a sign after which a rank is taken for stopped. A rank gives none while one call holds
            Python's lock. One that is killed is found sooner, by its lost connections. A collective does not say whose
            it lost: a process of the same host may know, and else it is a quarter of these seconds.
        grace: seconds to wait for a better cause, when a connection was lost or a rank that is waited for has ended.
        absent: seconds to wait for the first sign of a rank.
        crossed: seconds after which two ranks that wait in different pipelines are told.
    """

    beat: float = 0.25
    silent: float = 15.0
    grace: float = 1.0
    absent: float = 1800.0
    crossed: float = 10.0


@dataclass(frozen=True, slots=True)
class Cause:
    """Why a run ends; every rank raises the same text.

    Args:
        rank: whose failure it is; None for the store.
        host: of that rank; empty if it is not known.
        where: stage and instruction; empty outside of programs.
        what: the error.
    """

    rank: int | None
    host: str
    where: str
    what: str

    def __str__(self) -> str:
        who = "" if self.rank is None else f"rank {self.rank}" + (f" (host {self.host})" if self.host else "")
        return ": ".join(filter(None, (who, self.where, self.what)))

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Cause:
        return cls(**json.loads(text))


class Stillness:
    """For how long a value has been the same, in seconds during which this process was awake.

    A look counts for at most ``step`` seconds. So a process that was stopped for a minute does not, when it wakes, find
    that the others have said nothing for a minute.
    """

    def __init__(self, step: float) -> None:
        self.step = step
        self.value: object = None
        self.seconds = 0.0
        self.looked = time.monotonic()

    def __call__(self, value: object) -> float:
        now = time.monotonic()
        self.seconds = self.seconds + min(now - self.looked, self.step) if value == self.value else 0.0
        self.value, self.looked = value, now
        return self.seconds


class Watch:
    """The state that a rank's threads share with the one that watches, whose work is ``run``.

    Attributes:
        changed: notified whenever something changes that may be waited for.
        cause: the first failure of any rank, once it is known here.
        ended: the last words of the ranks that have ended.
        closed: this rank has said its last word.
        rounds: how often this rank has looked around.
        gone: find ranks that have ended, as far as this process can see.
    """

    def __init__(self, rank: int, size: int, store: Callable[[], Store], pace: Pace) -> None:
        self.rank = rank
        self.size = size
        self.store = store
        self.pace = pace
        self.host = socket.gethostname()
        self.process = os.getpid()
        self.changed = Condition()
        self.cause: Cause | None = None
        self.ended: dict[int, str] = {}
        self.closed = False
        self.rounds = 0
        self.gone: list[Callable[[], Sequence[int]]] = []
        self._proposal: Callable[[Store], Cause] | None = None
        self._last_word = FAILED
        self._ends = 0
        self._wake = Event()
        self._has_lost = False  # the connection to some rank
        self._suspects: dict[int, str | None] = {}
        self._sign, self._absent, self._crossing = self.stillness(), self.stillness(), self.stillness()
        self._inside = ""  # what this rank has said
        self._waits = False  # for long, as it has said

    def stillness(self) -> Stillness:
        return Stillness(2 * self.pace.beat)

    # What other threads call

    def until(
        self, done: Callable[[], bool], seconds: float = math.inf, pause: Callable[[float], None] | None = None
    ) -> bool:
        """Waits until ``done()``, a cause or the end of this rank; returns False if the time was up before.

        Args:
            pause: waits for what makes it done, at most for some seconds; by default, for ``changed``.
        """
        still, end = self.stillness(), time.monotonic() + seconds
        while True:
            with self.changed:
                if self.cause or self.closed or done():
                    return True
                if (left := end - time.monotonic()) <= 0:
                    return False
                if pause is None:
                    self.changed.wait(min(left, self.pace.beat))
            if pause is not None:
                pause(min(left, self.pace.beat))
            if still(self.rounds) > self.pace.silent:
                self.fail(Cause(None, "", "", STORE))

    def propose(self, cause: Callable[[Store], Cause]) -> None:
        """Reports what ``cause`` returns in the watching thread, and waits until some cause is known."""
        with self.changed:
            self._proposal = self._proposal or cause
        self._wake.set()
        self.until(lambda: False)

    def report(self, cause: Cause) -> None:
        """Proposes a cause, and waits until one is known."""
        self.propose(lambda _: cause)

    def lost(self, peer: int | None, error: Exception) -> None:
        """Blames the peer of a lost connection, if there is no better cause in time.

        Args:
            peer: None if it is not known, as in a collective; then one that has ended, or else one that is silent.
        """
        self._has_lost = self._has_lost or peer is None
        known = self.until(lambda: False, self.pace.grace)
        if not known and peer is None:
            peer = next((rank for find in self.gone for rank in find()), None)
            known = peer is None and self.until(lambda: False, self.pace.silent)
        if not known:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            if peer is None:
                self.report(Cause(self.rank, self.host, "", f"lost the connection to another rank: {reason}"))
            else:
                what = f"its connection to rank {self.rank} was lost and it reported nothing (killed?): {reason}"
                self.propose(lambda store: self.about(peer, what, store))

    def about(self, peer: int, what: str, store: Store) -> Cause:
        """The failure of another rank; if that has ended, its last word says more."""
        if peer in self.ended:
            what = f"{self.ended[peer]} while rank {self.rank} waited for it; all ranks must make the same calls"
        sign = self._sign_of(peer, store)
        return Cause(peer, sign.partition(" ")[2] if sign else "", "", what)

    def fail(self, cause: Cause) -> None:
        """Makes a cause known to all threads of this rank. The first one stays."""
        with self.changed:
            self.cause = self.cause or cause
            self.changed.notify_all()

    def end(self, last_word: str) -> None:
        """Lets the watching thread say the last word of this rank and end. Nothing waits after that."""
        with self.changed:
            if not self.closed:
                self.closed, self._last_word = True, last_word
            self.changed.notify_all()
        self._wake.set()

    # What the watching thread does

    def run(self) -> None:
        """Watches until there is a cause or this rank ends."""
        with abroad():
            self._run()

    def _run(self) -> None:
        try:
            store = self.store()
            while not (self.cause or self.closed):
                self._look(store)
                self._wake.wait(self.pace.beat)
                self._wake.clear()
            self._say_last_word(store)
        except RuntimeError:  # the store's host is gone
            if not self.closed:
                self.fail(Cause(None, "", "", STORE))

    def _look(self, store: Store) -> None:
        store.set(f"sign/{self.rank}", f"{self.rounds} {self.host}")
        if store.check(["failure"]):
            self.fail(Cause.from_json(store.get("failure")))
            return
        self._read_ends(store)
        found = self._proposal(store) if self._proposal else (self._crossed(store) or self._silent(store))
        if found:
            self.fail(Cause.from_json(store.compare_set("failure", "", found.to_json())))
        self.rounds += 1

    def _read_ends(self, store: Store) -> None:
        count = store.add("ends", 0)
        if count > self._ends:
            self._ends = count
            new = [rank for rank in self._others() if rank not in self.ended and store.check([f"end/{rank}"])]
            with self.changed:
                self.ended.update({rank: store.get(f"end/{rank}").decode() for rank in new})
                self.changed.notify_all()

    def _silent(self, store: Store) -> Cause | None:
        """The failure of the next rank that has begun and not ended, or of one that does not begin."""
        absent = []
        for peer in self._others():
            if peer in self.ended:
                continue
            sign = self._sign_of(peer, store)
            if sign is None:
                absent.append(peer)
                continue
            still = self._sign((peer, sign))
            if still < self._patience / 2:
                self._suspects = {}
            elif not self._suspects:
                self._suspects = {other: self._sign_of(other, store) for other in islice(self._others(), SUSPECTS)}
            if still > self._patience:
                return self.about(peer, self._silence(peer, store), store)
            break
        if absent and self._absent(absent) > self.pace.absent:
            return Cause(absent[0], "", "", f"did not start its pipeline for {self.pace.absent:g} s")
        return None

    def _crossed(self, store: Store) -> Cause | None:
        """The failure of this rank, if it waits for one that waits for it in another pipeline."""
        mine, pace = stay_in(self), self.pace
        is_long = mine is not None and mine.seconds > pace.crossed
        if is_long != self._waits:
            self._waits = is_long
            store.add("waiting", 1 if is_long else -1)
        inside = self._where(store)
        if inside != self._inside:
            self._inside = inside
            store.set(f"inside/{self.rank}", inside)
        if mine is None or not is_long:
            return None
        for peer in islice(self._others(), SUSPECTS):
            told = store.get(f"inside/{peer}").decode() if store.check([f"inside/{peer}"]) else ""
            if told and (what := crossed(mine, dist.get_rank(), peer, told)):
                still = self._crossing((mine, told))  # it may have gone on since it said so
                return Cause(self.rank, self.host, "", what) if still > self.pace.grace else None
        return None

    def _where(self, store: Store) -> str:
        """The wait of this rank in another pipeline, or in a collective while others wait here; empty if there is none.

        Frames of the main thread are looked at only then: it would be the one thing that disturbs it at each beat.
        """
        other = stay_elsewhere(self)
        if other is not None:
            return other.to_json() if other.seconds > self.pace.crossed else ""
        if stay_in(self) is None and store.add("waiting", 0):
            other = stay_in_a_collective()
        return other.to_json() if other is not None and other.seconds > self.pace.grace else ""

    def _silence(self, peer: int, store: Store) -> str:
        """What is said of a rank that is silent, and of those that have been silent for half of the time at least."""
        same = {rank for rank, sign in self._suspects.items() if sign and sign == self._sign_of(rank, store)}
        too = sorted(same - {peer} - self.ended.keys())
        also = f", nor did rank{'s' * (len(too) > 1)} {', '.join(map(str, too))}" if too else ""
        who = (
            f"they were stopped or killed, or are unreachable from {self.host}"
            if too
            else ("it was stopped or killed, or is unreachable")
        )
        return f"gave no sign for {self._patience:g} s{also}: {who}"

    @property
    def _patience(self) -> float:
        """Seconds without a sign after which a rank is blamed: fewer if some rank is known to be gone."""
        return self.pace.silent / HASTE if self._has_lost else self.pace.silent

    def _sign_of(self, peer: int, store: Store) -> str | None:
        key = f"sign/{peer}"
        return store.get(key).decode() if store.check([key]) else None

    def _others(self) -> Iterator[int]:
        return ((self.rank + k) % self.size for k in range(1, self.size))

    def _say_last_word(self, store: Store) -> None:
        store.set(f"end/{self.rank}", self._last_word)
        store.add("ends", 1)
        if self.cause and self.rank == 0:  # which may host the store, that the others learn the cause from
            waited = self.stillness()
            while waited("") < self.pace.grace and set(self._others()) - {*self.ended, self.cause.rank}:
                time.sleep(self.pace.beat / 4)
                self._read_ends(store)
