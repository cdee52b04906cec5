"""A sample of the faults that ``make faults`` injects: each beside the eager twin, by seed."""

from __future__ import annotations

import warnings

import pytest
from faults_run import Case, all_kinds, cases, suffer

KINDS = all_kinds()
SAMPLE = [case for case in cases(8 * len(KINDS), KINDS) if case.number % 29 == 3]


@pytest.mark.parametrize("case", SAMPLE, ids=lambda case: f"{case.number}-{case.kind}-{case.model}")
@pytest.mark.filterwarnings("ignore")
def test_a_fault_ends_as_it_does_in_eager_or_is_refused(case: Case) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        verdict, seen = suffer(case)
    assert verdict == "fine", f"{verdict}: {seen}"


def test_the_sweep_has_enough_kinds() -> None:
    assert len(KINDS) >= 60
    assert {case.kind for case in cases(len(KINDS), KINDS)} == set(KINDS)
