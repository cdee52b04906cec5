"""A quick look sees every change of what it was given, whatever it compares with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from pipecompile.capture.state import fast_check as of_sweep
from pipecompile.capture.state import identities as of_identities
from pipecompile.capture.state.fast_check import Sweep
from pipecompile.capture.state.identities import identities

WAYS = [identities, of_identities._one_by_one]


@pytest.mark.parametrize("way", WAYS)
def test_identities_are_of_objects_not_of_values(way: Callable[[tuple[Any, ...]], bytes]) -> None:
    one, other = [1], [1]
    assert way((one, None, 2.5)) == way((one, None, 2.5))
    assert way((one,)) != way((other,))
    assert way((1,)) != way((True,))
    assert way((one, other)) != way((other, one))
    assert way(()) == b""


def test_both_ways_agree() -> None:
    objects = (object(), "a", 1.5, None, [], nn.Linear(1, 1))
    assert identities(objects) == of_identities._one_by_one(objects)


def another_shape(held: Any) -> None:
    held["tensor"].data = torch.zeros(3, 2)


def another_type(held: Any) -> None:
    held["tensor"].data = torch.zeros(2, 2, dtype=torch.float16)


def frozen(held: Any) -> None:
    held["tensor"].requires_grad_(False)


def equal_number_of_another_type(held: Any) -> None:
    held["namespace"]["flag"] = 1


def equal_list(held: Any) -> None:
    held["namespace"]["items"] = [1, 2]


def one_more_name(held: Any) -> None:
    held["namespace"]["new"] = None


def other_key(held: Any) -> None:
    held["table"]["other"] = held["table"].pop("key")


def no_longer_empty(held: Any) -> None:
    held["empty"]["key"] = 1


CHANGES = [
    another_shape, another_type, frozen, equal_number_of_another_type, equal_list, one_more_name, other_key,
    no_longer_empty,
]  # fmt: skip


@pytest.mark.parametrize("has_guards", [True, False], ids=["torch.compile's checks", "none of them"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_is_seen(change: Callable[[Any], None], has_guards: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not has_guards:
        monkeypatch.setattr(of_sweep, "_CHECKS", None)
    held: Any = {
        "tensor": nn.Parameter(torch.zeros(2, 2)),
        "namespace": {"flag": True, "items": [1, 2]},
        "table": {"key": "value"},
        "empty": {},
    }
    sweep = Sweep([held["namespace"]], containers=[held["table"], held["empty"]], tensors=[held["tensor"]])
    assert sweep.holds()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert sweep.holds()
    assert sweep.holds()
    change(held)
    assert not sweep.holds()


def test_torch_has_the_checks_that_are_made_in_its_own_code() -> None:
    tensor = torch.zeros(2)
    assert of_sweep._quick_check([tensor])(tensor)
