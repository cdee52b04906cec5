"""Ctrl-C at each place of a call where the interpreter looks at signals: the call ends, and the next one works.

The interpreter looks at them after a call of a function, at the begin of one, and where a loop goes back.
"""

from __future__ import annotations

import copy
import dis
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from toys import D, blocks, mean_square

import pipecompile
from pipecompile.runtime import executor, lane, rank_thread, transport
from pipecompile.runtime.rank_thread import RankThread

LOOKS = frozenset(
    code
    for name, code in dis.opmap.items()
    if name.startswith(("CALL", "JUMP_BACKWARD", "RESUME")) and "PRE" not in name
)


class Interrupts:
    """Raises ``KeyboardInterrupt`` at one of the places in some files, in the thread that enters it."""

    def __init__(self, files: set[str], place: int) -> None:
        self.files = files
        self.left = place
        self.places: dict[Any, int] = {}

    @contextmanager
    def raised(self) -> Iterator[None]:
        before = sys.gettrace()
        sys.settrace(self._look)
        try:
            yield
        finally:
            sys.settrace(before)

    def _look(self, frame: Any, event: str, _: Any) -> Any:
        if frame.f_code.co_filename not in self.files:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode":
            before = self.places.get(frame)
            self.places[frame] = frame.f_lasti
            if before is not None and frame.f_code.co_code[before] in LOOKS:
                self.left -= 1
                if self.left == 0:
                    raise KeyboardInterrupt
        return self._look


def interrupted_everywhere(files: set[str], call: Callable[[], None], after: Callable[[], None]) -> int:
    """Runs ``call`` with an interrupt at each place in turn, and ``after`` after it; returns how many there are."""
    place = 0
    while True:
        place += 1
        interrupts = Interrupts(files, place)
        try:
            with interrupts.raised():
                call()
        except KeyboardInterrupt:
            after()
            continue
        assert interrupts.left > 0, "the interrupt was lost"
        return place - 1


def in_time(function: Callable[[], Any]) -> Any:
    """Runs a function in a thread, which may hang."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(function()), daemon=True)
    thread.start()
    thread.join(timeout=120)
    assert not thread.is_alive(), "hangs"
    assert found, "has raised"
    return found[0]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = blocks(3)

    def forward(self, x: Tensor) -> Tensor:
        return mean_square(self.body(x))


def test_a_call_may_be_interrupted_anywhere_while_its_ranks_run() -> None:
    model = Net().double()
    twin, x = copy.deepcopy(model), torch.randn(4, D, dtype=torch.float64)
    pipe = pipecompile.compile(model, ["cpu", "cpu"], schedule="1f1b", microbatches=2, costs="count")
    twin(x).backward()
    wanted = {name: parameter.grad for name, parameter in twin.named_parameters()}

    def works() -> None:
        pipe.zero_grad()
        pipe(x).backward()
        torch.testing.assert_close({name: parameter.grad for name, parameter in pipe.named_parameters()}, wanted)

    works()
    files = {str(module.__file__) for module in (executor, lane, rank_thread, transport, threading)}
    assert in_time(lambda: interrupted_everywhere(files, lambda: pipe(x), works)) > 20


def test_a_thread_runs_its_jobs_whatever_interrupts_who_waits_for_them() -> None:
    thread, ran = RankThread("a rank's", int), list[int]()

    def call() -> None:
        thread.start(lambda: ran.append(1)).wait()

    places = in_time(
        lambda: interrupted_everywhere({str(rank_thread.__file__), threading.__file__}, call, thread.settle)
    )
    assert places > 2
    assert len(ran) >= places - 2, "it was interrupted before the job was given"
    thread.end()
    assert not thread.thread.is_alive()


def test_a_wait_that_an_interrupt_has_ended_may_be_repeated() -> None:
    thread = RankThread("a rank's", int)
    job = thread.start(int)
    job.wait()
    job.wait()
    thread.end()


def test_what_a_job_raises_is_kept_and_the_thread_goes_on() -> None:
    thread = RankThread("a rank's", int)
    job = thread.start(lambda: 1 // 0)
    job.wait()
    assert isinstance(job.error, ZeroDivisionError)
    thread.settle()
    thread.end()
