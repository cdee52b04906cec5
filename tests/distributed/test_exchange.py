"""What travels along trees and rings, between threads that stand for ranks."""

from __future__ import annotations

from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any

import pytest
import torch

from pipecompile.distributed.exchange import children, exchange, parent, spread

SIZES = range(1, 10)


class Threads:
    """The lines of one of several ranks in one process."""

    def __init__(self, rank: int, size: int, queues: Any) -> None:
        self.ranks = range(size)
        self.rank = rank
        self.queues = queues
        self.sent = 0

    def put(self, peer: int, values: Any) -> None:
        self.sent += 1
        self.queues[self.rank, peer].put(values)

    def get(self, peer: int, seconds: float | None = None) -> Any:
        return lambda: self.queues[peer, self.rank].get(timeout=20)


def on_all(size: int, job: Any) -> tuple[list[Any], list[int]]:
    """What the job returns on each rank, and how much each has sent."""
    queues: Any = defaultdict(SimpleQueue)
    every = [(rank, peer) for rank in range(size) for peer in range(size)]
    for pair in every:
        queues[pair] = SimpleQueue()
    lines = [Threads(rank, size, queues) for rank in range(size)]
    with ThreadPoolExecutor(size) as pool:
        found = list(pool.map(lambda each: job(each, each.rank), lines))
    assert all(queues[pair].empty() for pair in every), "everything that was sent was received"
    return found, [each.sent for each in lines]


@pytest.mark.parametrize("size", SIZES)
def test_an_exchange_brings_all_to_all_in_few_steps(size: int) -> None:
    found, sent = on_all(size, lambda lines, rank: exchange(lines, rank, torch.tensor([rank, 10 * rank])))
    expected = [[rank, 10 * rank] for rank in range(size)]
    assert [[t.tolist() for t in each] for each in found] == [expected] * size
    assert sent == [(size - 1).bit_length()] * size


@pytest.mark.parametrize("size", SIZES)
def test_a_tree_reaches_each_rank_once(size: int) -> None:
    for root in range(size):
        reached = [child for rank in range(size) for child in children(rank, root, size)]
        assert sorted([root, *reached]) == list(range(size))
        assert all(parent(child, root, size) == rank for rank in range(size) for child in children(rank, root, size))
        assert len([*children(root, root, size)]) == (size - 1).bit_length()


@pytest.mark.parametrize("size", SIZES)
def test_values_of_several_makers_are_everywhere(size: int) -> None:
    makers = {"loss": size - 1, "hidden": 0, "count": size // 2, "logits": size - 1}
    values = {"loss": torch.tensor(2.0).requires_grad_(), "hidden": torch.ones(3), "count": torch.tensor(7)}
    values["logits"] = torch.randn(5, 6).requires_grad_()

    def job(lines: Any, rank: int) -> Any:
        made = {name: value for name, value in values.items() if makers[name] == rank}
        return spread(lines, rank, made, makers, {"loss", "count"})

    for rank, found in enumerate(on_all(size, job)[0]):
        assert list(found) == list(makers)
        for name, value in found.items():
            about = value.shape, value.dtype, value.requires_grad
            assert about == (values[name].shape, values[name].dtype, values[name].requires_grad)
            if makers[name] == rank or name in ("loss", "count"):
                assert torch.equal(value, values[name])
            else:
                assert value.is_meta


def test_all_values_are_everywhere_if_that_is_wanted() -> None:
    value = torch.randn(4)
    found, _ = on_all(3, lambda lines, rank: spread(lines, rank, {"a": value} if rank == 1 else {}, {"a": 1}, "all"))
    assert all(torch.equal(each["a"], value) for each in found)
