"""What offloading frees: the bytes that the virtual accelerator's allocator counts, beside those predicted."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from long import LONG
from machines import EARLY, LATE, RANDOM, THREADS, Machine
from torch import Tensor, nn
from torch.nn import functional as F
from toys import Bad

import pipecompile
from pipecompile import PlanOptions
from pipecompile.ir.instruction import Fetch, Offload

WIDTH, ROWS, MICROBATCHES = 64, 1024, 8


class Deep(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        blocks = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.LayerNorm(WIDTH)) for _ in range(layers)]
        self.layers = nn.Sequential(*blocks)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(self.head(self.layers(x)), y)


def peaks(machine: Machine, offload: str, schedule: str, ranks: int, layers: int = 8) -> tuple[list[int], Any]:
    """The counted peak of each device in a step, and the pipeline."""
    machine.start()
    devices = [machine[number] for number in range(ranks)]
    torch.manual_seed(0)
    plan = PlanOptions(offload=offload, optimizer_state=0.0)
    pipe = pipecompile.compile(
        Deep(layers), devices, microbatches=MICROBATCHES, schedule=schedule, costs="count", verify="never", plan=plan
    )
    x, y = torch.randn(ROWS, WIDTH), torch.randn(ROWS, 3)
    for _ in range(2):
        pipe.zero_grad()
        gc.collect()
        for device in devices:
            torch.accelerator.reset_peak_memory_stats(device)
        pipe(x, y).backward()
    return [torch.accelerator.max_memory_allocated(device) for device in devices], pipe.pipeline


@pytest.mark.parametrize("machine", [LATE, THREADS], ids=str)
@pytest.mark.parametrize(("schedule", "ranks"), [("gpipe", 2), ("1f1b", 4)])
def test_peaks_fall_as_predicted(machine: Machine, schedule: str, ranks: int) -> None:
    stay, staying = peaks(machine, "never", schedule, ranks, layers=16)
    predicted = staying.memory.ranks
    del staying
    leave, leaving = peaks(machine, "always", schedule, ranks, layers=16)
    assert leaving.plan.offloaded == tuple(range(ranks))
    assert leave[0] < 0.7 * stay[0]
    for counted, expected in zip((*stay, *leave), (*predicted, *leaving.memory.ranks), strict=True):
        assert counted == pytest.approx(expected, rel=0.1)
    spans = {
        type(span.instruction): span for span in leaving.timeline.spans if isinstance(span.instruction, Offload | Fetch)
    }
    assert set(spans) == {Offload, Fetch}
    assert all(span.seconds > 0 for span in spans.values())


@pytest.mark.parametrize("schedule", ["zb-h1", "zb-h2", "zb-v"] if LONG else ["zb-v"])
def test_what_split_backwards_hold_is_as_predicted(schedule: str) -> None:
    for offload in ("never", "always"):
        counted, pipeline = peaks(LATE, offload, schedule, 2)
        assert counted == pytest.approx(pipeline.memory.ranks, rel=0.1)
        assert bool(pipeline.plan.offloaded) == (offload == "always")
        del pipeline
        gc.collect()


class Shares(nn.Module):
    """Gradients of weights that share memory: of a sum, of a view, and of a weight that is an input of a layer."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Sequential(nn.Linear(16, 16), nn.ReLU(inplace=True), nn.LayerNorm(16)) for _ in range(6)]
        self.layers, self.head, self.place = nn.Sequential(*layers), nn.Linear(16, 3), nn.Linear(16, 16)
        self.added, self.table = nn.Parameter(torch.randn(1, 5, 16)), nn.Parameter(torch.randn(5, 16))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.layers(x) + (self.added.view(5, 16) + self.place(self.table))
        return F.mse_loss(self.head(h), y)


@pytest.mark.parametrize("machine", [LATE, EARLY, RANDOM[0], RANDOM[1], THREADS] if LONG else [RANDOM[0]], ids=str)
@pytest.mark.parametrize("schedule", ["zb-h1", "zb-h2", "zb-v"] if LONG else ["zb-v"])
def test_split_backwards_are_exact_while_activations_leave(machine: Machine, schedule: str) -> None:
    machine.start()
    torch.manual_seed(0)
    model, x, y = Shares().double(), torch.randn(12, 5, 16).double(), torch.randn(12, 5, 3).double()
    unsplit = copy.deepcopy(model)
    unsplit(x, y).backward()
    wanted = {name: p.grad for name, p in unsplit.named_parameters()}
    pipe = pipecompile.compile(
        model, [machine[0], machine[1]], microbatches=6, schedule=schedule, costs="count", verify="never",
        plan=PlanOptions(offload="always"),
    )  # fmt: skip
    for _ in range(3):
        pipe.zero_grad()
        pipe(x, y).backward()
        for name, parameter in pipe.named_parameters():
            assert parameter.grad is not None, name
            torch.testing.assert_close(parameter.grad.cpu(), wanted[name], msg=name)


def test_where_memory_binds_the_planner_offloads_and_the_step_fits() -> None:
    """With recomputation off: the limit is between what both need."""
    import virtual_device as vd

    stay, _ = peaks(LATE, "never", "gpipe", 2)
    leave, _ = peaks(LATE, "always", "gpipe", 2)
    gc.collect()
    limit = int(0.5 * stay[0] + 0.5 * leave[0])
    for device in range(2):
        vd.limit(device, limit + torch.accelerator.memory_allocated(LATE[device]))
    torch.manual_seed(0)
    plan = PlanOptions(recompute="never", optimizer_state=0.0)
    pipe = pipecompile.compile(
        Deep(8),
        [LATE[0], LATE[1]],
        microbatches=MICROBATCHES,
        schedule="gpipe",
        costs="count",
        verify="never",
        plan=plan,
    )
    pipe(torch.randn(ROWS, WIDTH), torch.randn(ROWS, 3)).backward()
    assert pipe.pipeline.plan.offloaded
    assert pipe.pipeline.report.offloaded[0] == "stage 0, from a forward to its backward"


class Fails(Deep):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return super().forward(Bad.apply(x * self.layers[0][0].bias), y)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("machine", [LATE, RANDOM[0]], ids=str)
def test_copies_under_way_at_a_failure_do_not_overwrite_later_memory(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.start()
    torch.manual_seed(0)
    plan = PlanOptions(offload="always", optimizer_state=0.0)
    pipe = pipecompile.compile(
        Fails(4), [machine[0], machine[1]], microbatches=MICROBATCHES, schedule="gpipe", costs="count",
        verify="never", plan=plan,
    )  # fmt: skip
    x, y = torch.randn(ROWS // 8, WIDTH), torch.randn(ROWS // 8, 3)

    def gradients() -> dict[str, Tensor]:
        pipe.zero_grad()
        pipe(x, y).backward()
        return {name: p.grad.cpu() for name, p in pipe.named_parameters() if p.grad is not None}

    wanted = gradients()
    assert wanted
    for _ in range(3):
        monkeypatch.setattr(Bad, "fails", True)
        with pytest.raises(pipecompile.ExecutionError, match="on purpose"):
            pipe(x, y)
        monkeypatch.setattr(Bad, "fails", False)
        for name, gradient in gradients().items():
            assert torch.equal(gradient, wanted[name]), name
