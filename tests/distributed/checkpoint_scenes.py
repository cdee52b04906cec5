"""Pipelines of several processes that save, load, and are killed meanwhile."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from threading import Timer
from typing import Any

import torch
import torch.distributed as dist
from failing_scenes import PATIENT
from resumed import ROWS, Training, batch, begun
from scene import announce
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

import pipecompile
from pipecompile.checkpoint import files
from pipecompile.distributed import processes

Seen = tuple[dict[int, float], dict[str, Tensor]]


def training(seed: int = 0, pace: Any = PATIENT, **options: Any) -> Training:
    torch.set_num_threads(1)
    processes.Pace = lambda: pace  # the default of a pipeline
    return begun(
        seed=seed, mesh=init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("stage",)), **options
    )


def two_parts(folder: str, shard: bool) -> Seen:
    """Goes on from a checkpoint with each half of the batch in a pipeline of its own, and saves again after a step.

    Args:
        shard: the pipelines divide their parameters, with all that belongs to them.
    """
    torch.set_num_threads(1)
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("data", "stage"))
    half = mesh.get_local_rank("data") * ROWS // 2
    deferred = pipecompile.Batching(batch_norm="deferred")
    options: dict[str, Any] = {"rows": slice(half, half + ROWS // 2), "fully_shard": shard}
    found = begun(seed=1, mesh=mesh, microbatches=2, batching=deferred, **options)
    with found.pipe.pipeline:
        found.load(folder).run(1).save(f"{folder}_and_1{'_shards' * shard}")
        losses, weights = seen(found.run(2))
        return losses, {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in weights.items()}


def seen(found: Training) -> Seen:
    return found.losses, found.weights


def saves(folder: str, asynchronous: bool) -> Seen:
    """Saves after three steps, and trains on."""
    found = training()
    with found.pipe.pipeline:
        found.run(3).save(folder, asynchronous=asynchronous)
        return seen(found.run(3))


def loads(folder: str, steps: int, called: bool) -> Seen:
    """Goes on from a checkpoint, on a model of another seed.

    Args:
        called: the pipe was called before, so that each process has its own part only.
    """
    found = training(seed=1)
    with found.pipe.pipeline:
        if called:
            found.run(1)
            found.losses.clear()
        found.load(folder)
        return seen(found.run(steps))


def evaluates_after_a_load(folder: str) -> float:
    """The first call after a load is an evaluation."""
    found = training(seed=1)
    with found.pipe.pipeline:
        found.run(1).load(folder)
        found.pipe.eval()
        with torch.no_grad():
            return found.pipe(batch(0)).item()


def flushed(folder: str) -> list[bool]:
    """Stages that step on their own: a training that is saved after a flush, and one that goes on from there."""
    torch.set_num_threads(1)
    processes.Pace = lambda: PATIENT
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("stage",))
    options = {"schedule": "pipedream", "optimizer": lambda own: torch.optim.AdamW(own, 1e-2), "microbatches": 4}

    def pipe(seed: int) -> Any:
        torch.manual_seed(seed)
        layers = (torch.nn.Sequential(torch.nn.Linear(10, 10), torch.nn.Dropout(0.1)) for _ in range(4))
        return pipecompile.compile(
            torch.nn.Sequential(*layers),
            mesh=mesh,
            loss_fn=torch.nn.functional.mse_loss,
            costs="count",
            example_inputs=((rows(0),), {"target": rows(1)}),
            **options,
        )

    def rows(step: int) -> Tensor:
        return torch.randn(8, 10, generator=torch.Generator().manual_seed(step))

    def run(found: Any, first: int) -> list[Tensor]:
        losses = [found(rows(step), target=rows(step + 1)) for step in range(first, first + 3)]
        found.pipeline.flush()
        return [*losses, *found.state_dict().values()]

    one, two = pipe(0), pipe(1)
    run(one, 0)
    pipecompile.save(folder, one)
    expected = run(one, 3)
    pipecompile.load(folder, two)
    found = [torch.equal(a, b) for a, b in zip(run(two, 3), expected, strict=True)]
    for each in (one, two):
        each.pipeline.close()
    return found


def without_a_stage(folder: str) -> Seen:
    """Only the first process has one."""
    found = training(way="with another parameter", plan=pipecompile.PlanOptions(max_stages=1))
    with found.pipe.pipeline:
        found.run(2).save(folder)
        before = seen(found.run(2))
        found.losses.clear()
        after = seen(found.load(folder).run(2))
    assert before[0][3] == after[0][3]
    assert all(torch.equal(a, b) for a, b in zip(before[1].values(), after[1].values(), strict=True))
    return after


def exports(folder: str) -> None:
    found = training()
    with found.pipe.pipeline:
        pipecompile.export_safetensors(folder, found.run(2).pipe, shard_bytes=400)


def refused(folder: str) -> dict[str, tuple[str, str]]:
    """What is said of misuse, the same in all processes; then a save works."""
    rank, said = dist.get_rank(), {}
    found = training()

    def attempt(name: str, act: Any) -> None:
        try:
            act()
        except pipecompile.PipecompileError as error:
            said[name] = (type(error).__name__, str(error))

    found.run(1).save(f"{folder}/step_1")
    attempt("exists", lambda: found.save(f"{folder}/step_1"))
    attempt("one saves", lambda: found.save(f"{folder}/step_2") if rank == 0 else found.pipe(batch(0)))
    attempt("other names", lambda: found.save(f"{folder}/of {rank}"))
    attempt("the model", lambda: pipecompile.save(f"{folder}/of {rank}", found.pipe.pipeline.model))
    attempt("absent", lambda: found.load(f"{folder}/absent"))
    write = files.FileSystemWriter.write_data

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    if rank == 1:
        files.FileSystemWriter.write_data = full
    attempt("full", lambda: found.save(f"{folder}/step_3"))
    attempt("full in the background", lambda: found.save(f"{folder}/step_4", asynchronous=True).wait())
    attempt("nobody waits", lambda: found.save(f"{folder}/step_4", asynchronous=True))
    attempt("after that", lambda: found.save(f"{folder}/step_5"))
    files.FileSystemWriter.write_data = write
    attempt("again", lambda: found.save(f"{folder}/step_5"))
    found.pipe.pipeline.close()
    return said


def early(folder: str) -> str:
    """A pipe that has not been split."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("stage",))
    pipe = pipecompile.compile(torch.nn.Linear(2, 2), mesh=mesh)
    try:
        pipecompile.save(folder, pipe)
    except pipecompile.InputError as error:
        pipe.pipeline.close()
        return str(error)
    return ""


def killed_while_it_writes(folder: str) -> None:
    """The launcher kills a rank while the checkpoint is written, which the others then never complete."""
    found = training()
    found.run(1).save(f"{folder}/step_1")
    write = files.FileSystemWriter.write_data

    def slowly(*args: Any) -> Any:
        announce("writing")
        time.sleep(900)
        return write(*args)

    if dist.get_rank() == 1:
        files.FileSystemWriter.write_data = slowly
    found.run(1).save(f"{folder}/step_2", asynchronous=True)
    while True:
        found.run(1)


def trains(folder: str, steps: int, every: int, after: float, victims: list[int], asynchronous: bool = True) -> None:
    """Trains with a checkpoint at intervals, from the latest one; the first process notes each loss in a file.

    Args:
        after: steps after which this process kills itself if it is among the victims, and a part of a step.
    """
    found = training(pace=replace(PATIENT, silent=40.0))  # a save that a rank is killed in is ended by its silence
    notes = Path(folder, "losses.jsonl")
    if (path := pipecompile.latest(folder)) is not None:
        found.load(path)
    begin, seconds = found.step, 0.02  # of a step
    with found.pipe.pipeline, notes.open("a") as file:
        while found.step < steps:
            if dist.get_rank() in victims and found.step == begin + int(after):
                timer = Timer(after % 1 * seconds, os.kill, (os.getpid(), signal.SIGKILL))
                timer.daemon = True
                timer.start()
            start = time.monotonic()
            found.run(1)
            seconds = time.monotonic() - start
            if dist.get_rank() == 0:
                print(json.dumps([found.step - 1, found.losses[found.step - 1].hex()]), file=file, flush=True)
            if found.step % every == 0:
                found.save(f"{folder}/step_{found.step}", asynchronous=asynchronous, keep=2)


if __name__ == "__main__":  # started by torchrun; only the first attempt is hurt
    dist.init_process_group("gloo")
    given = json.loads(sys.argv[1])
    if os.environ["TORCHELASTIC_RESTART_COUNT"] != "0":
        given["victims"] = []
    trains(**given)
