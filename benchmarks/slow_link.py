"""Where the planner cuts if one host has a slow link: three network namespaces as hosts, on one machine.

    sudo python benchmarks/slow_link.py --megabits 20

Each namespace has an address on a bridge; ``tc`` limits the rate of the last one, in both directions. A chain of wide
layers with one narrow value, away from the middle, is trained over the three, once planned with the links that the
processes measure, and once as if all links were equal. Both run in turn.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import pipecompile
from pipecompile.ir.cluster import Cluster

HOSTS, NETWORK, BRIDGE = 3, "10.213.77", "pcbridge"
WIDE, NARROW, BEFORE, AFTER = 1024, 16, 9, 4  # widths, and values before and after the narrow one
ROWS, MICROBATCHES = 512, 4
console = Console(width=120)


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        widths = [*[WIDE] * BEFORE, NARROW, *[WIDE] * AFTER]
        self.layers = nn.ModuleList(nn.Linear(one, other) for one, other in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).relu()
        return x.square().mean()


@contextmanager
def hosts(megabits: float) -> Iterator[list[str]]:
    """The names of namespaces that are connected, the last one by a slow link."""
    switch, names = f"{BRIDGE}0", [f"pchost{host}" for host in range(HOSTS)]
    slow = f"tbf rate {megabits}mbit burst 64kbit latency 1s"
    try:
        for name in (switch, *names):
            run(f"ip netns add {name}")
            run(f"ip -n {name} link set lo up")
        run(f"ip -n {switch} link add {BRIDGE} type bridge")
        run(f"ip -n {switch} link set {BRIDGE} up")
        for host, name in enumerate(names):
            run(f"ip link add pc0 netns {name} type veth peer name port{host} netns {switch}")
            run(f"ip -n {switch} link set port{host} master {BRIDGE} up")
            run(f"ip -n {name} addr add {NETWORK}.{host + 1}/24 dev pc0")
            run(f"ip -n {name} link set pc0 up")
        run(f"ip netns exec {names[-1]} tc qdisc add dev pc0 root {slow}")
        run(f"ip netns exec {switch} tc qdisc add dev port{HOSTS - 1} root {slow}")
        yield names
    finally:
        for name in (*names, switch):
            subprocess.run(["ip", "netns", "del", name], check=False, stderr=subprocess.DEVNULL)


def run(command: str) -> None:
    subprocess.run(command.split(), check=True)


def measure(rounds: int) -> None:
    """What each rank runs; the first one prints."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    batch = torch.randn(ROWS, WIDE, generator=torch.Generator().manual_seed(0))
    clusters = {"measured": None, "taken for equal": Cluster.of(["cpu"] * HOSTS)}
    pipes = {name: compiled(batch, cluster) for name, cluster in clusters.items()}
    seconds: dict[str, list[float]] = {name: [] for name in pipes}
    for _ in range(1 + rounds):
        for name, pipe in pipes.items():
            pipe.zero_grad()
            dist.barrier()
            start = time.perf_counter()
            pipe(batch).backward()
            dist.barrier()
            seconds[name].append(time.perf_counter() - start)
    if dist.get_rank() == 0:
        show(pipes, seconds)
    for pipe in pipes.values():
        pipe.pipeline.close()
    dist.barrier()
    dist.destroy_process_group()


def compiled(batch: Tensor, cluster: Cluster | None) -> Any:
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (HOSTS,), mesh_dim_names=("stage",))
    options: dict[str, Any] = {"microbatches": MICROBATCHES, "cluster": cluster, "example_inputs": batch}
    return pipecompile.compile(Chain(), mesh=mesh, **options)


def show(pipes: dict[str, Any], seconds: dict[str, list[float]]) -> None:
    table = Table("links", "bytes of a microbatch over each cut, by ranks", "to the slow host", "step")
    for name, pipe in pipes.items():
        plan = pipe.pipeline.plan
        cuts = [(plan.rank_of[c.source], plan.rank_of[c.target], c.nbytes) for c in plan.channels]
        far = sum(nbytes for one, other, nbytes in cuts if HOSTS - 1 in (one, other))
        words = ", ".join(f"{one} to {other}: {nbytes:,}" for one, other, nbytes in cuts)
        table.add_row(name, words, f"{far:,}", f"{median(seconds[name][1:]):.3f} s")
    console.print(*pipes["measured"].pipeline.report.links, table, sep="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabits", type=float, default=20.0, help="per second, of the slow link")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    if "RANK" in os.environ:
        return measure(options.rounds)
    again = [sys.executable, __file__, "--rounds", str(options.rounds)]
    shared = {"WORLD_SIZE": str(HOSTS), "MASTER_ADDR": f"{NETWORK}.1", "MASTER_PORT": "29577"}
    shared |= {"GLOO_SOCKET_IFNAME": "pc0", "OMP_NUM_THREADS": "1"}
    with hosts(options.megabits) as names:
        ranks = [
            subprocess.Popen(["ip", "netns", "exec", name, *again], env=os.environ | shared | {"RANK": str(rank)})
            for rank, name in enumerate(names)
        ]
        for rank in ranks:
            rank.wait()
    return None


if __name__ == "__main__":
    main()
