"""What the virtual device promises: that of a real one, and each fault of a program shown."""

from __future__ import annotations

import copy
from contextlib import suppress

import pytest
import torch
import virtual_device as vd
from torch import Tensor, nn

A, B = torch.device("virt", 0), torch.device("virt", 1)
MODES = pytest.mark.parametrize("mode", vd.MODES)
LAZY = pytest.mark.parametrize("mode", ["late", "early", "random"])


def streams(device: torch.device, count: int = 2) -> list[torch.Stream]:
    return [torch.Stream(device=device) for _ in range(count)]


@MODES
def test_a_training_step_equals_the_cpus(mode: str) -> None:
    vd.run(mode)
    model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 3)).double()
    x, y = torch.randn(5, 8).double(), torch.randint(3, (5,))
    other = copy.deepcopy(model).to(A)
    for each, device in ((model, "cpu"), (other, A)):
        optimizer = torch.optim.Adam(each.parameters())
        for _ in range(2):
            nn.functional.cross_entropy(each(x.to(device)), y.to(device)).backward()
            optimizer.step()
            optimizer.zero_grad()
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert q.device == A
        torch.testing.assert_close(q.detach().cpu(), p.detach(), rtol=0, atol=1e-15, msg=name)


@LAZY
def test_work_runs_later(mode: str) -> None:
    vd.run(mode)
    with streams(A)[0] as stream:
        _ = torch.ones(4, device=A) * 2
        assert not stream.query()
        stream.synchronize()
        assert stream.query()


@pytest.mark.parametrize("waits", [True, False])
def test_without_a_wait_a_stream_reads_garbage(waits: bool) -> None:
    vd.run("late")
    one, two = streams(A)
    with one:
        value = torch.full((4,), 2.0 + waits, device=A)  # not what memory may still hold
        event = one.record_event()
    with two:
        if waits:
            two.wait_event(event)
        result = (value * 3).cpu()
    assert (result.tolist() == [6.0 + 3 * waits] * 4) == waits


@pytest.mark.parametrize("recorded", [True, False])
def test_without_record_stream_memory_is_reused_too_early(recorded: bool) -> None:
    vd.run("early")
    one, two = streams(A)
    with one:
        value = torch.full((1000,), 2.0, device=A)
        event = one.record_event()
    with two:
        two.wait_event(event)
        result = value * 3
    if recorded:
        value.record_stream(two)
    del value
    with one:
        _next = torch.empty(1000, device=A)  # gets the same memory, unless it is recorded
    two.synchronize()
    with two:
        assert torch.equal(result.cpu(), torch.full((1000,), 6.0)) == recorded


def test_strict_memory_is_overwritten_when_it_is_freed() -> None:
    vd.run("early")
    vd.strict(True)
    one, two = streams(A)
    with one:
        value = torch.full((1000,), 2.0, device=A)
        two.wait_event(one.record_event())
    with two:
        result = value * 3
    del value  # nobody asks for its memory
    two.synchronize()
    with two:
        assert result.cpu().isnan().all()


@MODES
def test_memory_is_reused_in_stream_order(mode: str) -> None:
    vd.run(mode)
    results = [(torch.full((256,), float(number), device=A) * 2).sum() for number in range(20)]
    assert [result.item() for result in results] == [512.0 * number for number in range(20)]


@pytest.mark.parametrize("peers", [True, False])
@MODES
def test_copies_between_devices(mode: str, peers: bool) -> None:
    vd.run(mode)
    vd.peers(peers)
    assert torch.virt.can_device_access_peer(0, 1) == peers
    x = torch.arange(6.0, device=A).view(2, 3)
    there = x.t().to(B, non_blocking=True)  # on the current streams, between barriers
    assert there.device == B
    assert torch.equal(there.cpu(), torch.arange(6.0).view(2, 3).t())


@pytest.mark.parametrize("waits", [True, False])
def test_a_copy_on_another_stream_must_be_waited_for(waits: bool) -> None:
    vd.run("late")
    source, target = torch.Stream(device=A), torch.Stream(device=B)
    with source:
        there = torch.full((8,), 3.0 + waits, device=A).to(B, non_blocking=True)  # not what memory may still hold
        done = source.record_event()
    with target:
        if waits:
            target.wait_event(done)
        assert torch.equal((there + 1).cpu(), torch.full((8,), 4.0 + waits)) == waits


@pytest.mark.parametrize("pinned", [True, False])
def test_pinned_memory_is_read_after_the_call_and_pageable_is_not(pinned: bool) -> None:
    vd.run("late")
    host = torch.ones(4, pin_memory=pinned)
    there = host.to(A, non_blocking=True)
    host.fill_(5)
    assert there.cpu().tolist() == [5.0 if pinned else 1.0] * 4
    back = torch.ones(4, device=A).to("cpu", non_blocking=True)
    assert back.isnan().all()
    torch.accelerator.synchronize(A)
    assert back.tolist() == [1.0] * 4


def test_out_of_memory_and_counters() -> None:
    device = torch.device("virt", 5)
    vd.limit(5, 1 << 20)
    torch.accelerator.empty_cache()
    torch.accelerator.reset_peak_memory_stats(device)
    before = torch.accelerator.memory_allocated(device)
    held = torch.zeros(1 << 17, device=device)  # 512 KiB
    assert torch.accelerator.memory_allocated(device) - before == 1 << 19
    with pytest.raises(torch.OutOfMemoryError, match="virt:5"):
        torch.zeros(1 << 18, device=device)
    del held
    _ = torch.zeros(1 << 18, device=device)  # cached memory is given back for it
    assert torch.accelerator.max_memory_allocated(device) == 1 << 20
    assert torch.accelerator.get_memory_info(device)[1] == 1 << 20


def test_an_allocation_fails_on_request_and_only_once() -> None:
    vd.fail_after(1)
    _ = torch.ones(3, device=A)
    with pytest.raises(torch.OutOfMemoryError, match="virt:0"):
        torch.ones(3, device=A)
    _ = torch.ones(3, device=A)
    assert vd.fail_after(-1) == 3


@pytest.mark.parametrize("other", ["cpu", "virt:1"])
def test_devices_do_not_mix(other: str) -> None:
    with pytest.raises(RuntimeError, match="same device"):
        torch.ones(3, device=A) + torch.ones(3, device=other)
    assert (torch.ones(3, device=A) + torch.tensor(2.0)).cpu().tolist() == [3.0] * 3


def test_a_kernels_error_comes_with_a_later_wait_and_stays() -> None:
    vd.run("late")
    before = torch.accelerator.current_stream(A).record_event()
    before.synchronize()
    table = torch.ones(3, 2, device=A)
    nn.functional.embedding(torch.tensor([7], device=A), table)
    asked = (
        lambda: torch.accelerator.synchronize(A),
        before.query,
        table.exp,
        torch.accelerator.current_stream(A).record_event,
    )
    for ask in (*asked, asked[0]):
        with pytest.raises(torch.AcceleratorError, match="virt:0: a kernel queued earlier has failed: index out of"):
            ask()
    assert torch.ones(1, device=B).item() == 1.0
    vd.run("late")
    assert torch.ones(1, device=A).item() == 1.0


@pytest.mark.parametrize("mode", ["threads", "late"])
def test_a_kernel_fails_on_request_and_nothing_runs_after_it(mode: str) -> None:
    vd.run(mode)
    vd.fail_kernel(0, 2)
    log = torch.zeros(4, pin_memory=True)
    value = torch.ones(1, device=A)  # one kernel
    log[0:1].copy_(value, non_blocking=True)
    log[1:2].copy_(value, non_blocking=True)
    with suppress(torch.AcceleratorError):  # with threads, perhaps already here
        log[2:3].copy_(value, non_blocking=True)
    with pytest.raises(torch.AcceleratorError, match="virt:0"):
        torch.accelerator.synchronize(A)
    assert log.tolist() == [1.0, 0.0, 0.0, 0.0]
    assert vd.fail_kernel(0, -1) >= 3


def test_in_sync_mode_the_call_itself_raises() -> None:
    vd.run("sync")
    vd.fail_kernel(0, 0)
    with pytest.raises(torch.AcceleratorError, match="virt:0"):
        torch.ones(1, device=A)


def test_random_numbers_are_drawn_at_the_call() -> None:
    drawn = []
    for mode in vd.MODES:
        vd.run(mode)
        torch.manual_seed(7)
        one, two = streams(A)
        with one:
            x = torch.randn(5, device=A)
        with two:
            y = nn.functional.dropout(torch.ones(50, device=A))
            two.wait_stream(one)
            drawn.append(torch.cat([x, y]).cpu())
    assert all(torch.equal(drawn[0], each) for each in drawn)


def test_parameters_move_in_place_and_autocast_lowers() -> None:
    layer = nn.Linear(4, 4)
    layer.weight.data, layer.bias.data = layer.weight.data.to(A), layer.bias.data.to(A)
    with torch.autocast("virt", torch.bfloat16):
        assert layer(torch.ones(2, 4, device=A)).dtype == torch.bfloat16
    x = torch.ones(2, 4, device=A)
    vd.waits()
    layer(x).sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.device == A
    assert not vd.waits()  # nothing in it made the host wait


def test_waits_are_counted_by_what_waited() -> None:
    vd.run("late")
    value = torch.ones(2, device=A)
    event = torch.accelerator.current_stream(A).record_event()
    vd.waits()
    event.synchronize()
    assert value.sum().item() == 2.0
    assert vd.waits() == {"event.synchronize": 1, "aten::_local_scalar_dense": 1}
    assert vd.waits() == {}


def _seconds(device: torch.device, work: Tensor) -> float:
    stream = torch.accelerator.current_stream(device)
    start = stream.record_event(torch.Event(device, enable_timing=True))
    for _ in range(20):
        work = work @ work
    end = stream.record_event(torch.Event(device, enable_timing=True))
    end.synchronize()
    return start.elapsed_time(end)


@MODES
def test_events_tell_the_devices_time(mode: str) -> None:
    """Whenever the work runs, and however long the host does something else."""
    vd.run(mode)
    vd.slowness(1, 1e6)  # much more than the machine's noise
    quick, slow = (_seconds(device, torch.rand(32, 32).to(device)) for device in (A, B))
    assert 0 < quick < slow


def test_a_wait_moves_the_clock_of_the_stream_that_waits() -> None:
    vd.run("late")
    vd.slowness(0, 1e6)
    one, two = streams(A)
    start = two.record_event(torch.Event(A, enable_timing=True))
    with one:
        torch.rand(64, 64, device=A).exp_()
        two.wait_event(one.record_event())
    end = two.record_event(torch.Event(A, enable_timing=True))
    end.synchronize()
    assert start.elapsed_time(end) > 0


def test_tensors_are_copied_and_saved(tmp_path) -> None:
    value = torch.arange(4.0, device=A)
    copied = copy.deepcopy(value)
    value.zero_()
    assert copied.device == A
    torch.save({"x": copied}, tmp_path / "x.pt")
    assert torch.load(tmp_path / "x.pt")["x"].device == A
    assert torch.load(tmp_path / "x.pt", map_location="cpu")["x"].tolist() == [0.0, 1.0, 2.0, 3.0]


@pytest.mark.parametrize("how", ["foreach", "fused"])
def test_optimizers_of_many_tensors_at_once(how: str) -> None:
    vd.run("late")
    model = nn.Linear(3, 3).double()
    other = copy.deepcopy(model).to(A)
    for each, extra in ((model, {}), (other, {how: True})):
        optimizer = torch.optim.AdamW(each.parameters(), lr=0.1, **extra)
        for _ in range(3):
            each(torch.ones(2, 3, device=each.weight.device, dtype=torch.float64)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert (other.weight.cpu() - model.weight).abs().max() < 1e-12
