"""Cuts at random and costs of nothing, in place of the search for a plan: quick, and harder on what crosses a cut."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from random import Random
from typing import Any
from unittest import mock

from random_splits import random_plan

from pipecompile.compiler import plan_call
from pipecompile.ir.graph import Cost, CostedGraph, Graph
from pipecompile.ir.plan import Plan
from pipecompile.planning import search_spec


@contextmanager
def cut_at_random(seed: int) -> Iterator[None]:
    draw = Random(seed)

    def costed(captured: Any, graph: Graph, *args: Any, **options: Any) -> CostedGraph:
        return CostedGraph(graph, (Cost(1e-6, 2e-6),) * len(graph), "counted")

    def planned(costed: CostedGraph, num_stages: int, *args: Any, **options: Any) -> Plan:
        plans = (random_plan(costed.graph, num_stages, draw) for _ in range(20))
        full = (plan for plan in plans if {s for s in plan.stage_of if s is not None} == set(range(num_stages)))
        return next(full, random_plan(costed.graph, num_stages, draw))

    with mock.patch.object(plan_call, "profile", costed), mock.patch.object(search_spec, "partition", planned):
        yield
