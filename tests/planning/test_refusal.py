"""The error that no plan fits names what would help, and with each remedy that it promises the model fits."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pipecompile
from pipecompile.errors import InfeasibleError, PlanError
from pipecompile.ir.cluster import Cluster, Device
from pipecompile.ir.graph import CostedGraph
from pipecompile.ir.plan_options import PlanOptions
from pipecompile.ir.units import bytes_text
from pipecompile.planning import refusal
from pipecompile.planning.plan_search import make_plan
from pipecompile.planning.search_spec import Request
from pipecompile.planning.training_spec import Workload
from pipecompile.schedule import SCHEDULES

WIDTH = 16
REQUEST = Request((1, 1), PlanOptions(search_seconds=0.1))
WIDE = (4096, 64, 6)  # classes, rows, layers: its logits are the largest of its tensors
DEEP = (4, 8192, 12)  # its hidden values are
BOTH = (16, 8192, 24)


class Model(nn.Module):
    def __init__(self, classes: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(layers))
        self.head = nn.Linear(WIDTH, classes)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        logits = self.head(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


@cache
def costed(classes: int, rows: int, layers: int, outputs: str) -> CostedGraph:
    inputs = {"x": torch.randn(rows, WIDTH), "labels": torch.randint(classes, (rows,))}
    pipe = pipecompile.compile(
        Model(classes, layers), ["cpu"] * 2, microbatches=8, costs="count", example_inputs=inputs, outputs=outputs
    )
    return pipe.pipeline.costs


def largest(
    memory: int | None, shape: Any, outputs: str = "all", schedule: str = "1f1b", recompute: Any = "auto"
) -> int:
    """The bytes of the fullest of two devices in the plan within so much memory."""
    work = Workload(SCHEDULES[schedule].steady, 8, recompute=recompute)
    model, cluster = costed(*shape, outputs), Cluster((Device("cpu", memory=memory),) * 2)
    return max(work.memory(model, make_plan(model, REQUEST, cluster, work), cluster, bound=True).ranks)


def message(memory: int, shape: Any, kind: type[Exception] = PlanError, **options: Any) -> str:
    with pytest.raises(kind) as caught:
        largest(memory, shape, **options)
    return str(caught.value)


def remedies(text: str) -> list[str]:
    """The changes that are said to be enough."""
    assert "it would fit with " in text, text
    said = text.partition("it would fit with ")[2]
    return [re.sub(r" \([^()]* on the fullest device\)", "", it) for it in said.split(", or with ")]


def test_logits_that_are_kept_are_named_and_without_them_it_fits() -> None:
    room = (largest(None, WIDE) + largest(None, WIDE, "loss")) // 2
    text = message(room, WIDE)
    assert "outputs='loss'" in remedies(text)
    held = largest(room, WIDE, "loss")
    assert held <= room
    assert f"outputs='loss' ({bytes_text(held)} on the fullest device)" in text
    assert "outputs='loss'" not in message(largest(None, WIDE, "loss") // 2, WIDE, outputs="loss")


def test_recomputation_is_named_where_it_is_not_allowed() -> None:
    room = int(1.2 * largest(None, DEEP, schedule="gpipe", recompute="always"))
    assert "recompute='auto'" in remedies(message(room, DEEP, schedule="gpipe", recompute="never"))
    assert largest(room, DEEP, schedule="gpipe") <= room


def test_a_schedule_with_fewer_microbatches_in_flight_is_named() -> None:
    room = (largest(None, DEEP, schedule="gpipe", recompute="never") + largest(None, DEEP, recompute="never")) // 2
    text = message(room, DEEP, schedule="gpipe", recompute="never")
    assert "schedule='1f1b' with the loss inside the pipeline (labels or loss_fn=)" in remedies(text)
    assert largest(room, DEEP, recompute="never") <= room
    assert "schedule='1f1b'" not in message(room // 4, DEEP, recompute="never")


def test_what_is_not_enough_alone_is_tried_together() -> None:
    room = int(1.1 * largest(None, BOTH, "loss", recompute="always"))
    assert "outputs='loss' and recompute='auto'" in remedies(message(room, BOTH, recompute="never"))
    assert largest(room, BOTH, "loss") <= room


def test_where_nothing_is_enough_it_says_what_helps_a_little() -> None:
    text = message(1000, WIDE, InfeasibleError)
    assert "use devices with more memory; not enough alone: outputs='loss' (" in text


def test_of_a_large_program_it_is_said_that_nothing_else_was_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refusal, "TRIED", 15)
    with pytest.raises(PlanError, match="use devices with more memory; other options were not tried for a program of"):
        largest(1000, WIDE)


def test_a_model_of_few_parts_is_refused_for_its_memory_and_not_for_the_remedies_that_it_has_no_parts_for() -> None:
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(3)))
    cluster = Cluster((Device("cpu", memory=20_000),) * 2)
    with pytest.raises(PlanError, match="the model does not fit into the memory of its devices: ") as caught:
        pipecompile.compile(
            model, ["cpu"] * 2, microbatches=2, costs="count", example_inputs=torch.randn(8, 64), cluster=cluster
        )
    assert "cannot be cut into" not in str(caught.value)
