"""How long a step takes over several gloo processes, beside torch.distributed.pipelining in the same processes.

    python benchmarks/distributed.py
    python benchmarks/distributed.py --processes 4 --sizes small --rounds 31

GPT-2 of transformers with random weights, cut before the same layers. torch.distributed.pipelining cannot sum the
gradients of a tied weight, so the head has weights of its own; its stage modules are built by hand from the blocks of
the same model, with the loss in the last stage. Forward and backward of one batch; the optimizer's step is left out.
All ways run in turn in every round, each from a barrier to the end of the slowest process. Ours ends with the loss
known in every process, torch's with the loss in the last one. One thread per process.

"Compute" is what the busiest process needs for its stage alone, without any transfer, while all do so at once: no
pipeline can be faster. A step also has the bubble, and with few cores other processes disturb it.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
import torch.distributed as dist
from gpt import Setting, hugging_face
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

import pipecompile
from pipecompile import PlanOptions
from pipecompile.distributed.near import Outlet
from pipecompile.distributed.packet import Part

SIZES = {
    "tiny": Setting(layers=4, width=64, vocabulary=512, length=32, batch=8, microbatches=4),
    "small": Setting(layers=4, width=256, vocabulary=2048, length=64, batch=8, microbatches=4),
    "medium": Setting(layers=8, width=384, vocabulary=4096, length=64, batch=8, microbatches=8),
    "large": Setting(layers=12, width=768, vocabulary=8192, length=32, batch=8, microbatches=8),
}
SCHEDULES = {"1f1b": Schedule1F1B, "gpipe": ScheduleGPipe}
console = Console(width=120)
Run = Callable[[], float | None]  # one step; the loss, where it is known


@dataclass
class Way:
    """One way to run a step: the seconds of its slowest process and the processor seconds of all, in each round."""

    name: str
    module: nn.Module
    run: Run
    seconds: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    own: float = 0.0  # the last seconds of this process
    loss: float = 0.0

    def step(self) -> None:
        for parameter in self.module.parameters():
            parameter.grad = None
        dist.barrier()
        start, cpu = time.perf_counter(), time.process_time()
        loss = self.run()
        self.own = time.perf_counter() - start
        found = gathered((self.own, time.process_time() - cpu, loss))
        self.seconds.append(max(seconds for seconds, _, _ in found))
        self.processor.append(sum(seconds for _, seconds, _ in found))
        self.loss = found[-1][2]

    def forget(self) -> None:
        self.seconds.clear()
        self.processor.clear()


class First(nn.Module):
    """The embeddings and the first blocks."""

    def __init__(self, model: Any, blocks: nn.ModuleList) -> None:
        super().__init__()
        self.tokens, self.positions, self.blocks = model.transformer.wte, model.transformer.wpe, blocks

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        return through(self.blocks, hidden)


class Middle(nn.Module):
    def __init__(self, blocks: nn.ModuleList) -> None:
        super().__init__()
        self.blocks = blocks

    def forward(self, hidden: Tensor) -> Tensor:
        return through(self.blocks, hidden)


class Last(nn.Module):
    """The last blocks and the logits."""

    def __init__(self, model: Any, blocks: nn.ModuleList) -> None:
        super().__init__()
        self.blocks, self.norm, self.head = blocks, model.transformer.ln_f, model.lm_head

    def forward(self, hidden: Tensor) -> Tensor:
        return self.head(self.norm(through(self.blocks, hidden)))


def through(blocks: nn.ModuleList, hidden: Tensor) -> Tensor:
    for block in blocks:
        found = block(hidden)
        hidden = found if isinstance(found, Tensor) else found[0]
    return hidden


def cuts_of(setting: Setting, stages: int) -> list[int]:
    """The first layer of each stage, and the number of layers: as even as can be by multiplications."""
    layer = 12 * setting.width**2 + 2 * setting.length * setting.width
    whole = setting.layers * layer + setting.vocabulary * setting.width
    return [min(round(stage * whole / stages / layer), setting.layers) for stage in range(stages)] + [setting.layers]


def stage_module(model: Any, cuts: Sequence[int], rank: int) -> nn.Module:
    blocks = model.transformer.h[cuts[rank] : cuts[rank + 1]]
    if rank == 0:
        return First(model, blocks)
    return Middle(blocks) if rank < len(cuts) - 2 else Last(model, blocks)


def pins_of(cuts: Sequence[int]) -> dict[str, int]:
    last = len(cuts) - 2
    stages = {f"transformer.h.{layer}": s for s in range(last + 1) for layer in range(cuts[s], cuts[s + 1])}
    ends = {"transformer.wte": 0, "transformer.wpe": 0, "transformer.ln_f": last, "lm_head": last}
    return {**stages, **ends}


def built(setting: Setting) -> Any:
    return hugging_face(setting, tie_word_embeddings=False)


def ours(setting: Setting, schedule: str, cuts: Sequence[int]) -> tuple[Any, Run]:
    """A pipeline, and a step of it."""
    inputs = dict(zip(("input_ids", "labels"), setting.tokens(), strict=True))
    pipe = pipecompile.compile(
        built(setting),
        mesh=init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("stage",)),
        schedule=schedule,
        microbatches=setting.microbatches,
        outputs="loss",
        plan=PlanOptions(pins=pins_of(cuts)),
        costs="count",
        example_inputs=((), inputs),
    )

    def run() -> float:
        loss = pipe(**inputs).loss
        loss.backward()
        return loss.item()

    return pipe, run


def theirs(setting: Setting, schedule: str, module: nn.Module, loss_of: Callable[..., Tensor]) -> Run:
    rank, size = dist.get_rank(), dist.get_world_size()
    stage = PipelineStage(module, rank, size, torch.device("cpu"))
    runner = SCHEDULES[schedule](stage, setting.microbatches, loss_fn=loss_of)
    ids, labels = setting.tokens()

    def run() -> float | None:
        losses: list[Tensor] = []
        if rank == 0:
            runner.step(ids, return_outputs=False)
        elif rank == size - 1:
            runner.step(target=labels, losses=losses, return_outputs=False)
        else:
            runner.step(return_outputs=False)
        return sum(loss.item() for loss in losses) / len(losses) if losses else None

    return run


def compute(setting: Setting, module: nn.Module, loss_of: Callable[..., Tensor]) -> Run:
    """Forwards and backwards of all microbatches of this process's stage, without transfers."""
    rank, size = dist.get_rank(), dist.get_world_size()
    chunks = [tensor.chunk(setting.microbatches) for tensor in setting.tokens()]
    hidden = torch.randn(setting.batch // setting.microbatches, setting.length, setting.width)

    def run() -> None:
        for ids, labels in zip(*chunks, strict=True):
            output = module(ids if rank == 0 else hidden.detach().requires_grad_())
            if rank == size - 1:
                (loss_of(output, labels) / setting.microbatches).backward()
            else:
                output.backward(hidden)

    return run


@contextmanager
def messages() -> Iterator[list[int]]:
    """The bytes of each message that this process sends meanwhile; for pipecompile alone."""
    send, put, seen = dist.isend, Outlet.put, list[int]()

    def isend(tensor: Tensor, *args: Any) -> Any:
        seen.append(tensor.nbytes)
        return send(tensor, *args)

    def counted(outlet: Outlet, parts: Sequence[Part]) -> None:
        seen.append(sum(map(len, parts)))
        put(outlet, parts)

    dist.isend, Outlet.put = isend, counted  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        dist.isend, Outlet.put = send, put  # type: ignore[method-assign]


class Clocks:
    """The seconds that methods of a pipeline's processes take in each step."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.seconds: dict[str, float] = {}
        self.steps: list[dict[str, float]] = []
        session = pipe.pipeline._session
        for name in ("agree", "shared"):
            self._clock(session.peers, name)
        self._clock(session, "run")

    def _clock(self, owner: Any, name: str) -> None:
        method = getattr(owner, name)

        def clocked(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

        setattr(owner, name, clocked)

    def end_step(self, whole: float) -> None:
        timeline, rank = self.pipe.pipeline.timeline, dist.get_rank()
        inside = sum(self.seconds.values())
        found = {
            "agree on the call": self.seconds.get("agree", 0.0),
            "share seeds": self.seconds.get("shared", 0.0),
            "start and end the program": self.seconds["run"] - timeline.makespan,
            "compute": timeline.busy(rank),
            "wait, send, share the loss": timeline.makespan - timeline.busy(rank),
            "the rest: guards, microbatches, gradients": whole - inside,
        }
        self.steps.append(found)
        self.seconds.clear()

    def medians(self) -> dict[str, float]:
        return {name: median(step[name] for step in self.steps) for name in self.steps[0]}


def measure(name: str, setting: Setting, rounds: int) -> Mapping[str, Any]:
    """Measures all ways for one size, in all processes."""
    rank, size = dist.get_rank(), dist.get_world_size()
    cuts = cuts_of(setting, size)
    pipes, ways = {}, []
    for schedule in SCHEDULES:
        model = built(setting)

        def loss_of(logits: Tensor, labels: Tensor, model: Any = model) -> Tensor:
            return model.loss_function(logits, labels, vocab_size=setting.vocabulary)

        module = stage_module(model, cuts, rank)
        pipes[schedule], run = ours(setting, schedule, cuts)
        ways += [
            Way(f"pipecompile, {schedule}", pipes[schedule], run),
            Way(f"torch, {schedule}", module, theirs(setting, schedule, module, loss_of)),
        ]
    ways.append(Way("compute", module, compute(setting, module, loss_of)))
    for way in ways:
        for _ in range(3):
            way.step()
        way.forget()
    with messages() as sent:
        ways[0].step()
    ways[0].forget()
    clocks = Clocks(pipes["1f1b"])
    for number in range(rounds):
        for way in ways if number % 2 else reversed(ways):
            way.step()
            if way is ways[0]:
                clocks.end_step(way.own)
            elif way.name.startswith("pipecompile"):
                clocks.seconds.clear()
    sizes = gathered(sent)
    parts = gathered(clocks.medians())
    for pipe in pipes.values():
        pipe.pipeline.close()
    return {
        "size": name,
        "cuts": cuts,
        "seconds": {way.name: way.seconds for way in ways},
        "processor": {way.name: way.processor for way in ways},
        "losses": {way.name: way.loss for way in ways},
        "messages": [len(each) for each in sizes],
        "bytes": [sum(each) for each in sizes],
        "parts": parts,
    }


def gathered(value: Any) -> list[Any]:
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def show(results: Sequence[Mapping[str, Any]]) -> None:
    names = ("pipecompile", "torch", "ours / torch", "quartiles", "processor", "compute", "loss", "torch's")
    table = Table("GPT-2", "schedule", *names)
    for result in results:
        seconds, losses = result["seconds"], result["losses"]
        for schedule in SCHEDULES:
            one, other = (f"{who}, {schedule}" for who in ("pipecompile", "torch"))
            low, middle, high = quantiles(quotients(seconds[one], seconds[other]), n=4)
            processor = median(quotients(*(result["processor"][way] for way in (one, other))))
            table.add_row(
                result["size"],
                schedule,
                *(f"{1e3 * median(seconds[way]):.2f} ms" for way in (one, other)),
                f"{middle:.3f}",
                f"{low:.3f} to {high:.3f}",
                f"{processor:.3f}",
                f"{1e3 * median(seconds['compute']):.2f} ms",
                *(f"{losses[way]:.6f}" for way in (one, other)),
            )
    console.print(table)
    for result in results:
        parts = result["parts"]
        ranks = [f"rank {rank}" for rank in range(len(parts))]
        table = Table(f"ms of a step, {result['size']}, 1f1b", *ranks)
        for name in parts[0]:
            table.add_row(name, *(f"{1e3 * part[name]:.2f}" for part in parts))
        table.add_row("messages sent", *map(str, result["messages"]))
        table.add_row("bytes sent", *(f"{nbytes:,}" for nbytes in result["bytes"]))
        console.print(f"cut before layers {', '.join(map(str, result['cuts'][1:-1]))}", table)


def quotients(one: Sequence[float], other: Sequence[float]) -> list[float]:
    """Round by round, so that what disturbs a round disturbs both."""
    return [a / b for a, b in zip(one, other, strict=True)]


def work(rank: int, options: argparse.Namespace, port: int) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(options.processes))
    dist.init_process_group("gloo")
    results = [measure(name, SIZES[name], options.rounds) for name in options.sizes.split(",")]
    if rank == 0:
        console.print(f"torch {torch.__version__}, {os.cpu_count()} cores, {options.processes} processes")
        show(results)
        if options.json:
            options.json.write_text(json.dumps(results, indent=1))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--sizes", default=",".join(SIZES), help=f"of {', '.join(SIZES)}")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--json", type=Path, help="where all seconds are written")
    options = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(work, (options, port), options.processes)


if __name__ == "__main__":
    main()
