"""A kernel that fails late is reported with the instruction that queued it, wherever the error is noticed."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
import virtual_device as vd
from machines import LATE, SYNC, THREADS
from scenes import D, Net, built, floats, piped
from torch import Tensor, nn

from pipecompile import ExecutionError
from pipecompile.ir.instruction import Compute, Instruction, Send, parse
from pipecompile.runtime import link
from pipecompile.runtime.link import Act
from pipecompile.runtime.transport import LocalTransport

WORDS = {
    "0F2": "stage 0, microbatch 2, forward (0F2, modules ",
    "1B1": "stage 1, microbatch 1, backward (1B1, modules ",
    "0F1>1": "the copy to stage 1 from stage 0, microbatch 1, forward (0F1, modules ",
}
EACH = pytest.mark.parametrize("at", WORDS)
Fail = Callable[..., None]


@pytest.fixture
def fail(monkeypatch: pytest.MonkeyPatch) -> Fail:
    """A function that makes a kernel of the next run of an instruction fail, on the device of its stage."""
    wanted: dict[Instruction, int] = {}

    def queued(i: Instruction) -> None:
        if i in wanted:
            vd.fail_kernel(i.stage, wanted.pop(i))

    send, act_of = LocalTransport.send, link._act

    def sending(self: LocalTransport, i: Send, *args: Any) -> Any:
        queued(i)
        return send(self, i, *args)

    def linked(i: Compute, *args: Any) -> Act:
        act = act_of(i, *args)

        def acting(*operands: Any) -> Any:
            queued(i)
            return act(*operands)

        return acting

    monkeypatch.setattr(link, "_act", linked)
    monkeypatch.setattr(LocalTransport, "send", sending)
    return lambda text, kernel=0: wanted.update({parse(text): kernel})


def step(pipe: nn.Module) -> Tensor:
    pipe.zero_grad()
    loss = pipe(*floats(0))
    loss.backward()
    return loss.detach()


def run_what_is_queued(pipe: nn.Module, rank: int) -> None:
    """The device of a rank runs, and notes what has run, as far as it comes."""
    lane = pipe.pipeline._session.lanes[rank]
    with suppress(torch.AcceleratorError):
        while not all([lane.sends.query(), lane.notes.query()]):  # in turn
            pass


def position(pipe: nn.Module, i: Instruction) -> int:
    return next(row.index(i) for row in pipe.pipeline.program.ranks if i in row)


@EACH
def test_the_next_call_says_where_a_device_has_stopped(fail: Fail, at: str) -> None:
    LATE.start()
    pipe = piped(built(Net), LATE)
    wanted = step(pipe).cpu()
    before = {name: p.detach().cpu().clone() for name, p in pipe.named_parameters()}
    run_what_is_queued(pipe, 0)
    run_what_is_queued(pipe, 1)
    fail(at)
    step(pipe)  # queues it all
    run_what_is_queued(pipe, parse(at).stage)
    stopped = pipe.pipeline.stopped_at
    assert parse(at) in stopped
    assert len(stopped) <= 2  # a copy beside a computation
    for _ in range(2):
        with pytest.raises(ExecutionError, match=f"^a kernel has failed on virt:{parse(at).stage}, in ") as caught:
            step(pipe)
        assert WORDS[at] in str(caught.value)
        assert "CUDA_LAUNCH_BLOCKING=1); it was noticed by virt" in str(caught.value)
        assert "queued before it" not in str(caught.value)
        assert isinstance(caught.value.__cause__, torch.AcceleratorError)
    LATE.start()  # the device works again
    assert pipe.pipeline.stopped_at == ()
    for name, p in pipe.named_parameters():
        assert torch.equal(p.detach().cpu(), before[name])
    assert torch.equal(step(pipe).cpu(), wanted)


@EACH
def test_with_a_host_that_waits_at_once_nothing_has_been_noted(fail: Fail, at: str) -> None:
    LATE.start()
    pipe = piped(built(Net), LATE)
    step(pipe).cpu()
    fail(at)
    step(pipe)
    with pytest.raises(torch.AcceleratorError):  # the caller's own error
        torch.accelerator.synchronize(parse(at).stage)
    stopped = pipe.pipeline.stopped_at
    assert stopped
    assert min(position(pipe, i) for i in stopped) <= position(pipe, parse(at))
    with pytest.raises(ExecutionError, match=r"or soon after, or in what was queued before it: "):
        step(pipe)


@EACH
def test_threads_stop_at_the_instruction_or_soon_before_it(fail: Fail, at: str) -> None:
    THREADS.start()
    pipe = piped(built(Net), THREADS)
    wanted = step(pipe).cpu()
    fail(at)
    with suppress(ExecutionError, torch.AcceleratorError):
        step(pipe).cpu()
        torch.accelerator.synchronize(parse(at).stage)
    with pytest.raises(ExecutionError, match=f"a kernel has failed on virt:{parse(at).stage}, in ") as caught:
        step(pipe)
    said = re.findall(r"\((\d[FB]\d), modules", str(caught.value))
    assert said
    assert min(position(pipe, parse(i)) for i in said) <= position(pipe, parse(at))
    THREADS.start()
    assert torch.equal(step(pipe).cpu(), wanted)


def test_a_rank_on_the_cpu_notices_it_within_the_step(fail: Fail) -> None:
    LATE.start()
    pipe = piped(built(Net), LATE, (0, "cpu"))
    step(pipe)
    fail("0F2")
    with pytest.raises(ExecutionError, match=r"^a kernel has failed on virt:0, in .* noticed in stage \d, \d"):
        step(pipe)


def test_kernels_that_run_when_they_are_queued_tell_the_line(fail: Fail) -> None:
    SYNC.start()
    pipe = piped(built(Net), SYNC)
    step(pipe)
    fail("1F2", kernel=3)
    line = r"noticed in stage 1, 1F2: module '[\w.]+', \S+scenes.py:\d+"
    with pytest.raises(ExecutionError, match=r"in stage 1, microbatch 2, forward \(1F2.*" + line):
        step(pipe)


def test_what_the_caller_queued_is_not_the_pipelines() -> None:
    LATE.start()
    pipe = piped(built(Net), LATE)
    step(pipe)
    run_what_is_queued(pipe, 0)
    run_what_is_queued(pipe, 1)
    vd.fail_kernel(1, 0)
    with torch.no_grad():
        pipe.head.bias.add_(1.0)
    with pytest.raises(torch.AcceleratorError):
        torch.accelerator.synchronize(1)
    with pytest.raises(ExecutionError, match="on virt:1 outside the stages, whose own work"):
        step(pipe)
    assert pipe.pipeline.stopped_at == ()


class Looked(nn.Module):
    """A table in the first stage, without a row for every index."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.layers = nn.Embedding(5, D), Net()

    def forward(self, ids: Tensor) -> Tensor:
        return self.layers(self.table(ids)).square().mean()


def test_an_index_out_of_range() -> None:
    LATE.start()
    pipe = piped(built(Looked), LATE)
    ids = torch.arange(8) % 5
    pipe(ids)
    ids[5] = 7  # of microbatch 2
    pipe(ids)
    run_what_is_queued(pipe, 0)
    with pytest.raises(ExecutionError, match=r"stage 0, microbatch 2, forward .*index out of range"):
        pipe(ids)
