"""What each process of a pipeline holds beyond its own share of the model.

    python benchmarks/distributed_memory.py --blocks 8 --mib 32 --ranks 2 4 8

Each rank is a process of its own, over gloo on this machine. Three ways to give the model its values: it is built whole
in every process before ``compile``; it is on the meta device and read from a checkpoint; or initialised by its own
initialisers. Resident memory is Rss of /proc/self/smaps_rollup: after ``compile`` has planned and filled the model, and
after one training step of SGD without momentum, before the gradients are dropped.

Own share: parameters and buffers of the rank, and after the step as many bytes of gradients. Beyond: what is resident
more than the own share and an empty rank, which is the same rank of the same script with a model of a few bytes. The
most over the ranks is shown, and the most that was resident at any time (VmHWM) beyond the same two.

glibc keeps freed memory at the end of the arena of each thread. Pipelines of several processes set how much
(``pipecompile/ops/freed_memory.py``); ``--mmap-threshold 4`` sets the environment variable that makes it give blocks of
4 MiB and more back at once instead.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MIB = 2**20
WIDTH, ROWS = 512, 8
WAYS = {"built": "built whole", "checkpoint": "from a checkpoint", "initialisers": "own initialisers"}
EMPTY = "empty"


def rank_of_a_pipeline(way: str, blocks: int, hidden: int, folder: Path) -> None:
    """Measures one rank, and leaves what it saw in a file."""
    import torch
    import torch.distributed as dist
    from torch import Tensor, nn
    from torch.distributed.device_mesh import init_device_mesh

    import pipecompile
    from pipecompile.ops.away import is_away

    class Block(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(width, hidden, bias=False), nn.Linear(hidden, width, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.down(torch.relu(self.up(x)))

    class Model(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.blocks = nn.Sequential(*(Block(width) for _ in range(blocks)))

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks(x).square().mean()

    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    width = 8 if way == EMPTY else WIDTH
    with torch.device("cpu" if way in (EMPTY, "built") else "meta"):
        model = Model(width)
    path = folder / "model.safetensors" if way == "checkpoint" else None
    x = torch.randn(ROWS, width)
    pipe = pipecompile.compile(
        model,
        mesh=init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("stage",)),
        microbatches=4,
        costs="count",
        example_inputs=(x,),
        from_checkpoint=path,
    )
    with pipe.pipeline:
        optimizer = torch.optim.SGD(pipe.parameters(), lr=0.1, foreach=False)
        if way in (EMPTY, "built"):  # what is whole is split by the first call
            with torch.no_grad():
                pipe(x)
        planned = resident()
        pipe(x).backward()
        optimizer.step()
        stepped = resident()
        share = sum(p.nbytes for p in model.parameters() if not is_away(p))
        gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    seen = {"planned": planned, "stepped": stepped, "share": share, "gradients": gradients, "most": most_resident()}
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(seen))
    dist.destroy_process_group()


def resident() -> int:
    """Bytes of this process that are in memory."""
    return _kilobytes("/proc/self/smaps_rollup", "Rss:") * 1024


def most_resident() -> int:
    return _kilobytes("/proc/self/status", "VmHWM:") * 1024


def _kilobytes(file: str, name: str) -> int:
    return next(int(line.split()[1]) for line in Path(file).read_text().splitlines() if line.startswith(name))


def run(way: str, size: int, blocks: int, mib: int, threshold: int | None, folder: Path) -> list[dict[str, Any]]:
    """What each rank of a pipeline saw."""
    hidden = 8 if way == EMPTY else mib * MIB // (2 * 4 * WIDTH)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    surroundings = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(size)}
    if threshold is not None:
        surroundings["MALLOC_MMAP_THRESHOLD_"] = str(threshold * MIB)
    told = ["--way", way, "--blocks", str(blocks), "--hidden", str(hidden), "--folder", str(folder)]
    ranks = [
        subprocess.Popen([sys.executable, __file__, *told], env=surroundings | {"RANK": str(rank)})
        for rank in range(size)
    ]
    codes = [rank.wait() for rank in ranks]
    if any(codes):
        sys.exit("a rank failed")
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(size)]


def save_checkpoint(blocks: int, mib: int, folder: Path) -> None:
    import torch
    from safetensors.torch import save_file

    hidden = mib * MIB // (2 * 4 * WIDTH)
    shapes = {"up": (hidden, WIDTH), "down": (WIDTH, hidden)}
    names = {f"blocks.{i}.{name}.weight": shape for i in range(blocks) for name, shape in shapes.items()}
    save_file({name: torch.full(shape, 0.01) for name, shape in names.items()}, folder / "model.safetensors")


def table(sizes: Sequence[int], blocks: int, mib: int, threshold: int | None) -> None:
    from rich.console import Console
    from rich.table import Table

    shown = Table(title=f"{blocks} blocks of {mib} MiB; MiB of the rank with the most")
    for column in ("ranks", "model", "own share", "beyond, planned", "beyond, stepped", "beyond, at any time"):
        shown.add_column(column, justify="left" if column == "model" else "right")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_checkpoint(blocks, mib, folder)
        for size in sizes:
            empty = run(EMPTY, size, blocks, mib, threshold, folder)
            for way, title in WAYS.items():
                found = list(zip(run(way, size, blocks, mib, threshold, folder), empty, strict=True))
                share = [(it["share"], it["gradients"]) for it, _ in found]
                planned = [it["planned"] - base["planned"] - it["share"] for it, base in found]
                both = [it["share"] + it["gradients"] for it, _ in found]
                stepped = [it["stepped"] - base["stepped"] - own for (it, base), own in zip(found, both, strict=True)]
                most = [it["most"] - base["most"] - own for (it, base), own in zip(found, both, strict=True)]
                cells = (max(weights for weights, _ in share), max(planned), max(stepped), max(most))
                shown.add_row(str(size), title, *(f"{nbytes / MIB:.1f}" for nbytes in cells))
                print(size, title, *(f"{nbytes / MIB:.1f}" for nbytes in cells), file=sys.stderr, flush=True)
    Console(width=110).print(shown)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--mib", type=int, default=32, help="of each block")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--mmap-threshold", type=int, metavar="MIB", help="MALLOC_MMAP_THRESHOLD_ of the ranks")
    parser.add_argument("--way", help=argparse.SUPPRESS)  # of a rank that this script has started
    parser.add_argument("--hidden", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.way:
        rank_of_a_pipeline(given.way, given.blocks, given.hidden, given.folder)
    else:
        table(given.ranks, given.blocks, given.mib, given.mmap_threshold)


if __name__ == "__main__":
    main()
