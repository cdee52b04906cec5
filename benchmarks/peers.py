"""One training step of a sequential model by other pipelines, cut before a given layer, on two CPU devices.

torchgpipe runs in this process: two workers forward; backward, autograd's engine has one thread for all CPU devices.
torch.distributed.pipelining runs 1F1B in two processes over gloo, which sleep on a pipe between steps.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, multiprocessing, nn

Step = Callable[[], tuple[float, float]]  # seconds and loss


@dataclass(frozen=True)
class Task:
    """What is trained; its functions are sent to other processes by name.

    Attributes:
        model: Makes the model, always with the same weights.
        batch: Makes inputs and targets, always the same.
        loss: Of an output and a target.
        microbatches: How many.
    """

    model: Callable[[], nn.Sequential]
    batch: Callable[[], tuple[Tensor, Tensor]]
    loss: Callable[[Tensor, Tensor], Tensor]
    microbatches: int


def torchgpipe_step(task: Task, cut: int) -> Step:
    """Raises ImportError where torchgpipe is not installed."""
    from torchgpipe import GPipe

    model = task.model()
    balance = [cut, len(model) - cut]
    # "cpu" and "cpu:0" are one device, but torchgpipe gives each name a worker of its own
    pipe = GPipe(model, balance, devices=["cpu", "cpu:0"], chunks=task.microbatches, checkpoint="never")
    inputs, targets = task.batch()

    def step() -> tuple[float, float]:
        model.zero_grad()
        start = time.perf_counter()
        loss = task.loss(pipe(inputs), targets)
        loss.backward()
        return time.perf_counter() - start, loss.item()

    return step


class TwoProcesses:
    """Two gloo processes that ``serve`` a pipe; each call is one step of both, timed to the end of the slower one.

    Args:
        serve: runs in each process on its rank, the path of a store, ``args`` and a pipe. It answers each message with
            seconds and loss, or with an error in words.
    """

    def __init__(self, serve: Callable[..., None], *args: Any) -> None:
        context = multiprocessing.get_context("spawn")
        store = Path(tempfile.mkdtemp()) / "store"
        self._pipes, self._processes = [], []
        for rank in range(2):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(rank, str(store), *args, theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def __call__(self) -> tuple[float, float]:
        answers = self._ask("step")
        return max(seconds for seconds, _ in answers), answers[-1][1]

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(timeout=10)
            process.kill()

    def _ask(self, what: str) -> list[tuple[float, float]]:
        for pipe in self._pipes:
            pipe.send(what)
        answers = [pipe.recv() for pipe in self._pipes]
        if said := [answer for answer in answers if isinstance(answer, str)]:
            raise RuntimeError(said[0])
        return answers


class TorchPipelining(TwoProcesses):
    """torch.distributed.pipelining's 1F1B of a sequential model; each step is timed from a barrier."""

    def __init__(self, task: Task, cut: int) -> None:
        super().__init__(_serve, task, cut)
        self._ask("ready")


def _serve(rank: int, store: str, task: Task, cut: int, pipe: Any) -> None:
    torch.set_num_threads(1)
    timeout = timedelta(seconds=120)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timeout)
    layers = task.model()
    module = layers[:cut] if rank == 0 else layers[cut:]
    schedule = _schedule(module, rank, task)
    try:
        while True:
            pipe.send(_step(schedule, module, rank, task) if pipe.recv() == "step" else (0.0, 0.0))
    except EOFError:
        distributed.destroy_process_group()


def _schedule(module: nn.Module, rank: int, task: Task) -> Any:
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B

    stage = PipelineStage(module, rank, 2, torch.device("cpu"))
    return Schedule1F1B(stage, task.microbatches, loss_fn=task.loss)


def _step(schedule: Any, module: nn.Module, rank: int, task: Task) -> tuple[float, float]:
    inputs, targets = task.batch()
    losses: list[torch.Tensor] = []
    module.zero_grad()
    distributed.barrier()
    start = time.perf_counter()
    if rank == 0:
        schedule.step(inputs)
    else:
        schedule.step(target=targets, losses=losses)
    seconds = time.perf_counter() - start
    return seconds, sum(loss.item() for loss in losses) / max(1, len(losses))
