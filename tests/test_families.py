"""The list of families names tests that exist, so that a test that is renamed is not forgotten there."""

from __future__ import annotations

from pathlib import Path

import pytest
from families import FAMILIES, LATER

TESTS = Path(__file__).parent


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_family_is_a_test_with_parameters(family: str) -> None:
    path, _, name = family.partition("::")
    head, found, _ = (TESTS / path).read_text().partition(f"\ndef {name}(")
    assert found, f"{path} has no {name}"
    decorators = head[head.rindex("\n\n") :]
    assert "@" in decorators, f"{name} has one case"


@pytest.mark.parametrize("test", sorted(LATER))
def test_what_comes_later_is_a_test_and_no_family(test: str) -> None:
    path, _, name = test.partition("::")
    assert f"\ndef {name}(" in (TESTS / path).read_text()
    assert test not in FAMILIES
