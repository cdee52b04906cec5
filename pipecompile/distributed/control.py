"""The control channel beside the data: every rank learns why a run ends, and no wait outlives it.

gloo's waits cannot be woken, so no thread that a user waits on waits in gloo, nor in the store. It waits on a Condition
(``Control.wait_for``), which those notify who make things ready (``Worker``) or learn that a rank has failed
(``Watch``).
"""

from __future__ import annotations

import atexit
import hashlib
import math
import os
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import count
from threading import Condition, Thread

import torch.distributed as dist

from pipecompile.distributed.leaving import uncaught
from pipecompile.distributed.watch import Cause, Pace, Store, Watch
from pipecompile.errors import InputError, RankError
from pipecompile.runtime.transport import Aborted

UNCLOSED = "ended without closing the pipeline"
_pipelines: defaultdict[Sequence[int], Iterator[int]] = defaultdict(count)


class Control:
    """One rank's end of the channel.

    A rank that ends has failed only if another waits for it. An exception that ends the script is a failure at once.

    Args:
        rank: of this process among those of the pipeline.
        size: the number of those processes.
        store: opens the store anew, under a prefix that is this pipeline's alone; see ``store_of_the_group``.
    """

    def __init__(self, rank: int, size: int, store: Callable[[], Store], pace: Pace | None = None) -> None:
        self.rank = rank
        self.size = size
        self.watch = Watch(rank, size, store, pace or Pace())  # the thread must not keep the control itself alive
        self._thread = Thread(target=self.watch.run, daemon=True, name=f"pipecompile control {rank}")
        self._thread.start()
        self._at_exit = partial(_exit, self.watch, self._thread)
        atexit.register(self._at_exit)
        weakref.finalize(self, _forget, self.watch, self._at_exit).atexit = False

    @property
    def changed(self) -> Condition:
        """To be notified by whoever makes ready what ``wait_for`` waits for."""
        return self.watch.changed

    @property
    def cause(self) -> Cause | None:
        """The first failure, once it is known here."""
        return self.watch.cause

    def mine(self, where: str, what: str) -> Cause:
        """A failure of this rank, to be reported."""
        return Cause(self.rank, self.watch.host, where, what)

    def report(self, cause: Cause) -> RankError:
        """Proposes a cause; returns the error of the one that came first, which every rank raises."""
        self.watch.report(cause)
        self.watch.fail(cause)  # were the pipeline closed, nobody else would learn of it
        return self.error()

    def lost(self, peer: int | None, error: Exception) -> None:
        """Takes a lost connection for a hint: blames the peer if no better cause comes in time."""
        self.watch.lost(peer, error)

    def error(self) -> RankError:
        """The error that ends the run, after ``Aborted``."""
        closed = self.mine("", "has closed the pipeline, so it cannot be used any more; compile the model again")
        return RankError(str(self.cause or closed))

    def wait_for(
        self,
        ready: Callable[[], bool],
        seconds: float | None = None,
        peer: int | None = None,
        pause: Callable[[float], None] | None = None,
    ) -> bool:
        """Waits until ``ready()``, called under ``changed``; returns False if the time was up before.

        Args:
            peer: the rank that makes it ready; None if all are needed. It fails if it ends before.
            pause: as of ``Watch.until``.

        Raises:
            Aborted: there is a cause, or the pipeline was closed.
        """
        watch, needed = self.watch, set(range(self.size)) if peer is None else {peer}
        still = watch.stillness()

        def given_up() -> bool:
            gone = needed & watch.ended.keys()
            return bool(gone) and still(gone) > watch.pace.grace

        in_time = watch.until(lambda: ready() or given_up(), math.inf if seconds is None else seconds, pause)
        if in_time and not (watch.cause or watch.closed or ready()):
            gone = min(needed & watch.ended.keys())
            watch.propose(lambda store: watch.about(gone, UNCLOSED, store))
        if watch.cause or watch.closed:
            raise Aborted
        return in_time

    def close(self) -> None:
        """Says that this rank ended well, and ends the thread.

        A rank that hosts the store must not end before the others have closed too.
        """
        self.watch.end("closed the pipeline")
        self._thread.join(2 * self.watch.pace.grace)
        atexit.unregister(self._at_exit)


def _forget(watch: Watch, at_exit: Callable[[], None]) -> None:
    """Ends the thread of a control that nothing refers to any more."""
    watch.end(UNCLOSED)
    atexit.unregister(at_exit)


def _exit(watch: Watch, thread: Thread) -> None:
    """Says at the interpreter's end how the script ended, unless it closed the pipeline."""
    if os.getpid() != watch.process:  # a fork's end is not the rank's
        return
    if (error := uncaught()) is not None:
        cause = Cause(watch.rank, watch.host, "", f"{UNCLOSED}: {type(error).__name__}: {error}".rstrip(": "))
        watch.report(cause)
    watch.end(UNCLOSED)
    thread.join(2 * watch.pace.grace)


def store_of_the_group(processes: Sequence[int] = (), name: str | None = None) -> Callable[[], Store]:
    """Returns what opens the store of the default process group anew, under a prefix of one run and one pipeline.

    Args:
        processes: of the pipeline. Others may have one at the same time, and have made other numbers of them.
        name: of the pipeline, the same on all of its ranks; by default the number of this call for these processes.

    Raises:
        InputError: there is no process group, or its store cannot be opened anew.
    """
    group = dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
    if group is None:
        raise InputError(
            "torch.distributed has no process group, which ranks in several processes need; "
            "call torch.distributed.init_process_group('gloo') first, in a script that torchrun starts"
        )
    store = group.get_group_store()
    run = f"{os.environ.get('TORCHELASTIC_RUN_ID', 'run')}.{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    of = hashlib.blake2b(repr([*processes]).encode(), digest_size=8).hexdigest()
    prefix = f"pipecompile/{run}/{of}/{next(_pipelines[tuple(processes)]) if name is None else name}"
    clone: Callable[[], Store] = store.clone  # type: ignore[attr-defined]
    under: type = dist.PrefixStore  # type: ignore[attr-defined]
    try:
        clone()
    except RuntimeError as error:
        while isinstance(store, under):
            store = store.underlying_store  # type: ignore[attr-defined]
        raise InputError(
            f"a second thread cannot open the {type(store).__name__} that the process group was started with; "
            "start it with init_method='env://', as torchrun does, or with a TCPStore"
        ) from error
    return lambda: under(prefix, clone())
