"""``pipecompile doctor`` on the CPU; on accelerators it is tried in ``tests/devices``."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from pipecompile.cli import abilities
from pipecompile.cli.examination import all_devices
from pipecompile.cli.main import app
from pipecompile.runtime.runner import Runner


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["doctor", *arguments])
    return result.exit_code, result.output


def test_it_says_what_there_is_and_that_a_step_is_exact() -> None:
    code, said = run()
    assert code == 0, said
    assert "cpu" in said
    assert "a step split over cpu, cpu is exact" in " ".join(said.split())


def test_it_takes_devices_and_prints_json() -> None:
    code, said = run("--devices", "cpu,cpu,cpu", "--json")
    found = json.loads(said)
    assert code == 0
    assert found["exact"]
    assert [device["device"] for device in found["devices"]] == ["cpu"]
    assert found["step"].startswith("a step split over cpu, cpu, cpu is exact")


def test_it_says_what_works_and_what_a_missing_package_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(abilities, "version", missing("peft"))
    found = json.loads(run("--json")[1])
    works = {each["what"]: each for each in found["abilities"]}
    adapters = works["adapters (LoRA and others)"]
    assert (adapters["works"], adapters["note"]) == (False, "missing: pip install peft")
    assert works["torch's interfaces that pipecompile needs"]["works"]
    assert works["mesh=: a process per stage"]["note"] == "gloo"
    assert any(what.startswith("stage_compile=True: stages on cpu") for what in works)
    assert found["versions"]["pipecompile"] == version("pipecompile")
    assert found["devices"][0]["total"] >= found["devices"][0]["free"] > 1 << 20


def missing(package: str) -> Callable[[str], str]:
    def found(name: str) -> str:
        if name == package:
            raise PackageNotFoundError(name)
        return version(name)

    return found


@pytest.mark.parametrize(
    ("torch_version", "works"), [("2.10.9", False), ("2.11.0", True), ("2.13.1+cpu", True), ("2.14.0a0", False)]
)
def test_a_torch_that_is_not_tested_is_told(monkeypatch: pytest.MonkeyPatch, torch_version: str, works: bool) -> None:
    monkeypatch.setattr(abilities.torch, "__version__", torch_version)
    it = next(abilities.abilities([]))
    assert it.works == works
    assert ("pipecompile is tested with torch" in it.note) != works


def test_a_missing_compiler_and_a_cache_that_is_off_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(abilities.check_backend.__globals__["torch_internals"], "no_cpp_compiler", lambda: "no g++")
    monkeypatch.setenv("PIPECOMPILE_CACHE", "off")
    found = {it.what.partition(":")[0]: it for it in abilities.abilities([torch.device("cpu")])}
    assert not found["stage_compile=True"].works
    assert found["stage_compile=True"].note.startswith("none was found (no g++); install g++")
    assert (found["the cache"].works, found["the cache"].note) == (False, "PIPECOMPILE_CACHE=off")
    monkeypatch.setenv("PIPECOMPILE_CACHE", str(tmp_path / "not" / "yet"))
    assert list(abilities.abilities([]))[-1].works
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PIPECOMPILE_CACHE", str(tmp_path / "file"))
    assert "is a file" in list(abilities.abilities([]))[-1].note


def test_a_step_that_is_not_exact_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Runner.backward

    def wrong(self: Runner, microbatch, received):
        return {
            stage: tuple(v if v is None else 2 * v for v in values)
            for stage, values in right(self, microbatch, received).items()
        }

    monkeypatch.setattr(Runner, "backward", wrong)
    code, said = run()
    assert code == 1, said
    assert "layers.0" in said


def test_a_step_that_fails_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args, **kwargs):
        raise RuntimeError("no such link")

    monkeypatch.setattr(Runner, "forward", fails)
    code, said = run()
    assert code == 1
    assert "no such link" in said


def test_a_device_that_is_not_there_is_refused() -> None:
    code, said = run("--devices", "cpu,nothing")
    assert code == 2
    assert "nothing" in said
    assert all_devices()
