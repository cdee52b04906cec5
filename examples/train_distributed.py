"""Trains GPT-2 over several processes, one for each stage, on one machine or many.

    torchrun --nproc-per-node 4 examples/train_distributed.py --steps 20
    torchrun --nproc-per-node 4 examples/train_distributed.py --parts 2
    torchrun --nproc-per-node 4 examples/train_distributed.py --checkpoints runs/gpt2 --every 5

The second one has two pipelines of two stages, each for one half of every batch; its losses are those of the first one.
The third one saves its state every five steps. Whenever it is started, also with another number of processes, it goes
on from the latest checkpoint, with the losses that it would have had. docs/checkpoints.md has the command with which
torchrun itself starts it again.

Every process runs this script and makes the same calls, on its part of each batch. The first one plans; each then has
the weights of its own stage only. The loss is known to all of them, other outputs to the process that makes them.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from train_gpt2 import (
    batches,
    console,
    go_offline_unless_the_hub_answers,
    load_model,
    load_texts,
    load_tokenizer,
    training_options,
)

import pipecompile


def main() -> None:
    options = _options()
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    console.quiet = rank > 0
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)  # the same model and batches in every process
    go_offline_unless_the_hub_answers()
    texts = load_texts()
    tokenizer = load_tokenizer(texts)
    model = load_model(tokenizer, options.width)
    mesh = init_device_mesh("cpu", (options.parts, size // options.parts), mesh_dim_names=("data", "stage"))
    part = mesh.get_local_rank("data")
    data = [
        {name: tensor.chunk(options.parts)[part] for name, tensor in batch.items()}
        for batch in batches(texts, tokenizer, options.batch, options.steps)
    ]
    pipe = pipecompile.compile(
        model,
        mesh=mesh,
        schedule=options.schedule,
        microbatches=options.microbatches // options.parts,
        example_inputs=data[0],
    )
    optimizer = torch.optim.Adam(pipe.parameters(), lr=options.learning_rate)  # of this process's stage
    first = 0
    if options.checkpoints and (path := pipecompile.latest(options.checkpoints)):
        first = pipecompile.load(path, pipe, optimizer)["step"]
        console.print(f"goes on from {path}")
    with pipe.pipeline:
        for step, batch in enumerate(data[first:], first):
            start = time.perf_counter()
            loss = pipe(**batch).loss
            loss.backward()
            norm = pipe.pipeline.clip_grad_norm_(1.0)  # of the whole model
            optimizer.step()
            optimizer.zero_grad()
            if step % 5 == 0 or step == options.steps - 1:
                seconds = time.perf_counter() - start
                console.print(f"step {step:3d}   loss {loss.item():.4f}   norm {norm.item():.2f}   {seconds:.2f} s")
            if options.checkpoints and (step + 1) % options.every == 0:
                path = options.checkpoints / f"step_{step + 1}"
                pipecompile.save(path, pipe, optimizer, extra={"step": step + 1}, keep=2, asynchronous=True)
        own = sum(parameter.numel() for parameter in pipe.parameters()) / 1e6
        print(f"rank {rank} trained {own:.2f} of {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M", flush=True)
    dist.destroy_process_group()


def _options() -> argparse.Namespace:
    parser = training_options(__doc__, microbatches=8, batch=16, steps=20)
    parser.add_argument("--parts", type=int, default=1, help="of each batch, each with a pipeline of its own")
    parser.add_argument("--checkpoints", type=Path, help="where to save, and to go on from")
    parser.add_argument("--every", type=int, default=10, help="steps between two checkpoints")
    return parser.parse_args()


if __name__ == "__main__":
    main()
