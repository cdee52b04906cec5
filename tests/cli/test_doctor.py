"""``pipecompile doctor`` on the CPU; on accelerators it is tried in ``tests/devices``."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

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
