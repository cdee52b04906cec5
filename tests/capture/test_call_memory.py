from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipecompile.capture import call_memory
from pipecompile.capture.call import read_call
from pipecompile.capture.call_memory import CallMemory

ONES = torch.ones(4, 3)


def forward(x: Tensor, mask: Any = None, *, scale: Any = 1, **others: Any) -> Tensor:
    return x


def other(mask: Any, x: Any = None) -> Tensor:
    return x


CALLS: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    ((ONES,), {}),
    ((ONES,), {"mask": torch.ones(4)}),
    ((), {"x": ONES, "mask": torch.ones(4)}),
    ((), {"mask": torch.ones(4), "x": ONES}),
    ((ONES,), {"mask": torch.ones(5)}),  # of other rows
    ((ONES,), {"mask": torch.ones(4, dtype=torch.int64)}),
    ((ONES.clone().requires_grad_(),), {}),
    ((nn.Parameter(ONES),), {}),
    ((ONES,), {"scale": 1}),
    ((ONES,), {"scale": True}),
    ((ONES,), {"scale": "1"}),
    ((ONES,), {"scale": 1.0}),
    ((ONES,), {"scale": None}),
    ((torch.ones(3, 4).T,), {}),  # in another order of memory
    ((ONES[:2],), {}),
    ((ONES,), {"mask": [torch.ones(4)]}),
    ((ONES,), {"z": torch.ones(4), "y": torch.zeros(4)}),
    ((ONES,), {"y": torch.ones(4), "z": torch.zeros(4)}),
]


@pytest.mark.parametrize("in_dims", [None, {"x": 1, "mask": None}])
def test_a_call_is_read_as_if_it_were_the_first(in_dims: dict[str, int | None] | None) -> None:
    memory = CallMemory()
    for given in (forward, other, forward):
        for args, kwargs in CALLS:
            settled: dict[tuple[str, int], bool] = {}
            try:
                expected = read_call(given, args, kwargs, settled, in_dims)
            except Exception as error:
                with pytest.raises(type(error)):
                    memory.read(given, lambda given=given: given, args, kwargs, settled, in_dims)  # type: ignore[misc]
                continue
            found = memory.read(given, lambda given=given: given, args, kwargs, settled, in_dims)  # type: ignore[misc]
            assert {n: t.data_ptr() for n, t in found.tensors.items()} == {
                n: t.data_ptr() for n, t in expected.tensors.items()
            }
            assert [*found.tensors] == [*expected.tensors]
            for part in ("key", "spec", "leaves", "names", "batch", "batched", "dims", "cached", "has_cache"):
                assert getattr(found, part) == getattr(expected, part), part


def test_what_an_earlier_call_has_settled_decides() -> None:
    memory, call = CallMemory(), ((torch.ones(4, 3), torch.ones(4)), {})
    for settled in ({}, {("mask", 1): False}):
        expected = read_call(forward, *call, settled)
        assert memory.read(forward, lambda: forward, *call, settled, None).batched == expected.batched
    assert expected.batched == {"x"}


def test_alike_calls_are_read_once_and_no_tensor_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    memory, read = CallMemory(), list[Any]()

    def counted(*args: Any) -> Any:
        read.append(args)
        return read_call(*args)

    monkeypatch.setattr(call_memory, "read_call", counted)
    for number in range(3):
        x, mask = torch.full((4, 3), float(number)), torch.zeros(4)
        found = memory.read(forward, lambda: forward, (x,), {"mask": mask, "scale": 2}, {}, None)
        assert found.tensors["x"] is x
        assert found.tensors["mask"] is mask
    assert len(read) == 1
    memory.read(forward, lambda: forward, (x, x), {}, {}, None)
    memory.read(forward, lambda: forward, (x, x), {}, {}, None)
    assert len(read) == 3  # one tensor in two places: not remembered
    assert not any(call.tensors for call, _ in memory.known.values())
