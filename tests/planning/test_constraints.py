"""What the user asks of a plan reaches it, from ``compile`` and from the command line."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import pipecompile
from pipecompile.cli.main import app
from pipecompile.errors import InfeasibleError, InputError
from pipecompile.ir.plan import members


class Tower(nn.Module):
    """Six equal layers and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(6))
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def piped(stages: int = 3, **options: object) -> Any:
    torch.manual_seed(0)
    return pipecompile.compile(Tower().double(), ["cpu"] * stages, microbatches=2, costs="count", **options)  # type: ignore[arg-type]


def stages_of(pipe: Any, path: str) -> set[int]:
    """The stages in which a module's nodes are."""
    graph = pipe.pipeline._capture_in_use.graph
    found = [
        stage
        for stage in range(pipe.pipeline.plan.num_stages)
        for index in members(graph, pipe.pipeline.plan, stage)
        if graph.nodes[index].path.split(".")[: len(path.split("."))] == path.split(".")
    ]
    assert found, path
    return set(found)


def test_constraints_are_kept_and_the_step_is_exact() -> None:
    pipe = piped(
        plan=pipecompile.PlanOptions(
            pins={"layers.0": 0, "layers.1": 1}, no_split=["layers.2"], colocate=[["layers.3", "head"]]
        )
    )
    unsplit = deepcopy(pipe.pipeline.model)
    x = torch.randn(5, 8, dtype=torch.float64)
    pipe(x).square().mean().backward()
    unsplit(x).square().mean().backward()
    for (name, mine), other in zip(pipe.named_parameters(), unsplit.parameters(), strict=True):
        assert mine.grad is not None
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-10, atol=1e-13, msg=lambda m, n=name: f"{n}: {m}")
    assert stages_of(pipe, "layers.0") == {0}
    assert stages_of(pipe, "layers.1") == {1}
    assert len(stages_of(pipe, "layers.2")) == 1
    assert stages_of(pipe, "layers.3") == stages_of(pipe, "head")


def test_fewer_stages_than_devices_train() -> None:
    pipe = piped(plan=pipecompile.PlanOptions(max_stages=2, pins={"layers.0": 0, "layers.5": 1}))
    unsplit = deepcopy(pipe.pipeline.model)
    x = torch.randn(4, 8, dtype=torch.float64)
    pipe(x).sum().backward()
    unsplit(x).sum().backward()
    assert pipe.pipeline.plan.num_stages == 2
    for mine, other in zip(pipe.parameters(), unsplit.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-10, atol=1e-13)


def test_a_plan_says_how_good_it_is() -> None:
    pipe = piped(plan=pipecompile.PlanOptions(search_seconds=2.0))
    pipe.pipeline.prepare(torch.randn(4, 8, dtype=torch.float64))
    assert pipe.pipeline.plan.quality is not None
    assert pipe.pipeline.plan.quality.proven
    assert str(pipe.pipeline.plan.quality) in str(pipe.pipeline.plan)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"pins": {"layer.0": 0}}, InputError, r"'layer.0'.*did you mean 'layers.0'"),
        ({"pins": {"layers.0": 2, "layers.5": 0}}, InfeasibleError, r"layers"),
        ({"pins": {"head": 0}, "replicas": "auto"}, InputError, r"replicas='auto' searches the number of stages"),
        ({"max_stages": 2, "replicas": [2, 1]}, InputError, r"use only one of them"),
        ({"no_split": "layers.0"}, InputError, r"no_split is 'layers.0'; it must be a list of module paths"),
    ],
)
def test_constraints_that_cannot_be(options: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        piped(plan=pipecompile.PlanOptions(**options)).pipeline.prepare(torch.randn(4, 8, dtype=torch.float64))


def test_a_search_takes_some_time() -> None:
    with pytest.raises(InputError, match=r"search_seconds=0; it must be a positive number of CPU seconds"):
        piped(plan=pipecompile.PlanOptions(search_seconds=0))


def test_the_command_line_takes_constraints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "towers.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def make():\n"
        "    return nn.Sequential(*(nn.Linear(8, 8) for _ in range(6))), torch.randn(4, 8)\n"
    )
    monkeypatch.chdir(tmp_path)
    command = ["plan", "towers.py:make", "--stages", "2", "--costs", "count", "--json"]
    plain = CliRunner().invoke(app, command)
    pinned = CliRunner().invoke(
        app, [*command, "--pin", "1=1", "--no-split", "0", "--colocate", "3,5", "--search-seconds", "5"]
    )
    assert plain.exit_code == pinned.exit_code == 0, pinned.output
    assert plain.stdout != pinned.stdout
    wrong = CliRunner().invoke(app, [*command, "--pin", "1"])
    assert wrong.exit_code == 2
    assert "--pin 1 does not end in =number; write name=number" in wrong.stderr
