"""``pipecompile simulate``: a step of stages that are read from a file."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from costed import gpt2, unet
from typer.testing import CliRunner, Result

from pipecompile.cli import costed_model
from pipecompile.cli.main import app
from pipecompile.ir.graph import CostedGraph

EQUAL = "stage,forward,backward,parameter_bytes,saved_bytes\n" + "".join(f"{s},1,2,1024,4096\n" for s in range(4))


def run(*words: object) -> Result:
    return CliRunner(env={"COLUMNS": "100", "NO_COLOR": "1"}).invoke(app, list(map(str, words)))


def facts(*words: object) -> dict[str, Any]:
    result = run(*words, "--json")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "stages.csv"
    path.write_text(EQUAL)
    return path


@cache
def plan_of(make: Callable[..., CostedGraph], *words: str) -> str:
    """What ``plan --json`` prints of a graph made by hand."""
    costed = make() if make is unet else make(layers=4, width=48, words=600)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(costed_model, "captured", lambda *_, **__: None)
        patch.setattr(costed_model, "topics", lambda _: {"guards": ["s0 = 8"]})
        patch.setattr(costed_model, "costed", lambda *_: costed)
        result = run("plan", "any:thing", "--microbatches", 5, "--json", *words)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture
def planned(tmp_path: Path) -> Path:
    """A plan of a graph like GPT-2's, with a tied parameter."""
    path = tmp_path / "plan.json"
    path.write_text(plan_of(gpt2, "--cluster", "4xA10G"))
    return path


def test_equal_stages_have_the_known_makespan_bubble_and_peaks(table: Path) -> None:
    it = facts("simulate", table, "-m", 8)
    assert it["schedule"] == "1f1b"
    assert it["seconds"] == (1 + 2) * (8 + 4 - 1)
    assert it["bubble"] == pytest.approx(3 / 11)
    assert [rank["peak_bytes"] for rank in it["ranks"]] == [1024 + 4096 * kept for kept in (4, 3, 2, 1)]
    assert [rank["peak_bytes"] for rank in facts("simulate", table, "-m", 8, "-s", "gpipe")["ranks"]] == [33792] * 4
    assert it["ranks"][3]["program"][:4] == ["3F0", "3B0", "3F1", "3B1"]
    assert len(it["spans"]) == 2 * 4 * 8


def test_the_program_is_printed_where_it_is_asked_for(table: Path) -> None:
    line = "3: 3F0 3B0 3F1 3B1"
    assert line not in run("simulate", table, "-m", 2).stdout
    assert line in run("simulate", table, "-m", 2, "--program").stdout


def test_transfers_take_time(tmp_path: Path) -> None:
    path = tmp_path / "two.csv"
    path.write_text("forward,backward,bytes_out\n1,1,500\n1,1,0\n")
    step = ("simulate", path, "-m", 1)
    assert facts(*step)["seconds"] == 4
    assert facts(*step, "--bandwidth", 1000, "--latency", 0.25)["seconds"] == 4 + 2 * (0.25 + 0.5)
    assert 4 < facts(*step, "--cluster", "2xH100")["seconds"] < 4.001


def test_a_plan_is_simulated_as_plan_predicts_it(planned: Path) -> None:
    plan, it = json.loads(planned.read_text()), facts("simulate", planned)
    assert plan["tied"]
    assert (it["schedule"], it["stages"], it["microbatches"]) == ("1f1b", 4, 5)
    assert it["seconds"] == plan["step"]["seconds"] > 0
    assert it["bubble"] == plan["step"]["bubble"]
    other = facts("simulate", planned, "-s", "gpipe", "-m", 2)
    assert (other["schedule"], other["microbatches"]) == ("gpipe", 2)


@pytest.mark.parametrize("where", [("--cluster", "2xA10G"), ("--stages", "2")])
def test_split_backwards_are_simulated_as_plan_predicts_them(planned: Path, where: tuple[str, ...]) -> None:
    text = plan_of(gpt2, "--schedule", "zb-h1", *where)
    planned.write_text(text)
    split = json.loads(text)["stages"][0]["split"]
    assert split["weights"] > 0
    assert facts("simulate", planned)["seconds"] == json.loads(text)["step"]["seconds"]
    assert facts("simulate", planned, "--weight-part", 0.5)["seconds"] != json.loads(text)["step"]["seconds"]
    planned.write_text(text.replace('"weights":', '"weight":'))
    assert "has no 'weights'" in run("simulate", planned).stderr
    negative = json.loads(text)
    negative["stages"][0]["split"] = {"forward": 1.0, "backward": -1.0, "weights": 2.0}
    planned.write_text(json.dumps(negative))
    assert "of stage 0, split, takes 1.0 s and -1.0 s" in run("simulate", planned).stderr.replace("\n", " ")


def test_values_that_skip_stages_are_sent_directly(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(plan_of(unet, "--cluster", "4xA10G"))
    plan = json.loads(path.read_text())
    assert any(channel["target"] - channel["source"] > 1 for channel in plan["channels"])
    assert facts("simulate", path)["seconds"] == plan["step"]["seconds"]


def test_replicas_are_simulated_as_plan_predicts_them(planned: Path) -> None:
    text = plan_of(gpt2, "--replicas", "1,2,1")
    planned.write_text(text)
    assert facts("simulate", planned)["seconds"] == json.loads(text)["step"]["seconds"]


def test_several_stages_on_each_rank_and_orders_from_files(table: Path, tmp_path: Path) -> None:
    it = facts("simulate", table, "-s", "zb-v", "-m", 3)
    assert [rank["stages"] for rank in it["ranks"]] == [[0, 3], [1, 2]]
    order = tmp_path / "mine.txt"
    order.write_text("F0 B0\n" * 4)
    assert facts("simulate", table, "-s", order)["seconds"] == 4 * 3
    assert run("simulate", table, "-s", order, "--csv", tmp_path / "out.csv").exit_code == 0
    assert (tmp_path / "out.csv").read_text().splitlines()[0] == "0F0,0B0"


def test_the_drawing_shows_ranks_and_peaks(table: Path) -> None:
    text = run("simulate", table).stdout
    assert "rank 3" in text
    assert "peak" in text
    assert "17 KiB" in text
    assert "bubble 27.3 %" in text


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("none.csv", None, "cannot read"),
        ("it.txt", "", "is neither .json nor .csv; it must be"),
        ("it.csv", "", "needs a first line with the columns forward,backward"),
        ("it.csv", "forward,backward\n", "needs a first line with the columns forward,backward"),
        ("it.csv", "stage,forward\n0,1\n", "needs a first line with the columns forward,backward"),
        ("it.csv", "forward,backward,flops\n1,1,1\n", "columns that are not known: flops"),
        ("it.csv", "forward,backward\n1,-1\n", "backward of stage 0 is '-1'; it must be a finite number"),
        ("it.csv", "forward,backward\n1,2\nfast,2\n", "forward of stage 1 is 'fast'"),
        ("it.csv", "forward,backward\n1,2\n1,2,3\n", "row 1 has more cells than columns"),
        ("it.csv", "stage,forward,backward\n1,1,1\n", "row 0 is for stage 1; rows must be in the order"),
        ("it.csv", "forward,backward,bytes_out\n1,1,5\n", "the last stage has bytes_out"),
        ("it.json", "{", "is not a plan: "),
        ("it.json", "[]", "is not a plan: "),
        ("it.json", "{}", "it.json has no 'stages'; use what `pipecompile plan --json` printed"),
    ],
)
def test_a_file_that_is_not_of_stages_is_refused(tmp_path: Path, name: str, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    result = run("simulate", tmp_path / name)
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda it: it["stages"][0].update(forward=-1.0), "node of stage 0 takes -1.0 s"),
        (lambda it: it["stages"][0].update(forward="1"), "is not a plan: "),
        (lambda it: it["channels"].append({"source": 2, "target": 1, "bytes": 0}), "is not a plan: "),
        (lambda it: it["cluster"].update(devices=[]), "is not a plan: "),
        (lambda it: it.pop("cluster"), "has no 'cluster'"),
    ],
)
def test_a_plan_that_was_edited_badly_is_refused(planned: Path, change: Any, message: str) -> None:
    it = json.loads(planned.read_text())
    change(it)
    planned.write_text(json.dumps(it))
    result = run("simulate", planned)
    assert result.exit_code == 2, result.output
    assert message in result.stderr


def test_a_schedule_for_other_stages_is_refused(table: Path, planned: Path, tmp_path: Path) -> None:
    order = tmp_path / "two.txt"
    order.write_text("F0 B0\n" * 2)
    assert "is an order of 2 stages, but there are 4" in run("simulate", table, "-s", order).stderr
    four = tmp_path / "four.txt"
    four.write_text("F0 B0\n" * 4)
    assert "is simulated for a chain of stages only" in run("simulate", planned, "-s", four).stderr
    assert json.loads(run("simulate", planned, "-s", "zb-v", "--json").stdout)["ranks"][0]["stages"] == [0, 3]
    assert "schedule 'zigzag' is not known" in run("simulate", table, "-s", "zigzag").stderr
