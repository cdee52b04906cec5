"""What ``make test`` leaves to ``make long``: the full products of settings, and more random models."""

import os
from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")

LONG = bool(os.environ.get("LONG"))


def some(cases: Iterable[T], one_of: int = 2) -> list[T]:
    """All cases where there is time, and else each so manieth."""
    return list(cases)[:: 1 if LONG else one_of]
