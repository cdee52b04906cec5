"""What each process of a mesh with the dimension "data" holds: whole stages, ZeRO's optimizer state, or fully_shard.

    python benchmarks/sharded_memory.py --parts 2 --stages 2

A chain of ``--blocks`` blocks of ``--mib`` MiB is trained with AdamW, over gloo on this machine. Resident memory is Rss
of /proc/self/smaps_rollup less that of the same rank with a model of a few bytes; the most over the ranks is shown:

    before a step    after one step, gradients dropped: parameters and the optimizer's state
    with gradients   after backward(), before the optimizer's step
    most in a step   the most at any time of a step (VmHWM)

The ranks have MALLOC_MMAP_THRESHOLD_ of 4 MiB, so that freed memory is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from distributed_memory import MIB, most_resident, resident

WIDTH, ROWS = 512, 8
WAYS = {"whole": "whole", "zero": "ZeroRedundancyOptimizer", "shard": "fully_shard=True"}


def rank_of_a_mesh(way: str, parts: int, blocks: int, hidden: int, folder: Path) -> None:
    """Measures one rank, and leaves what it saw in a file."""
    import torch
    import torch.distributed as dist
    from torch import Tensor, nn
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.optim import ZeroRedundancyOptimizer

    import pipecompile

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(WIDTH, hidden, bias=False), nn.Linear(hidden, WIDTH, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.down(torch.relu(self.up(x)))

    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with torch.device("meta"):
        model = nn.Sequential(*(Block() for _ in range(blocks)))
    mesh = init_device_mesh("cpu", (parts, dist.get_world_size() // parts), mesh_dim_names=("data", "stage"))
    x = torch.randn(ROWS, WIDTH)
    options: dict[str, Any] = {"microbatches": 2, "costs": "count", "loss_fn": nn.functional.mse_loss}
    pipe = pipecompile.compile(
        model, mesh=mesh, example_inputs=((x,), {"target": x}), fully_shard=way == "shard", **options
    )
    adamw = partial(torch.optim.AdamW, foreach=False)
    if way == "zero":
        adamw = partial(
            ZeroRedundancyOptimizer, optimizer_class=torch.optim.AdamW, process_group=mesh.get_group("data")
        )
    seen = {}
    with pipe.pipeline:
        optimizer = adamw(pipe.parameters(), lr=1e-3)
        for _ in range(2):
            seen["before a step"] = resident()
            Path("/proc/self/clear_refs").write_text("5")
            pipe(x, target=x).backward()
            seen["with gradients"] = resident()
            optimizer.step()
            optimizer.zero_grad()
            seen["most in a step"] = most_resident()
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(seen))
    dist.destroy_process_group()


def run(way: str, parts: int, stages: int, blocks: int, hidden: int) -> list[dict[str, int]]:
    """What each rank of a mesh saw."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    size = parts * stages
    surroundings = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(size)}
    surroundings["MALLOC_MMAP_THRESHOLD_"] = str(4 * MIB)
    with tempfile.TemporaryDirectory() as name:
        told = ["--way", way, "--parts", str(parts), "--blocks", str(blocks), "--hidden", str(hidden)]
        ranks = [
            subprocess.Popen(
                [sys.executable, __file__, *told, "--folder", name], env=surroundings | {"RANK": str(rank)}
            )
            for rank in range(size)
        ]
        codes = [rank.wait() for rank in ranks]
        if any(codes):
            sys.exit("a rank failed")
        return [json.loads(Path(name, f"{rank}.json").read_text()) for rank in range(size)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=int, default=2)
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--mib", type=int, default=32, help="of each block")
    parser.add_argument("--way", help=argparse.SUPPRESS)  # of a rank that this script has started
    parser.add_argument("--hidden", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.way:
        return rank_of_a_mesh(given.way, given.parts, given.blocks, given.hidden, given.folder)
    shape = (given.parts, given.stages, given.blocks)
    print(f"{given.parts} x {given.stages}, stages of {given.blocks // given.stages * given.mib} MiB; MiB of a rank")
    for way, title in WAYS.items():
        empty, found = run(way, *shape, 8), run(way, *shape, given.mib * MIB // (2 * 4 * WIDTH))
        most = {key: max(it[key] - base[key] for it, base in zip(found, empty, strict=True)) for key in found[0]}
        print(title, *(f"{key}: {nbytes / MIB:.1f}" for key, nbytes in most.items()), sep="   ", flush=True)
    return None


if __name__ == "__main__":
    main()
