"""Options as texts: the same in every process that was given the same ones, others where one differs."""

from __future__ import annotations

from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from pipecompile.compiler.options import Options
from pipecompile.compiler.told_options import told_options, told_replan
from pipecompile.ir.batching_options import Batching
from pipecompile.ir.cluster import Cluster
from pipecompile.ir.graph import Cost, CostedGraph, Graph, Node, TensorSpec
from pipecompile.ir.plan_options import PlanOptions


def plan(**options: Any) -> Options:
    return Options(plan=PlanOptions(**options))


class Tracing:
    """A backend of which each process has another object."""

    def __call__(self, module: Any, inputs: Any) -> Any:
        return module


def made() -> Any:
    return lambda parameters: torch.optim.SGD(parameters, 0.1)


PATHS = [f"layers.{i}" for i in range(100)]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Options(leaf_modules=("a", "b")), Options(leaf_modules=("b", "a"))),
        (plan(no_split=["a", "b"]), plan(no_split=("b", "a"))),
        (plan(colocate=[["a", "b"], ["c", "d"]]), plan(colocate=[["d", "c"], ["b", "a"]])),
        (plan(pins={"a": 0, "b": 1}), plan(pins={"b": 1, "a": 0})),
        (plan(search_seconds=5.0), plan(search_seconds=np.float64(5.0))),
        (
            Options(loss_fn=partial(F.huber_loss, delta=0.5)),
            Options(loss_fn=partial(F.huber_loss, delta=np.float32(0.5))),
        ),
        (Options(batching=Batching(allow_mixing=["a", "b"])), Options(batching=Batching(allow_mixing=["b", "a"]))),
        (Options(stage_compile=Tracing()), Options(stage_compile=Tracing())),
        (Options(optimizer=made()), Options(optimizer=made())),
        (Options(loss_fn=partial(F.mse_loss, reduction="sum")), Options(loss_fn=partial(F.mse_loss, reduction="sum"))),
        (Options(loss_fn=partial(max, {"a", "b"})), Options(loss_fn=partial(max, {"b", "a"}))),
        (Options(microbatches=8, finds_microbatches=True), Options(microbatches=2, finds_microbatches=True)),
        (Options(costs="measure"), Options()),
        (Options(cluster=Cluster.of(["cpu"] * 2)), Options(cluster=Cluster.of(["cpu"] * 3))),
    ],
)
def test_the_same_options_are_told_alike(one: Options, other: Options) -> None:
    assert told_options(one) == told_options(other)


@pytest.mark.parametrize(
    ("name", "one", "other"),
    [
        ("leaf_modules", Options(leaf_modules=("a", "b")), Options(leaf_modules=("a", "c"))),
        ("colocate", plan(colocate=[["a", "b"], ["c", "d"]]), plan(colocate=[["a", "c"], ["b", "d"]])),
        ("pins", plan(pins=dict.fromkeys(PATHS, 0)), plan(pins=dict.fromkeys(PATHS, 0) | {PATHS[-1]: 1})),
        ("no_split", plan(no_split=PATHS), plan(no_split=PATHS[:-1])),
        ("replicas", plan(replicas=[1, 2]), plan(replicas=[2, 1])),
        ("microbatches", Options(microbatches=4, finds_microbatches=True), Options(microbatches=4)),
        ("loss_fn", Options(loss_fn=partial(F.mse_loss, reduction="sum")), Options(loss_fn=F.mse_loss)),
        ("loss_fn", Options(loss_fn=partial(max, {"a", "b"})), Options(loss_fn=partial(max, {"b", "c"}))),
        ("costs", Options(costs="count"), Options()),
        ("cluster", Options(cluster=Cluster.of(["cpu"] * 2)), Options()),
        ("batch_norm", Options(), Options(batching=Batching(batch_norm="deferred"))),
    ],
)
def test_an_option_that_differs_is_the_only_one_told_otherwise(name: str, one: Options, other: Options) -> None:
    told, another = told_options(one), told_options(other)
    assert {each for each in told if told[each] != another[each]} == {name}
    assert told.keys() == another.keys()


def test_each_option_is_told() -> None:
    names = {field.name for kind in (Options, PlanOptions, Batching) for field in fields(kind)}
    assert told_options(Options()).keys() == (names | {"schedule"}) - {
        "plan",
        "batching",
        "finds_microbatches",
        "asked",
        "found",
    }


def costed(seconds: float) -> CostedGraph:
    node = Node("x", "input", outputs=(TensorSpec((1, 2), "float32"),), rematerialized=True)
    return CostedGraph(Graph((node,), (0,), (0,), ()), (Cost(seconds),), "computed")


def test_a_replan_is_told_by_what_it_is_given(tmp_path: Path) -> None:
    costed(1.0).save(tmp_path / "costs.json")
    said = told_replan(PlanOptions(pins={"a": 0}), tmp_path / "costs.json")
    assert said == told_replan(PlanOptions(pins={"a": 0}), costed(1.0)), "a file is what it contains"
    others = [(None, costed(1.0)), (PlanOptions(pins={"a": 1}), costed(1.0)), (PlanOptions(pins={"a": 0}), costed(2.0))]
    assert all(told_replan(*other) != said for other in others)
    assert told_replan(None, None) == {"costs": "None", "plan": "None"}


def test_what_a_replan_cannot_use_is_told_too(tmp_path: Path) -> None:
    said = told_replan({"pins": {}}, tmp_path / "not there")  # type: ignore[arg-type]
    assert "which cannot be used (" in said["costs"]
    assert said["plan"] == "{'pins': {}}"
