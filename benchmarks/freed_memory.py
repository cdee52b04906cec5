"""What it costs to keep little freed memory: CPU seconds of a training step under settings of glibc's allocator.

    python benchmarks/freed_memory.py --width 512 --runs 3

Each run is a process of its own, in turn: glibc's own settings, those that pipelines of several processes set
(``pipecompile/ops/freed_memory.py``), and ``MALLOC_MMAP_THRESHOLD_`` of 4 MiB. Four transformer layers are trained in
two stages of one process, one thread each. Also shown: page faults of a step, and resident memory at the end.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

from pipecompile.ops.freed_memory import IN_ARENAS, KEPT

SETTINGS = {
    "glibc's own": {},
    "keeps little": {"MALLOC_TRIM_THRESHOLD_": str(KEPT), "MALLOC_MMAP_THRESHOLD_": str(IN_ARENAS)},
    "keeps no large blocks": {"MALLOC_MMAP_THRESHOLD_": str(4 << 20)},
}


def run(width: int, rows: int) -> None:
    import torch
    from torch import nn

    import pipecompile

    torch.set_num_threads(1)
    torch.manual_seed(0)
    layers = [nn.TransformerEncoderLayer(width, 8, 4 * width, dropout=0.0, batch_first=True) for _ in range(4)]
    x = torch.randn(rows, 128, width)
    pipe = pipecompile.compile(
        nn.Sequential(*layers),
        ["cpu"] * 2,
        loss_fn=nn.functional.mse_loss,
        microbatches=4,
        costs="count",
        verify="never",
        example_inputs=((x,), {"target": x}),
    )
    optimizer = torch.optim.SGD(pipe.parameters(), lr=0.01)
    seen = []
    for _ in range(12):
        start, faults = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        pipe(x, target=x).backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append((time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults))
    seconds, faults = (median(each) for each in zip(*seen[3:], strict=True))
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    resident = next(int(line.split()[1]) for line in lines if line.startswith("Rss:")) / 1024
    print(f"{seconds:.3f} s of CPU time, {faults:.0f} page faults, {resident:.0f} MiB resident", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)  # of a run that this script has started
    given = parser.parse_args()
    if given.one:
        return run(given.width, given.rows)
    again = [sys.executable, __file__, "--one", "--width", str(given.width), "--rows", str(given.rows)]
    for _ in range(given.runs):
        for name, setting in SETTINGS.items():
            print(f"{name:22}", end="", flush=True)
            subprocess.run(again, env=os.environ | setting, check=True)
    return None


if __name__ == "__main__":
    main()
