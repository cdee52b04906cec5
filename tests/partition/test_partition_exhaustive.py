"""The partitioner against all plans of small graphs: the optimum, or that there is none, each time with a proof."""

from __future__ import annotations

import os
from math import inf

import pytest
from exhaustive import Case, drawn, least_load, link_factors, load

from pipecompile.errors import InfeasibleError
from pipecompile.ir.plan import Plan
from pipecompile.partition import partition

COUNT = int(os.environ.get("RANDOM_GRAPHS", "400"))
PARTS = 8


@pytest.mark.parametrize("part", range(PARTS))
def test_a_plan_is_as_good_as_the_best_of_all_plans_or_there_is_none(part: int) -> None:
    for seed in range(part, COUNT, PARTS):
        case = drawn(seed)
        best = least_load(case)
        if best == inf:
            with pytest.raises(InfeasibleError):
                planned(case)
            continue
        plan = planned(case)
        assert load(case, plan) == pytest.approx(best, rel=1e-9), f"seed {seed}: {plan}"
        assert plan.quality is not None
        assert plan.quality.bottleneck == pytest.approx(best, rel=1e-9), f"seed {seed}"
        assert plan.quality.proven, f"seed {seed}: {plan.quality}"


def planned(case: Case) -> Plan:
    return partition(case.costed, case.num_stages, case.cluster, constraints=case.constraints, objective=case.objective)


def test_the_drawn_cases_are_of_all_kinds() -> None:
    cases = [drawn(seed) for seed in range(200)]
    possible = [least_load(case) < inf for case in cases]
    assert 40 < sum(possible) < 180
    for what in ("pins", "no_split", "colocate", "max_stages"):
        asked = [can for case, can in zip(cases, possible, strict=True) if getattr(case.constraints, what)]
        assert any(asked), what
        assert not all(asked), what
    limited = [can for case, can in zip(cases, possible, strict=True) if case.cluster.devices[0].memory is not None]
    assert any(limited)
    assert not all(limited)
    assert any(len({device.speed for device in case.cluster.devices}) > 1 for case in cases)
    differ = [can for case, can in zip(cases, possible, strict=True) if max(link_factors(case)[1], default=1.0) > 1]
    assert sum(differ) > 10
    assert 20 < sum(can for case, can in zip(cases, possible, strict=True) if case.objective == "overlap") < 100
