"""What needs no torch does not import it: help, version, drawn and simulated schedules, the cache."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import pipecompile
from pipecompile.cli import plan
from pipecompile.compiler.options import OUTPUTS
from pipecompile.render.formats import FORMATS

HEAVY = ("torch", "numpy", "networkx", "sympy", "transformers")
RUN = """
import contextlib, io, sys
from pipecompile.__main__ import main
for words in {commands!r}:
    sys.argv = ["pipecompile", *words.split()]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            main()
        except SystemExit as end:
            assert not end.code, (words, end.code)
    assert out.getvalue().strip(), words
print([name for name in {heavy!r} if name in sys.modules])
"""
COMMANDS = ("plan", "check", "schedule", "simulate", "profile", "doctor", "cache")
TABLE = "forward,backward\n1,2\n1,2\n"


def imported(program: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, cwd=folder, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_commands_without_a_model_import_nothing_heavy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(pipecompile.__file__).parents[1]))
    monkeypatch.setenv("PIPECOMPILE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "stages.csv").write_text(TABLE)
    commands = [
        "--help",
        "--version",
        *(f"{name} --help" for name in COMMANDS),
        "cache",
        "cache --clear --json",
        "schedule 1f1b",
        "schedule zb-v --json",
        "simulate stages.csv --program",
    ]
    assert imported(RUN.format(commands=commands, heavy=HEAVY), tmp_path) == "[]"


def test_the_package_imports_torch_with_its_first_name_that_needs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(pipecompile.__file__).parents[1]))
    program = (
        "import sys, pipecompile\n"
        "pipecompile.Plan, pipecompile.Cluster, pipecompile.simulate, pipecompile.errors.InputError\n"
        "light = 'torch' in sys.modules\n"
        "pipecompile.compile\n"
        "print(light, 'torch' in sys.modules, 'torch._dynamo' in sys.modules)\n"
    )
    assert imported(program, tmp_path) == "False True False"


def test_every_public_name_is_where_it_is_looked_for() -> None:
    assert set(pipecompile._HOME_OF) == set(pipecompile.__all__)
    for name, home in pipecompile._HOME_OF.items():
        assert getattr(pipecompile, name).__module__ in (f"pipecompile.{home}", "pipecompile.facade")
    assert set(pipecompile.__all__) <= set(dir(pipecompile))


def test_a_name_that_the_package_does_not_have_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'pipecompile' has no attribute 'split'"):
        pipecompile.split  # noqa: B018
    assert not hasattr(pipecompile, "__wrapped__")
    assert pipecompile.facade.__name__ == "pipecompile.facade"


def test_choices_in_the_help_are_those_of_the_library() -> None:
    assert tuple(FORMATS) == plan.FORMATS
    assert tuple(OUTPUTS) == plan.OUTPUTS
