"""Scenes of processes that measure their links, or are told what they have measured."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, pairwise

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import pipecompile
from pipecompile.distributed import processes
from pipecompile.distributed.lines import Lines
from pipecompile.distributed.measure import SIZES, Measured, measure
from pipecompile.ir.cluster import Cluster, Link

FAST, SLOW = Link(bandwidth=1e12, latency=0.0), Link(bandwidth=1e7, latency=0.0)
WIDE, NARROW, ROWS = 512, 4, 6


class Waists(nn.Module):
    """Two dear layers between wide values, and cheap ones at narrow values: a wide cut between the two is balanced."""

    def __init__(self) -> None:
        super().__init__()
        widths = [WIDE, NARROW, WIDE, WIDE, WIDE, NARROW, WIDE]
        self.layers = nn.ModuleList(nn.Linear(one, other) for one, other in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).relu()
        return x.square().mean()


def _compiled(**options: object) -> object:
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("stage",))
    return pipecompile.compile(Waists(), mesh=mesh, microbatches=3, example_inputs=torch.randn(ROWS, WIDE), **options)


def measures() -> tuple[list[tuple[int, int]], tuple[str, ...]]:
    """The pairs that all ranks have measured, and what the report says of links."""
    seen = list[Measured]()

    def seeing(lines: Lines, rank: int, host: str) -> Measured:
        seen.append(measure(lines, rank, host))
        return seen[0]

    processes.measure = seeing
    pipe = _compiled()
    box: list[dict[tuple[int, int], object]] = [{}] * dist.get_world_size()
    dist.all_gather_object(box, seen[0].trips)
    pipe.pipeline.close()
    return sorted(pair for trips in box for pair in trips), pipe.pipeline.report.links


def plans(far: int) -> tuple[list[int], list[int]]:
    """The bytes of the values that stages send over fast links, and over slow ones: those of one rank."""

    def told(lines: Lines, rank: int, host: str) -> Measured:
        links = {pair: SLOW if far in pair else FAST for pair in combinations(range(3), 2)}
        trips = {p: tuple(link.seconds(n) for n in SIZES) for p, link in links.items() if p[0] == rank}
        return Measured(host, 0.01, trips)

    processes.measure = told
    counted = _compiled(costs="count")  # of operations, so that nothing depends on what else the machine does
    costs = replace(counted.pipeline.costs, measured=True)
    counted.pipeline.close()
    pipe = _compiled(costs=costs)
    plan = pipe.pipeline.plan
    sent = [(far in (plan.rank_of[c.source], plan.rank_of[c.target]), c.nbytes) for c in plan.channels]
    pipe(torch.randn(ROWS, WIDE)).backward()
    pipe.pipeline.close()
    return [n for is_far, n in sent if not is_far], [n for is_far, n in sent if is_far]


def given() -> tuple[str, int]:
    """Where the links of the plan come from, and how often they were measured."""
    count = list[int]()
    processes.measure = lambda *_: count.append(1)
    pipe = _compiled(cluster=Cluster.of(["cpu", "cpu"]))
    found = pipe.pipeline._batches.first.planned.cluster.origin
    pipe.pipeline.close()
    return found, len(count)
