"""Programs of all schedules, edited at random, run: each is refused before it runs, or its gradients are exact."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from random import Random
from typing import Any

import pytest
import torch
from long import LONG
from torch import Tensor, nn
from torch.nn import functional as F

import pipecompile
from pipecompile import PlanOptions
from pipecompile.errors import ProgramError
from pipecompile.ir.instruction import (
    Backward,
    BackwardWeight,
    Compute,
    Copy,
    Fetch,
    Forward,
    Instruction,
    Offload,
    Reduce,
    Refresh,
    Step,
    Update,
)
from pipecompile.ir.program import Program
from pipecompile.planning import memory_fit
from pipecompile.runtime import lane as lanes
from pipecompile.runtime.batch import Batch

WIDTH, MICROBATCHES = 4, 4
EDITED = 40 if LONG else 10  # programs of each case
KINDS: tuple[type[Compute | Copy], ...] = (
    Forward, Backward, BackwardWeight, Offload, Fetch, Reduce, Step, Update, Refresh,
)  # fmt: skip
OFFLOADED, REPLICAS = PlanOptions(offload="always"), PlanOptions(replicas=[1, 2])
CASES: Mapping[str, dict[str, Any]] = {
    "sequential": {},
    "gpipe": {},
    "1f1b": {},
    "bfs": {},
    "interleaved-1f1b": {},
    "zb-h1": {},
    "zb-v": {},
    "dualpipe-v": {},
    "gpipe, replicas": {"plan": REPLICAS, "ranks": 3},
    "1f1b, replicas": {"plan": REPLICAS, "ranks": 3},
    "sequential, replicas": {"plan": PlanOptions(replicas=[2])},
    "1f1b, offloaded": {"plan": OFFLOADED},
    "zb-v, offloaded": {"plan": OFFLOADED},
    "gpipe, replicas, offloaded": {"plan": replace(REPLICAS, offload="always"), "ranks": 3},
}


class Net(nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(4))
        self.head = nn.Linear(WIDTH, WIDTH)
        if tied:
            self.head.weight = self.layers[0][0].weight

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        out = self.head(x)
        return out if y is None else F.mse_loss(out, y)


def edited(program: Program, draw: Random) -> Program:
    """The program with one to three instructions in other places, left out, doubled, added, or exchanged for others."""
    rows = [list(row) for row in program.ranks]
    stages = range(program.plan.num_stages)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        row = draw.choice([row for row in rows if row] or rows)
        if not row:
            break
        at, other = draw.randrange(len(row)), draw.choice(rows)
        old: Any = row[at]
        new = draw.choice(KINDS)(draw.choice(stages), draw.randrange(MICROBATCHES + 1))
        match draw.randrange(9):
            case 0:
                row.insert(draw.randrange(len(row)), row.pop(at))
            case 1:
                there = draw.randrange(len(row))
                row[at], row[there] = row[there], row[at]
            case 2:
                row.pop(at)
            case 3:
                row.insert(draw.randrange(len(row)), old)
            case 4:
                row.insert(at, new)
            case 5:
                row[at] = type(new)(old.stage, old.microbatch)
            case 6:
                row[at] = type(old)(*draw.choice(((new.stage, old.microbatch), (old.stage, new.microbatch))))
            case 7:
                other.insert(draw.randrange(len(other) + 1), row.pop(at))
            case 8:  # all of a microbatch in a stage
                for each in rows:
                    each[:] = [i for i in each if (i.stage, _number(i)) != (old.stage, _number(old))]
    return replace(program, ranks=tuple(map(tuple, rows)))


def _number(i: Instruction) -> int:
    assert isinstance(i, KINDS), "a bare program has no transfers"
    return i.microbatch


@pytest.mark.parametrize(
    ("case", "loss"),
    [
        *((case, "inside") for case in CASES),
        *((case, "outside") for case in (CASES if LONG else ("1f1b", "gpipe, replicas, offloaded"))),
    ],
)
def test_a_program_edited_at_random_is_refused_or_exact(case: str, loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes.Lane, "offloads", True)
    monkeypatch.setattr(memory_fit, "offloading", lambda plan, _: replace(plan, offloaded=(*range(plan.num_stages),)))
    draw, made, exact = Random(case + loss), Batch.program, 0
    torch.manual_seed(0)
    model = Net(tied=len(case) % 2 == 1).double()
    x, y = torch.randn(2 * MICROBATCHES, WIDTH).double(), torch.randn(2 * MICROBATCHES, WIDTH).double()
    unsplit = copy.deepcopy(model)
    unsplit(x, y).backward()
    options = {"schedule": case.partition(",")[0], "costs": "count", "verify": "never", **CASES[case]}
    ranks = options.pop("ranks", 2)
    pipe = pipecompile.compile(model, ["cpu"] * ranks, microbatches=MICROBATCHES, **options)

    def program(batch: Batch, kind: str, schedule: Any, shares: bool = False) -> Program:
        batch.compiled.programs.clear()
        return made(batch, kind, lambda plan, count: edited(schedule(plan, count), draw), shares)

    monkeypatch.setattr(Batch, "program", program)
    for _ in range(EDITED):
        pipe.zero_grad()
        try:
            value = pipe(x, y) if loss == "inside" else F.mse_loss(pipe(x), y)
            value.backward()
        except ProgramError:
            continue
        exact += 1
        for (name, one), other in zip(model.named_parameters(), unsplit.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-10, atol=1e-12, msg=name)
    assert exact < EDITED
