"""Times are the device's own, whenever the host waits: the profile, the timeline, and the plan that follows them."""

from __future__ import annotations

from itertools import count
from typing import Any

import pytest
import torch
import virtual_device as vd
from machines import LATE
from scenes import Net, built, floats, inside, piped
from torch import Tensor, nn

from pipecompile.compiler import learn, rehearse
from pipecompile.ir.instruction import Backward, Forward
from pipecompile.ir.plan_options import PlanOptions
from pipecompile.profile import meters
from pipecompile.profile.links import SIZES, copy_seconds

SLOW = 50.0  # much more than the noise of the machine


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x.square().mean()


def test_a_clock_tells_the_devices_time() -> None:
    LATE.start()
    vd.slowness(1, SLOW)

    def seconds(index: int) -> float:
        x = torch.rand(64, 64).to(LATE[index])
        return meters.Clock(x.device).repeated(lambda: x @ x)

    assert 0 < seconds(0) < seconds(1) / 5


@pytest.mark.parametrize(("sender", "copier"), [("virt:0", 0), ("cpu", 1)])
def test_a_link_is_measured_by_the_clock_of_the_device_that_copies(
    monkeypatch: pytest.MonkeyPatch, sender: str, copier: int
) -> None:
    LATE.start()
    ends = torch.device(sender), LATE[1]
    monkeypatch.setattr("time.perf_counter", count().__next__)  # a host that takes a second for anything
    quick = [copy_seconds(*ends, nbytes) for nbytes in SIZES]
    assert all(0 < seconds < 0.5 for seconds in quick)
    vd.slowness(copier, 1e3)
    slow = [copy_seconds(*ends, nbytes) for nbytes in SIZES]
    assert all(late > 50 * early for early, late in zip(quick, slow, strict=True))


def test_copies_to_measure_a_link_run_on_a_stream_of_the_sender(monkeypatch: pytest.MonkeyPatch) -> None:
    LATE.start()
    seen = set()
    to = torch.Tensor.to

    def watched(tensor: Tensor, device: torch.device, **options: bool) -> Tensor:
        stream = torch.accelerator.current_stream(LATE[0] if tensor.device == LATE[0] else LATE[1])
        seen.add((str(tensor.device), stream.stream_id == 0, tensor.is_pinned(), options["non_blocking"]))
        return to(tensor, device, **options)

    monkeypatch.setattr(torch.Tensor, "to", watched)
    for source in (LATE[0], torch.device("cpu")):
        copy_seconds(source, LATE[1], 1000)
    on_own_streams = {("virt:0", False, False, True), ("virt:1", False, False, True), ("cpu", False, True, True)}
    assert seen == on_own_streams


def test_a_timeline_tells_the_devices_time_and_only_who_reads_it_waits() -> None:
    LATE.start()
    vd.slowness(1, SLOW)
    pipe = piped(built(Deep), LATE)
    x = torch.randn(16, 64).double()
    pipe(x)
    vd.waits()
    pipe(x)
    assert vd.waits() == {}
    timeline = pipe.pipeline.timeline
    assert timeline is not None
    assert set(vd.waits()) == {"event.synchronize"}
    computed = [span for span in timeline.spans if isinstance(span.instruction, Forward | Backward)]
    assert len(computed) == 16
    busy = [sum(span.seconds for span in computed if span.rank == rank) for rank in range(2)]
    assert 0 < busy[0] < busy[1]
    assert pipe.pipeline.timeline is timeline


@pytest.mark.parametrize("where", [("cpu", 0), (0, "cpu"), (0, "cpu", 1), ("cpu", "cpu:0")])
def test_a_timeline_spans_devices_with_clocks_of_their_own(where: tuple[int | str, ...]) -> None:
    LATE.start()
    pipe = piped(built(Net), LATE, where)
    inside(pipe, *floats(0))
    timeline, program = pipe.pipeline.timeline, pipe.pipeline.program
    assert {span.instruction for span in timeline.spans} == set(program.instructions)
    assert all(span.seconds >= 0 for span in timeline.spans)


def test_a_rehearsal_moves_layers_to_the_quick_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rehearse, "all_short", lambda costs: False)
    LATE.start()

    def layers_of_the_last_stage() -> int:
        pipe = piped(built(Deep), LATE, costs="measure", plan=PlanOptions(tune="rehearse"))
        pipe(torch.randn(16, 64).double())
        return sum(name.endswith("weight") for name, _ in pipe.pipeline.stages[1].named_parameters())

    equal = layers_of_the_last_stage()
    vd.slowness(1, SLOW)
    assert layers_of_the_last_stage() < equal


def test_training_moves_layers_to_the_quick_device_with_all_that_belongs_to_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def trained(slow: bool) -> tuple[list[float], Any]:
        LATE.start()
        model = built(Deep)
        pipe = piped(model, LATE, costs="measure")
        optimizer, losses = torch.optim.Adam(model.parameters(), lr=0.01), []
        generator = torch.Generator().manual_seed(1)
        for step in range(learn.WARM_UP + 2 * learn.STEPS + 3):
            loss = pipe(torch.randn(16, 64, generator=generator).double())
            loss.backward()
            losses.append(loss.item())
            optimizer.step()  # gradients are still there when the next call moves parameters
            optimizer.zero_grad(set_to_none=step % 2 == 1)
            vd.slowness(1, SLOW if slow else 1.0)
        return losses, pipe

    monkeypatch.setattr(learn, "all_short", lambda costs: False)
    moving, pipe = trained(slow=True)
    assert "the cut moved over" in pipe.pipeline.report.learned[0]
    monkeypatch.setattr(learn, "all_short", lambda costs: True)
    still, other = trained(slow=False)
    assert other.pipeline.report.learned == ()
    assert moving == pytest.approx(still, rel=1e-12)


def test_a_measured_pipeline_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rehearse, "all_short", lambda costs: False)
    LATE.start()
    pipe = piped(built(Net), LATE, costs="measure", plan=PlanOptions(tune="rehearse"))
    loss = inside(pipe, *floats(0))
    expected = built(Net)(*floats(0))
    torch.testing.assert_close(loss.cpu(), expected.detach())
