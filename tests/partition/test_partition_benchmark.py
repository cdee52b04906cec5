import json
import runpy
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "partition.py"


def node(index: int, seconds: float, backward: bool = False, colour: int = 0, size: float = 1.0) -> dict:
    return {
        "id": index, "fpgaLatency": seconds, "cpuLatency": 0.0, "size": size, "supportedOnFpga": 1,
        "isBackwardNode": int(backward), "colorClass": colour,
    }  # fmt: skip


def edge(source: int, target: int, cost: float) -> dict:
    return {"sourceId": source, "destId": target, "cost": cost}


TRAINING = {
    "maxSizePerFPGA": 4.0,
    "nodes": [node(10, 1.0, colour=1), node(20, 2.0, colour=2), node(21, 4.0, True, 2), node(11, 2.0, True, 1)],
    "edges": [edge(10, 20, 0.5), edge(20, 21, 0.0), edge(21, 11, 0.25)],
}


@pytest.fixture
def main(monkeypatch):
    """The script's main function in this process."""
    monkeypatch.syspath_prepend(SCRIPT.parent)
    script = runpy.run_path(str(SCRIPT))["main"]

    def call(*arguments: str | Path) -> str | None:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
        try:
            script()
        except SystemExit as end:
            return end.code
        return None

    return call


def test_a_training_graph_keeps_both_directions_together_and_pays_both_crossings(tmp_path, main, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "small.json").write_text(json.dumps(TRAINING))
    (tmp_path / "optima.csv").write_text("instance,stages,optimum\nsmall,2,6.75\n")
    options = ("--optima", tmp_path / "optima.csv", "--json", tmp_path / "o")
    assert main("--instances", tmp_path / "in", "--stages", "1,2", *options) is None
    one, two = json.loads((tmp_path / "o").read_text())
    assert (one["load"], one["proven"]) == (9.0, True)
    assert (two["load"], two["lower_bound"], two["proven"]) == (6.75, 6.75, True)
    assert two["stage_of"] == {"10": 0, "11": 0, "20": 1, "21": 1}
    assert "1.000000" in capsys.readouterr().out


def test_what_does_not_fit_is_a_row_and_not_a_crash(tmp_path, main, capsys):
    (tmp_path / "tight.json").write_text(json.dumps(TRAINING | {"maxSizePerFPGA": 1.5}))
    assert main("--instances", tmp_path, "--stages", "2", "--json", tmp_path / "out" / "rows") is None
    (row,) = json.loads((tmp_path / "out" / "rows").read_text())
    assert (row["load"], row["stage_of"], row["proven"]) == (None, None, True)
    assert "infeasible" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("{", "is not an instance"),
        (json.dumps({"nodes": [], "edges": [edge(1, 2, 1.0)]}), "is not an instance"),
        (json.dumps(TRAINING | {"edges": [edge(10, 20, 1.0), edge(10, 21, 2.0)]}), "two costs"),
    ],
)
def test_a_bad_file_is_named_in_one_line(tmp_path, main, text, what):
    (tmp_path / "bad.json").write_text(text)
    said = main("--instances", tmp_path, "--stages", "2")  # what sys.exit prints before it ends with 1
    assert isinstance(said, str)
    assert what in said
    assert "bad" in said
    assert len(said.splitlines()) == 1
