"""``pipecompile profile``: costs by module and by node."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from costed import gpt2
from typer.testing import CliRunner, Result

from pipecompile.cli import costed_model
from pipecompile.cli.main import app
from pipecompile.cli.module_costs import by_module, by_node
from pipecompile.ir.graph import CostedGraph

COSTED = gpt2(layers=3, width=48, words=600)

NETS = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(3))
        self.head = nn.Linear(64, 2)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x).square().mean()

def make():
    return Net(), torch.ones(4, 64)
"""


def run(*words: object) -> Result:
    return CliRunner(env={"COLUMNS": "100", "NO_COLOR": "1"}).invoke(app, ["profile", *map(str, words)])


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plain_nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.fixture
def costed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costed_model, "captured", lambda *_, **__: None)
    monkeypatch.setattr(costed_model, "costed", lambda *_: COSTED)


@pytest.mark.parametrize("depth", [None, 0, 1, 2, 3, 9])
def test_modules_and_nodes_have_the_costs_of_the_model(depth: int | None) -> None:
    for rows in (by_module(COSTED, depth), by_node(COSTED)):
        assert sum(row.nodes for row in rows) == sum(node.op != "input" for node in COSTED.graph.nodes)
        assert sum(row.cost.seconds for row in rows) == pytest.approx(COSTED.seconds)
        assert sum(row.cost.saved_bytes for row in rows) == sum(cost.saved_bytes for cost in COSTED.costs)


def test_a_module_is_named_by_its_path_up_to_its_number() -> None:
    names = [row.name for row in by_module(COSTED)]
    assert [name for name in names if ".h." in name] == [f"transformer.h.{layer}" for layer in range(3)]
    assert len(names) == len(set(names))
    assert [row.name for row in by_module(COSTED, 0)] == ["(model)"]
    assert "transformer.h.0.attn" in [row.name for row in by_module(COSTED, 4)]


def test_a_tied_parameter_counts_in_each_row_and_once_in_all(costed: None) -> None:
    readers = [row for row in by_module(COSTED) if row.name in ("transformer.wte", "lm_head")]
    assert [row.num_parameters for row in readers] == [600 * 48] * 2
    it = json.loads(run("any:thing", "--json").stdout)
    assert sum(row["num_parameters"] for row in it["rows"]) > sum(
        size.spec.nbytes // 4 for size in COSTED.graph.parameters
    )
    last = run("any:thing").stdout.splitlines()[-2].split() or run("any:thing").stdout.splitlines()[-3].split()
    assert last[0] == "all"


def test_json_and_table_say_the_same(costed: None) -> None:
    it = json.loads(run("any:thing", "--nodes", "--json").stdout)
    assert [row["name"] for row in it["rows"]] == [n.name for n in COSTED.graph.nodes if n.op != "input"]
    assert it["seconds"] == pytest.approx(COSTED.seconds)
    assert it["rows"][0].keys() == {
        "name", "op", "output_bytes", "num_parameters", "forward", "backward", "parameter_bytes", "saved_bytes",
    }  # fmt: skip
    assert [line for line in run("any:thing", "--nodes").stdout.splitlines() if it["rows"][5]["name"] in line]


def test_a_model_is_measured_and_its_costs_are_saved(nets: None, tmp_path: Path) -> None:
    result = run("plain_nets.py:make", "--save", tmp_path / "costs.json", "--json")
    assert result.exit_code == 0, result.output
    it: dict[str, Any] = json.loads(result.stdout)
    assert it["measured"] is True
    assert it["costs"].startswith("measured: cpu")
    assert (it["model"], it["inputs"]) == ("Net", ["x: float32[4, 64]"])
    assert [row["name"] for row in it["rows"]] == ["layers.0", "layers.1", "layers.2", "head", "(model)"]
    assert [row["num_parameters"] for row in it["rows"]] == [64 * 65] * 3 + [65 * 2, 0]
    assert all(row["forward"] > 0 and row["backward"] > 0 for row in it["rows"])
    assert CostedGraph.load(tmp_path / "costs.json").seconds == it["seconds"]
    assert "wrote" in result.stderr
    planned = CliRunner().invoke(app, ["plan", "plain_nets.py:make", "--costs", str(tmp_path / "costs.json"), "--json"])
    assert json.loads(planned.stdout)["costs"] == it["costs"]


def test_a_model_is_counted_for_a_device_that_is_not_here(nets: None) -> None:
    it = json.loads(run("plain_nets.py:make", "--count", "h100", "--json").stdout)
    assert (it["measured"], it["costs"]) == (False, "counted: H100")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--nodes --depth 1", "--nodes and --depth exclude each other"),
        ("--count Z80", "'Z80' is not a known kind of device; use one of"),
        ("--dtype int8", "dtype 'int8' is not known; it must be one of float32"),
        ("--microbatch 5", "--microbatch 5 is more than the 4 samples"),
        ("--save no/costs.json --count H100", "cannot write no/costs.json"),
    ],
)
def test_bad_input_is_refused(nets: None, words: str, message: str) -> None:
    result = run("plain_nets.py:make", *words.split())
    assert result.exit_code == 2, result.output
    assert message in result.stderr
