"""What travels along rings, between threads that stand for ranks."""

from __future__ import annotations

from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any

import pytest
import torch

from pipecompile.distributed.exchange import exchange

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
        return lambda: self.queues[peer, self.rank].get(timeout=300)


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
    found, sent = on_all(size, lambda lines, rank: exchange(lines, rank, torch.tensor([rank, 10 * rank]))())
    expected = [[rank, 10 * rank] for rank in range(size)]
    assert [[t.tolist() for t in each] for each in found] == [expected] * size
    assert sent == [(size - 1).bit_length()] * size
