"""What processes compare, where one of them has less than another."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipecompile.distributed.processes import Processes
from pipecompile.errors import InputError


def among(each: list[Any]) -> Processes:
    """One of some processes, which say these values."""
    found: Any = object.__new__(Processes)
    found.agree = lambda what: None
    found.all = SimpleNamespace(gathered=lambda value: each)
    return found  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("each", "says"),
    [
        ([{"a": "1"}, {"a": "1"}, {}], "compile() got a=1 in rank 0, and a=nothing in rank 2; pass the same options"),
        ([{}, {"a": "1"}], "compile() got a=nothing in rank 0, and a=1 in rank 1; pass the same options"),
    ],
)
def test_an_option_that_one_process_does_not_have_differs(each: list[dict[str, str]], says: str) -> None:
    with pytest.raises(InputError) as caught:
        among(each).same_options({})
    assert says in str(caught.value)


@pytest.mark.parametrize("each", [[{"w": b"1"}, {}], [{}, {"w": b"1"}]])
def test_a_tensor_that_one_process_does_not_have_differs(each: list[dict[str, bytes]]) -> None:
    with pytest.raises(InputError, match="w of rank 1 differs from that of rank 0"):
        among(each).same_tensors({"w": torch.ones(1)})


def test_what_all_have_alike_is_the_same() -> None:
    among([{"a": "1"}] * 3).same_options({})
    among([{"w": b"1"}] * 3).same_tensors({"w": torch.ones(1)})
