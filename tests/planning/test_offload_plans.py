"""When a plan offloads activations: where memory binds, and where that is faster than recomputing them."""

from __future__ import annotations

from typing import Any

import pytest
from plans import layers

from pipecompile.errors import InputError, PlanError
from pipecompile.ir.cluster import Cluster, Device, Link
from pipecompile.ir.plan import Plan
from pipecompile.planning.plan_search import make_plan
from pipecompile.planning.search_spec import Request
from pipecompile.planning.training_spec import Workload
from pipecompile.schedule import SYNCHRONOUS

COSTED = layers(*[3.0] * 8, weights=400, saved=10_000)
SLOW, FAST = Link(bandwidth=100.0), Link(bandwidth=1e6)  # of a stage, 20,000 bytes take 200 s and 0.02 s
ROOM = 250_000  # bytes; without offloading or recomputing, eight microbatches of GPipe need 160,000 and more


def plan_of(memory: int, host: Link, device: str = "a", name: str = "gpipe", **options: Any) -> tuple[Plan, float, int]:
    """The plan, its predicted step and the bytes of the fullest rank."""
    cluster = Cluster((Device(device, memory=memory),) * 4, host=host)
    work = Workload(SYNCHRONOUS[name], 8, **options)
    plan = make_plan(COSTED, Request((1,) * 4), cluster, work)
    return plan, work.step_seconds(COSTED, plan, cluster), max(work.memory(COSTED, plan, cluster, bound=True).ranks)


def test_a_plan_that_fits_does_not_change() -> None:
    assert plan_of(10 * ROOM, FAST)[0] == plan_of(10 * ROOM, FAST, offload="never")[0]
    assert plan_of(10 * ROOM, FAST)[0].offloaded == ()


def need(**options: Any) -> int:
    return plan_of(10 * ROOM, FAST, **options)[2]


def test_over_a_fast_link_it_offloads_and_over_a_slow_one_it_recomputes() -> None:
    limit = (need(offload="always") + need(offload="never")) // 2
    fast, slow = plan_of(limit, FAST), plan_of(limit, SLOW)
    assert fast[0].offloaded
    assert not fast[0].recomputed
    assert slow[0].recomputed
    assert not slow[0].offloaded
    assert max(fast[2], slow[2]) <= limit
    never = plan_of(limit, FAST, offload="never")
    assert never[0].recomputed
    assert fast[1] < never[1]
    assert slow == plan_of(limit, SLOW, offload="never")


def test_only_stages_that_must_offload() -> None:
    stays, leaves = (need(name="1f1b", offload=each) for each in ("never", "always"))
    plan, _, held = plan_of((stays + leaves) // 2, FAST, name="1f1b")
    assert held <= (stays + leaves) // 2
    assert 0 < len(plan.offloaded) < 4
    assert 3 not in plan.offloaded  # which has one microbatch in flight


def test_the_cpu_never_offloads() -> None:
    assert plan_of(10 * ROOM, FAST, device="cpu", offload="always")[0].offloaded == ()
    limit = (need(offload="always") + need(offload="never")) // 2
    assert plan_of(limit, FAST, device="cpu")[0].offloaded == ()


def test_a_model_that_fits_only_offloaded_is_refused_with_that_remedy() -> None:
    limit = (need(offload="always") + need(offload="never")) // 2
    assert plan_of(limit, FAST, recompute="never")[0].offloaded
    with pytest.raises(PlanError, match=r"it would fit with recompute='auto'.*or with offload='auto'"):
        plan_of(limit, FAST, recompute="never", offload="never")


def test_stages_that_step_by_themselves_do_not_offload() -> None:
    with pytest.raises(InputError, match="offload='always' does not work with schedules that step inside"):
        Workload(SYNCHRONOUS["1f1b"], 8, offload="always", asynchronous=True)
