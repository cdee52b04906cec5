"""Results on stdout, everything else on stderr; figures whole at every width; completion."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import typer
from costed import gpt2
from typer.testing import CliRunner, Result

import pipecompile
from pipecompile import __main__ as entry
from pipecompile.cli import costed_model, timeline_output
from pipecompile.cli.main import app

MODEL = """
import torch, warnings
from torch import nn

def make():
    torch.manual_seed(0)
    warnings.warn("an old config", UserWarning)
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)), torch.ones(6, 8)

def broken():
    class Broken(nn.Module):
        def forward(self, x):
            return x
    return Broken(), None
"""


def run(*words: object, width: int = 100, **env: str) -> Result:
    return CliRunner(env={"COLUMNS": str(width), "NO_COLOR": "1", **env}).invoke(app, list(map(str, words)))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "plain.py").write_text(MODEL.replace('    warnings.warn("an old config", UserWarning)\n', ""))
    (tmp_path / "old.py").write_text(MODEL)
    (tmp_path / "stages.csv").write_text("forward,backward,saved_bytes\n1,2,10\n1,2,10\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


COMMANDS = {
    "plan plain.py:make --costs count": {"stages", "step", "cluster"},
    "check plain.py:make --microbatches 2": {"exact", "checks"},
    "profile plain.py:make --count H100": {"rows", "seconds"},
    "schedule zb-h1": {"ranks", "bubble", "spans"},
    "simulate stages.csv": {"ranks", "bubble", "spans"},
    "cache": {"folder", "entries"},
    "doctor": {"versions", "devices", "links", "abilities", "step", "exact"},
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_prints_json_and_nothing_else(here: Path, command: str) -> None:
    result = run(*command.split(), "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout).keys() >= COMMANDS[command]
    assert result.stderr == ""


def test_json_of_a_comparison_has_each_tensor(here: Path) -> None:
    it = json.loads(run("check", "plain.py:make", "--double", "--json").stdout)
    assert it["exact"] is True
    names = {each["name"] for check in it["checks"] for each in check["differences"] if each["kind"] == "gradient"}
    assert names == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert all(each["verdict"] in ("equal", "rounding") for check in it["checks"] for each in check["differences"])


def test_infinite_numbers_are_null_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    from pipecompile.cli.output import print_json

    print_json({"largest": float("inf"), "all": [float("nan"), 1.5], "none": None})
    assert json.loads(capsys.readouterr().out) == {"largest": None, "all": [None, 1.5], "none": None}


def test_an_error_leaves_stdout_empty(here: Path) -> None:
    result = run("plan", "plain.py:none", "--json")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("error: plain.py has no function 'none'")


@pytest.mark.filterwarnings("default")
def test_a_warning_is_one_line_on_stderr(here: Path) -> None:
    result = run("profile", "old.py:make", "--count", "H100", "--json")
    assert json.loads(result.stdout)["rows"]
    assert result.stderr == "warning: an old config\n"


def test_what_a_command_works_on_is_shown_on_a_terminal(here: Path) -> None:
    result = run("profile", "plain.py:make", "--count", "H100", "--json", FORCE_COLOR="1", TERM="xterm")
    assert "loading plain.py:make" in result.stderr
    assert json.loads(result.stdout)["rows"]


def test_an_error_of_another_kind_has_its_own_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError("of a sum")

    monkeypatch.setattr(timeline_output, "facts", fails)
    monkeypatch.setattr(sys, "argv", ["pipecompile", "schedule", "1f1b", "--json"])
    with pytest.raises(SystemExit) as ended:
        entry.main()
    assert ended.value.code == 3
    assert "ZeroDivisionError: of a sum" in capsys.readouterr().err


# Width


@pytest.fixture
def costed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costed_model, "captured", lambda *_, **__: None)
    monkeypatch.setattr(costed_model, "topics", lambda _: {"guards": ["s0 = 8"]})
    monkeypatch.setattr(costed_model, "costed", lambda *_: gpt2(layers=4))


WIDE = ("plan any:thing -n 4", "profile any:thing", "profile any:thing --nodes", "doctor", "schedule zb-h1")


@pytest.mark.parametrize("width", [50, 120])
@pytest.mark.parametrize("command", WIDE)
def test_nothing_is_cut_at_any_width(costed: None, command: str, width: int) -> None:
    text = run(*command.split(), width=width).stdout
    assert max(map(len, text.splitlines())) <= width
    assert re.findall(r".*\S…(?:\s|$)", text) == []  # "67.…", unlike "h.0…3"


@pytest.mark.parametrize("command", WIDE[:2])
def test_figures_are_the_same_at_every_width(costed: None, command: str) -> None:
    def figures(width: int) -> set[str]:
        text = " ".join(run(*command.split(), width=width).stdout.split())
        words = re.sub(r"search took \S+ \S+", "", text).split()
        return {
            f"{number} {unit}"
            for number, unit in pairwise(words)
            if unit in ("ms", "us", "s", "MiB", "KiB", "GiB", "M")
        }

    assert figures(50) == figures(120) != set()


def test_check_fits_fifty_columns(here: Path) -> None:
    text = run("check", "plain.py:make", width=50).stdout
    assert max(map(len, text.splitlines())) <= 50
    assert "…" not in text
    assert "bit-equal" in text or "rounding" in text
    assert "timing" not in text


@pytest.mark.parametrize("command", ["", "plan", "check", "schedule", "simulate", "profile", "doctor", "cache"])
def test_help_fits_fifty_columns(command: str) -> None:
    text = run(*command.split(), "--help", width=50).stdout
    assert max(map(len, text.splitlines())) <= 50
    assert "Usage: pipecompile" in text or "Usage: root" in text


# Completion


def completed(words: str, place: int) -> list[str]:
    path = str(Path(pipecompile.__file__).parents[1])
    env = {**os.environ, "PYTHONPATH": path, "COMP_WORDS": words, "COMP_CWORD": str(place)}
    done = subprocess.run(
        [sys.executable, "-m", "pipecompile"],
        env={**env, "_PIPECOMPILE_COMPLETE": "complete_bash"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_the_shell_completes_commands_and_names_of_schedules() -> None:
    assert completed("pipecompile s", 1) == ["schedule", "simulate"]
    assert {"zb-h1", "zb-v"} <= set(completed("pipecompile schedule zb", 2))
    assert {"--install-completion", "--show-completion"} <= set(completed("pipecompile --", 1))


def test_options_with_names_complete_them() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    completing = {
        f"{name} {parameter.opts[0]}"
        for name, command in commands.items()
        for parameter in command.params
        if parameter._custom_shell_complete is not None
    }
    assert completing >= {"plan --schedule", "plan --format", "check --schedule", "simulate --schedule"}
    assert "schedule name" in completing
