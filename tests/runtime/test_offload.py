"""Activations that go to the host: the gradients of the same pipeline that keeps them, bit for bit."""

from __future__ import annotations

import copy
import gc
import random
import re
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from long import some
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from toys import Bad

import pipecompile
from pipecompile import PlanOptions
from pipecompile.errors import ExecutionError, InputError, ProgramError
from pipecompile.ir.instruction import Fetch, Offload
from pipecompile.ir.plan import Plan
from pipecompile.ir.program import Program
from pipecompile.planning import memory_fit
from pipecompile.runtime import lane as lanes
from pipecompile.runtime.offload import Kept

WIDTH, ROWS = 8, 12


@pytest.fixture(autouse=True)
def copies(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Stages on the CPU copy to and fro; the bytes of each copy to the host are counted."""
    counted: list[int] = []
    to_host = lanes.Lane.to_host

    def counting(self: lanes.Lane, tensors: Any) -> lanes.Sent:
        counted.append(sum(t.nbytes for t in tensors))
        return to_host(self, tensors)

    def everywhere(plan: Plan, cluster: Any) -> Plan:
        return replace(plan, offloaded=tuple(s for s in range(plan.num_stages) if s not in plan.recomputed))

    monkeypatch.setattr(lanes.Lane, "offloads", True)
    monkeypatch.setattr(lanes.Lane, "to_host", counting)
    monkeypatch.setattr(memory_fit, "offloading", everywhere)
    return counted


class Net(nn.Module):
    def __init__(self, *between: Callable[[], nn.Module], tied: bool = False, regions: bool = False) -> None:
        super().__init__()
        groups = [[nn.Linear(WIDTH, WIDTH), nn.Tanh(), *(make() for make in between)] for _ in range(4)]
        self.layers = nn.ModuleList(nn.Sequential(*group) for group in groups)
        self.head = nn.Linear(WIDTH, WIDTH)
        if tied:
            self.head.weight = self.layers[0][0].weight
        self.regions = regions

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.regions else layer(x)
        out = self.head(x)
        return out if y is None else F.mse_loss(out, y)


class Shared(nn.Module):
    """Saves one storage in several views, one tensor twice, and values of other stages."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        q, k, v = self.one(x).chunk(3, dim=-1)
        z = (q * k * q).exp() * v + q
        return F.mse_loss(self.two(z * z) * x, y)


def trained(
    model: nn.Module, offload: str, loss: str = "inside", context: Any = None, **options: Any
) -> dict[str, Any]:
    """Losses, gradients and parameters of three steps."""
    model = copy.deepcopy(model)
    plan = PlanOptions(offload=offload, **options.pop("plan", {}))
    options = {"costs": "count", "microbatches": 6, "verify": "never", **options}
    pipe = pipecompile.compile(model, ["cpu"] * options.pop("ranks", 2), plan=plan, **options)
    optimizer = torch.optim.Adam(pipe.parameters(), lr=1e-2)
    torch.manual_seed(1)
    found: dict[str, Any] = {}
    for step in range(3):
        x, y = torch.randn(ROWS, WIDTH), torch.randn(ROWS, WIDTH)
        optimizer.zero_grad()
        with context() if context else torch.enable_grad():
            value = pipe(x, y) if loss == "inside" else F.mse_loss(pipe(x), y)
        value.backward()
        found[f"loss {step}"] = value.detach()
        found |= {f"gradient {step} {n}": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
    found |= {n: p.detach() for n, p in model.named_parameters()}
    found |= {n: b.clone() for n, b in model.named_buffers()}
    found["program"] = pipe.pipeline.program
    return found


def alike(one: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    assert one.keys() == other.keys()
    assert len(one) > 10
    for name, value in one.items():
        if name != "program":
            assert torch.equal(value, other[name]), name


def autocast() -> Any:
    return torch.autocast("cpu", dtype=torch.bfloat16)


CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "gpipe": (Net, {"schedule": "gpipe"}),
    "1f1b on four ranks": (Net, {"ranks": 4}),
    "split backwards": (Net, {"ranks": 4, "schedule": "zb-h1"}),
    "two stages on a rank": (Net, {"schedule": "interleaved-1f1b"}),
    "two stages on a rank, split": (Net, {"schedule": "zb-v"}),
    "loss outside": (Net, {"loss": "outside"}),
    "recomputed in part": (lambda: Net(regions=True), {"schedule": "gpipe"}),
    "dropout": (lambda: Net(lambda: nn.Dropout(0.3)), {"schedule": "gpipe"}),
    "dropout, loss outside": (lambda: Net(lambda: nn.Dropout(0.3)), {"loss": "outside"}),
    "normalized": (lambda: Net(lambda: nn.BatchNorm1d(WIDTH)), {"schedule": "gpipe"}),
    "in place": (lambda: Net(lambda: nn.LayerNorm(WIDTH), lambda: nn.ReLU(inplace=True)), {"schedule": "gpipe"}),
    "tied": (lambda: Net(tied=True), {"schedule": "gpipe"}),
    "autocast": (Net, {"schedule": "gpipe", "context": autocast}),
    "kept whole": (Net, {"schedule": "gpipe", "leaf_modules": ["layers.1"]}),
    "views": (Shared, {"schedule": "gpipe"}),
    "replicas": (Net, {"ranks": 3, "schedule": "gpipe", "plan": {"replicas": [1, 2]}}),
}


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_activations_that_stay(name: str, copies: list[int]) -> None:
    make, options = CASES[name]
    torch.manual_seed(0)
    model = make()
    wanted = trained(model, "never", **options)
    assert not copies
    found = trained(model, "always", **options)
    alike(found, wanted)
    assert sum(copies) > 0


OWN = """
0: 0F0 0H0 0F1 0F2 0H1 0F3 0G0 0B0 0G1 0B1 0B2 0B3
1: 1F0 1B0 1F1 1B1 1F2 1B2 1F3 1B3
"""


def test_a_grid_says_what_is_offloaded(copies: list[int]) -> None:
    torch.manual_seed(0)
    model = Net()
    wanted = trained(model, "never", microbatches=4, schedule=re.sub(r"\d[HG]\d ", "", OWN))
    assert not copies
    found = trained(model, "never", microbatches=4, schedule=OWN)
    alike(found, wanted)
    assert len(copies) == 2 * 3
    moved = [i for i in found["program"].ranks[0] if isinstance(i, Offload | Fetch)]
    assert " ".join(map(str, moved)) == "0H0 0H1 0G0 0G1"


def test_evaluation_copies_nothing(copies: list[int]) -> None:
    torch.manual_seed(0)
    pipe = pipecompile.compile(Net(), ["cpu"] * 2, microbatches=6, costs="count", plan=PlanOptions(offload="always"))
    with torch.no_grad():
        pipe(torch.randn(ROWS, WIDTH))
    assert any(isinstance(i, Offload) for i in pipe.pipeline.program.instructions)
    assert not copies


def test_hooks_of_the_user_see_what_is_saved_and_nothing_is_offloaded(copies: list[int]) -> None:
    torch.manual_seed(0)
    model = Net()
    wanted = trained(model, "never", schedule="gpipe")
    seen: list[Tensor] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t)
    found = trained(model, "always", schedule="gpipe", context=lambda: hooks)
    alike(found, wanted)
    assert seen
    assert not copies


class Fails(nn.Module):
    """Fails in its backward, the last of the first stage, if it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.net(Bad.apply(x * self.net.layers[0][0].bias), y)


def test_a_failure_in_between_leaves_nothing(monkeypatch: pytest.MonkeyPatch, copies: list[int]) -> None:
    torch.manual_seed(0)
    pipe = pipecompile.compile(
        Fails(), ["cpu"] * 2, schedule="gpipe", microbatches=6, costs="count", plan=PlanOptions(offload="always")
    )
    x, y = torch.randn(ROWS, WIDTH), torch.randn(ROWS, WIDTH)
    pipe(x, y).backward()
    wanted = {name: p.grad.clone() for name, p in pipe.named_parameters() if p.grad is not None}
    pipe.zero_grad()
    monkeypatch.setattr(Bad, "fails", True)
    made: list[weakref.ref[Kept]] = []
    create = Kept.__init__
    monkeypatch.setattr(Kept, "__init__", lambda self: (made.append(weakref.ref(self)), create(self))[1])
    with pytest.raises(ExecutionError, match="on purpose"):
        pipe(x, y)
    gc.collect()
    assert made
    assert not any(kept() for kept in made)
    monkeypatch.setattr(Bad, "fails", False)
    pipe(x, y).backward()
    for name, gradient in wanted.items():
        assert torch.equal(gradient, dict(pipe.named_parameters())[name].grad), name


def test_storages_leave_once_and_weights_stay(copies: list[int]) -> None:
    lane = lanes.Lane(torch.device("cpu"))
    weight = torch.randn(4, 4, requires_grad=True)
    kept, x = Kept(), torch.randn(5, 4)
    with kept.watched():
        base = (x @ weight).exp()  # saves x, a view of the weight, and its result
        out = base[1:] * base[:-1] * 2.0  # two views of the result
    nbytes = base.nbytes
    del base
    leaving = kept.leave(lane, {weight.untyped_storage().data_ptr(), x.untyped_storage().data_ptr()})
    assert copies == [nbytes]
    leaving.end(lane)
    kept.come_back(lane)
    (gradient,) = torch.autograd.grad(out.sum(), weight)
    again = (x @ weight).exp()
    (wanted,) = torch.autograd.grad((again[1:] * again[:-1] * 2.0).sum(), weight)
    assert torch.equal(gradient, wanted)


def test_what_others_hold_stays(copies: list[int]) -> None:
    lane = lanes.Lane(torch.device("cpu"))
    kept, x = Kept(), torch.randn(5, 4, requires_grad=True)
    with kept.watched():
        held = x.exp()
        out = held * 2.0
    kept.leave(lane, {x.untyped_storage().data_ptr()}).end(lane)
    assert copies == [0]
    held.detach().mul_(3.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_a_tensor_that_was_written_since_it_was_saved_is_refused() -> None:
    lane = lanes.Lane(torch.device("cpu"))
    kept, x = Kept(), torch.randn(5, 4, requires_grad=True)
    with kept.watched():
        y = x.exp()
    y.detach().mul_(3.0)
    with pytest.raises(RuntimeError, match=r"\[5, 4\] is at version 1; expected version 0"):
        kept.leave(lane, set())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_schedules_that_keep_the_pipeline_full_are_refused() -> None:
    with pytest.raises(InputError, match="offload='always' does not work with schedules that step inside"):
        pipecompile.compile(
            Net(), ["cpu"] * 2, schedule="pipedream", optimizer=torch.optim.SGD, plan=PlanOptions(offload="always")
        )(torch.randn(4, WIDTH), torch.randn(4, WIDTH))


def test_offload_and_recomputation_of_everything_exclude_each_other() -> None:
    with pytest.raises(InputError, match="exclude each other"):
        PlanOptions(offload="always", recompute="always")


def test_a_broken_grid_is_refused_by_compile() -> None:
    with pytest.raises(ProgramError, match="0G0 is too near to 0H0"):
        trained(
            Net(), "never", microbatches=4, schedule=OWN.replace("0H0 0F1 0F2", "0F1 0F2").replace("0G0", "0H0 0G0")
        )


EDITS = 40


@pytest.mark.parametrize("seed", some(range(EDITS), 3))
def test_a_program_edited_at_random_is_exact_or_refused(seed: int) -> None:
    """Offloads and Fetches are put anywhere, left out or doubled; none hangs."""
    draw = random.Random(seed)
    rows = [line.split(":")[1].split() for line in OWN.strip().splitlines()]
    for _ in range(draw.randint(1, 3)):
        row = draw.choice(rows)
        word = f"{draw.randrange(2)}{draw.choice('HG')}{draw.randrange(4)}"
        place = draw.randrange(len(row) + 1)
        match draw.randrange(3):
            case 0:
                row.insert(place, word)
            case 1:
                row.insert(place, row.pop(draw.randrange(len(row))))
            case 2:
                stage, k = word[0], word[2]
                row.insert(row.index(f"{stage}F{k}") + 1 if f"{stage}F{k}" in row else place, f"{stage}H{k}")
                row.insert(row.index(f"{stage}B{k}") if f"{stage}B{k}" in row else place, f"{stage}G{k}")
    text = "\n".join(f"{rank}: {' '.join(row)}" for rank, row in enumerate(rows))
    torch.manual_seed(0)
    model = Net()
    try:
        Program.parse(text, Plan.chain(2)).validate()
    except ProgramError:
        with pytest.raises(ProgramError):
            trained(model, "never", microbatches=4, schedule=text)
        return
    wanted = trained(model, "never", microbatches=4, schedule=re.sub(r"\d[HG]\d", "", text))
    alike(trained(model, "never", microbatches=4, schedule=text), wanted)
