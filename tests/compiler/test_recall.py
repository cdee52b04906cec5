"""Costs and plans of earlier processes: used where everything is the same, and only there."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import pipecompile
from pipecompile.compiler import fingerprint, plan_call, recall
from pipecompile.compiler.disk_cache import DiskCache
from pipecompile.compiler.report import Report
from pipecompile.ir.plan import Plan


class Made:
    """How often something was profiled and planned."""

    profiles = plans = 0


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Made:
    made = Made()
    profile, planned = plan_call.profile, plan_call.planned

    def profiled(*args: Any, **kwargs: Any) -> Any:
        made.profiles += 1
        return profile(*args, **kwargs)

    def plans(*args: Any, **kwargs: Any) -> Any:
        made.plans += 1
        return planned(*args, **kwargs)

    monkeypatch.setattr(plan_call, "profile", profiled)
    monkeypatch.setattr(plan_call, "planned", plans)
    return made


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DiskCache:
    monkeypatch.setenv("PIPECOMPILE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(recall, "BUSY", 1.0)  # whatever else runs beside these tests
    return DiskCache(tmp_path / "cache")


def net(width: int = 8) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1))


def call(model: nn.Module, rows: int = 8, **options: Any) -> tuple[Plan, Report]:
    pipe = pipecompile.compile(model, ["cpu", "cpu"], **options)
    pipe(torch.ones(rows, 8)).sum().backward()
    pipe.pipeline.close()
    return pipe.pipeline.plan, pipe.pipeline.report


def test_the_same_model_again_is_neither_profiled_nor_planned(cache: DiskCache, made: Made) -> None:
    plan, first = call(net())
    assert (made.profiles, made.plans) == (1, 1)
    assert first.remembered == ()
    again, report = call(net())
    assert (made.profiles, made.plans) == (1, 1)
    assert again == plan
    assert [line.partition(",")[0] for line in report.remembered] == ["plan"]
    assert report.costs == first.costs
    assert report.memory == first.memory
    assert sorted(entry.path.name[:5] for entry in cache.entries()) == ["costs", "plan-"]


@pytest.mark.filterwarnings("ignore:this step is predicted to take")
@pytest.mark.parametrize("microbatches", [2, None])
def test_costs_of_a_busy_machine_are_not_remembered(
    cache: DiskCache, made: Made, monkeypatch: pytest.MonkeyPatch, microbatches: int | None
) -> None:
    monkeypatch.setattr(recall, "BUSY", 0.1)
    monkeypatch.setattr(plan_call, "WORTH", 0.0)
    profile = plan_call.profile
    waited = 0.11
    monkeypatch.setattr(plan_call, "profile", lambda *a, **k: replace(profile(*a, **k), waited=waited))
    _, report = call(net(), microbatches=microbatches)
    assert list(cache.entries()) == []
    assert "costs not kept: the machine was busy: in 11% of the measured seconds" in report.remembered[0]
    profiles = made.profiles
    waited = 0.1
    _, report = call(net(), microbatches=microbatches)
    assert made.profiles == 2 * profiles
    assert not any("not kept" in line for line in report.remembered)
    assert "plan" in {entry.path.name.partition("-")[0] for entry in cache.entries()}
    call(net(), microbatches=microbatches)
    assert made.profiles == 2 * profiles


def test_nothing_is_kept_if_it_is_off(monkeypatch: pytest.MonkeyPatch, made: Made) -> None:
    monkeypatch.setenv("PIPECOMPILE_CACHE", "off")
    call(net())
    _, report = call(net())
    assert (made.profiles, made.plans) == (2, 2)
    assert report.remembered == ()


@pytest.mark.parametrize("what", ["width", "rows", "more functions", "function", "strides", "no gradient"])
def test_another_graph_is_measured(cache: DiskCache, made: Made, what: str) -> None:
    call(net())
    model, rows = net(), 8
    match what:
        case "width":
            model = net(16)
        case "rows":
            rows = 16
        case "more functions":
            model[0].register_forward_pre_hook(lambda module, args: (args[0].double().float(),))
        case "function":
            model[1] = nn.ReLU()
        case "strides":
            model[2].weight.data = model[2].weight.data.t().contiguous().t()
        case "no gradient":
            model[0].requires_grad_(False)
    call(model, rows)
    assert made.profiles == 2


def test_other_values_of_the_same_model_are_remembered(cache: DiskCache, made: Made) -> None:
    call(net())
    model = net()
    torch.nn.init.zeros_(model[0].weight)
    call(model)
    assert made.profiles == 1


def test_another_number_of_threads_or_another_version_is_measured(
    cache: DiskCache, made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    call(net())
    torch.set_num_threads(4)  # two for each rank; the fixture of all tests sets it back
    call(net())
    torch.set_num_threads(1)
    assert made.profiles == 2
    with monkeypatch.context() as patched:
        patched.setattr(torch, "__version__", "9.9.9")
        call(net())
    assert made.profiles == 3
    with monkeypatch.context() as patched:
        patched.setattr(fingerprint, "package_version", lambda: "9.9.9")
        call(net())
    assert made.profiles == 4
    call(net())
    assert made.profiles == 4


def test_other_options_plan_again_from_remembered_costs(cache: DiskCache, made: Made) -> None:
    call(net())
    plan, report = call(net(), plan=pipecompile.PlanOptions(pins={"0": 0, "2": 1}))
    assert (made.profiles, made.plans) == (1, 2)
    assert report.remembered[0].startswith("costs, from ")
    call(net(), microbatches=2, schedule="gpipe", batching=pipecompile.Batching())
    again, _ = call(net(), plan=pipecompile.PlanOptions(pins={"0": 0, "2": 1}))
    assert again == plan
    assert made.plans == 3


def test_a_plan_by_the_users_function_is_not_remembered(cache: DiskCache, made: Made) -> None:
    for _ in range(2):
        call(net(), plan=pipecompile.PlanOptions(objective=lambda plan: 0.0))
    assert (made.profiles, made.plans) == (1, 2)


@pytest.mark.parametrize("given", ["costs", "count", "cluster"])
def test_what_the_user_passes_is_untouched(cache: DiskCache, tmp_path: Path, given: str) -> None:
    pipe = pipecompile.compile(net(), ["cpu", "cpu"], costs="count")
    pipe(torch.ones(8, 8))
    pipe.pipeline.costs.save(tmp_path / "costs.json")
    options: dict[str, Any] = {
        "costs": {"costs": tmp_path / "costs.json"},
        "count": {"costs": "count"},
        "cluster": {"cluster": "2xA100-40GB"},
    }
    _, report = call(net(), **options[given])
    assert report.remembered == ()
    assert cache.entries() == []


def rewrite(cache: DiskCache, kind: str, change: Any) -> None:
    """Changes the content of an entry, with a right checksum."""
    (path,) = (entry.path for entry in cache.entries() if entry.path.name.startswith(kind))
    content = json.loads(path.read_text())["content"]
    change(content)
    assert cache.write(path.stem, content, {}) == ""


@pytest.mark.parametrize("what", ["truncated", "foreign", "backward", "ranks", "fields", "numbers"])
def test_a_plan_that_does_not_fit_is_ignored_and_told(cache: DiskCache, made: Made, what: str) -> None:
    plan, _ = call(net())
    path = next(entry.path for entry in cache.entries() if entry.path.name.startswith("plan"))
    match what:
        case "truncated":
            path.write_text(path.read_text()[:200])
        case "foreign":
            path.write_text('{"model": "another program"}')
        case "backward":
            rewrite(cache, "plan", lambda it: it["plan"]["stage_of"].reverse())
        case "ranks":
            rewrite(cache, "plan", lambda it: it["plan"].update(rank_of=[0, 7]))
        case "fields":
            rewrite(cache, "plan", lambda it: it.pop("cluster"))
        case "numbers":
            rewrite(cache, "plan", lambda it: it["costs"]["costs"][1].update(forward=-1.0))
    again, report = call(net())
    assert again == plan
    assert (made.profiles, made.plans) == (1, 2)  # the costs are good
    assert report.remembered[0].startswith("plan not remembered: ")
    assert str(path) in report.remembered[0]
    _, report = call(net())
    assert made.plans == 2
    assert report.remembered == (f"plan, from {path}",)


def test_a_cache_that_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PIPECOMPILE_CACHE", str(tmp_path / "file" / "cache"))
    _, report = call(net())
    assert "plan not kept: cannot be written" in report.remembered[-1]
