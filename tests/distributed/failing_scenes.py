"""Pipelines of several processes of which one does something else than the others, or fails."""

from __future__ import annotations

import gc
import os
import pickle
import warnings
from collections import Counter
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from scene import announce, await_moment, meet
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional as F
from torch.optim import optimizer
from toys import D, blocks

import pipecompile
from pipecompile.distributed import processes, share
from pipecompile.distributed.watch import Pace

QUICK = Pace(beat=0.02, silent=4.0, grace=0.4)  # for ranks that are stopped; see ``control_scenes.PACE``
CROSSING = Pace(beat=0.02, silent=100.0, grace=2.0, crossed=0.5)
PATIENT = Pace(beat=0.05, silent=100.0, grace=0.4)


CALLS: Counter[str] = Counter()


ERROR: list[type[Exception]] = [ValueError]


def stop(kind: str, at: int) -> None:
    """Raises in the ``at``-th call of its kind."""
    CALLS[kind] += 1
    if CALLS[kind] == at:
        raise ERROR[0]("the model's own")


@torch.library.custom_op("failing::stopping", mutates_args=())
def stopping(x: Tensor, at: int, backward: bool) -> Tensor:
    stop("forward", 0 if backward else at)
    return x.clone()


@torch.library.custom_op("failing::stopping_backward", mutates_args=())
def stopping_backward(gradient: Tensor, at: int) -> Tensor:
    stop("backward", at)
    return gradient.clone()


def remember(ctx: Any, inputs: tuple[Tensor, int, bool], output: Tensor) -> None:
    ctx.at = inputs[1] if inputs[2] else 0


stopping.register_fake(lambda x, at, backward: torch.empty_like(x))
stopping_backward.register_fake(lambda gradient, at: torch.empty_like(gradient))
stopping.register_autograd(
    lambda ctx, gradient: (stopping_backward(gradient, ctx.at), None, None), setup_context=remember
)


class Stopping(nn.Module):
    """Raises in the forward or the backward of its ``at``-th microbatch. The counters are out of a trace's sight."""

    def __init__(self, at: int, backward: bool) -> None:
        super().__init__()
        self.at, self.backward = at, backward

    def forward(self, x: Tensor) -> Tensor:
        return stopping(x, self.at, self.backward)


class Net(nn.Module):
    def __init__(self, *more: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*blocks(4), *more, nn.Linear(D, D))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).square().mean()


def batch(seed: int = 0, rows: int = 8) -> Tensor:
    return torch.randn(rows, D, generator=torch.Generator().manual_seed(seed))


def piped(model: nn.Module | None = None, pace: Pace = PATIENT, parts: int = 1, **options: Any) -> Any:
    processes.Pace = lambda: pace  # the default of a pipeline
    torch.manual_seed(0)
    size = dist.get_world_size()
    if parts == 1:
        mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("stage",))
    else:
        mesh = init_device_mesh("cpu", (parts, size // parts), mesh_dim_names=("data", "stage"))
    options = {"microbatches": 4, "costs": "count", "example_inputs": batch(), "verify": "never", **options}
    pipe = pipecompile.compile(model or Net(), mesh=mesh, **options)
    CALLS.clear()  # of the trace, which tries the model's own operators
    return pipe


def step(pipe: Any, x: Tensor | None = None) -> float:
    loss = pipe(batch() if x is None else x)
    loss.backward()
    return loss.item()


def other_batches(rows: int, parts: int = 1) -> tuple[str, float, float]:
    """Rank 1 has other values, or other rows. Then all make the same call."""
    pipe, rank = piped(parts=parts), dist.get_rank()
    before = step(pipe)
    other = batch(seed=rank, rows=rows) if rank == 1 else batch()
    text = ""
    try:
        step(pipe, other)
    except pipecompile.InputError as error:
        text = str(error)
    after = step(pipe)
    pipe.pipeline.close()
    return text, before, after


def other_model() -> None:
    piped(Net(nn.Hardtanh() if dist.get_rank() else nn.Identity()))


class Times(nn.Module):
    """A number of the model's own, which is no tensor."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class Masks(nn.Module):
    """A tensor of the model's own, which is no buffer."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.mask = batch(seed, rows=1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.mask


def other_settings() -> list[str]:
    """What is said of compilations that differ in rank 1."""
    other = dist.get_rank() == 1
    loss_fn = F.l1_loss if other else F.mse_loss
    cases = [
        lambda: piped(schedule="gpipe" if other else "1f1b"),
        lambda: piped(plan=pipecompile.PlanOptions(search_seconds=5.0 if other else 6.0)),
        lambda: piped(Scores(), loss_fn=loss_fn, example_inputs=None)(batch(), target=batch()),
        lambda: piped(Net(Times(2.0 if other else 1.0))),
        lambda: piped(example_inputs=batch(rows=7 if other else 8)),
        lambda: piped(Net(Masks(seed=dist.get_rank()))),
        lambda: piped(costs="count" if other else None),
    ]
    said = []
    for act in cases:
        try:
            act()
        except pipecompile.InputError as error:
            said.append(str(error))
    return said


def other_backwards() -> list[str]:
    """Rank 1 makes no backward, then one of another scale. Then all make the same ones."""
    pipe, other = piped(), dist.get_rank() == 1
    said = []
    for factor in (0.0, 2.0, 1.0):
        loss = pipe(batch())
        if factor or not other:
            (loss * (factor if other else 1.0)).backward()
        try:
            step(pipe)
        except pipecompile.InputError as error:
            said.append(str(error))
    pipe.pipeline.close()
    return said


def other_steps() -> list[list[str]]:
    """Rank 1 leaves out a step, then what clears gradients. Both accumulate. Then it has nothing that is trained."""
    pipe, other, said = piped(), dist.get_rank() == 1, []
    names: list[Any] = [None, None]
    dist.all_gather_object(names, [name for name, _ in pipe.named_parameters()])
    optimizer = torch.optim.AdamW(pipe.parameters(), 1e-3)
    for kind in ("step", "clear", "accumulate", "freeze"):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            if kind == "freeze":
                for name in names[1]:
                    pipe.pipeline.model.get_parameter(name).requires_grad_(False)
            for k in range(4):
                step(pipe)
                if kind == "accumulate" and k % 2 == 0:
                    continue
                if not (other and (kind == "freeze" or (kind == "step" and k == 1))):
                    optimizer.step()
                if not (other and kind == "clear" and k == 1):
                    optimizer.zero_grad(set_to_none=kind != "accumulate")
        said.append([str(each.message) for each in seen if "rank" in str(each.message)])
        optimizer.zero_grad()
    pipe.pipeline.close()
    return said


class Scores(nn.Module):
    """A model without a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*blocks(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Own(torch.autograd.Function):
    """A squared error, whose backward sees tensors past what torch functions do."""

    @staticmethod
    def forward(ctx: Any, one: Tensor, other: Tensor) -> Tensor:
        ctx.save_for_backward(one, other)
        return (one - other).square().sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        one, other = ctx.saved_tensors
        return 2 * gradient * (one - other), None


def reads_an_output() -> dict[str, str]:
    """What is said of an output, where it is elsewhere; and whether a loss of it has the gradients of the unsplit."""
    torch.manual_seed(0)
    pipe = piped(Scores())
    torch.manual_seed(0)
    unsplit, target, parameter = Scores(), batch(seed=1), nn.Parameter(torch.ones(D))
    F.mse_loss(unsplit(batch()), target).backward()
    expected = {name: parameter.grad for name, parameter in unsplit.named_parameters()}
    output = pipe(batch())
    loss = F.mse_loss(output, target)
    loss.backward()
    said = {n: "differs" for n, p in pipe.named_parameters() if not torch.allclose(p.grad, expected[n], atol=1e-6)}
    total = torch.zeros(8, D)
    uses: dict[str, Any] = {
        "item": loss.item,
        "branch": lambda: bool(loss > 0),
        "format": lambda: f"{loss:.3f}",
        "write": lambda: total.add_(output),
        "part": lambda: total.__setitem__(slice(0, 2), output[:2]),
        "numpy": output.detach().numpy,
        "mask": lambda: output[output > 0],
        "regularized": lambda: loss + parameter.sum(),
        "copied": lambda: output.to("cpu"),
        "kept": lambda: pickle.dumps(output.detach()),
        "own backward": Own.apply(output, target).backward if output.is_meta else loss.item,
    }
    with torch.no_grad():
        head, copy = nn.Linear(D, 2)(output), deepcopy(output.detach())
    assert (head.shape, head.is_meta, copy.shape, copy.is_meta) == ((8, 2), output.is_meta, (8, D), output.is_meta)
    with pytest.raises(RuntimeError, match=r"reduc|cannot be multiplied"):
        output @ torch.ones(3, 3)  # an error of the script, in the same words everywhere
    for name, use in uses.items():
        try:
            use()
        except pipecompile.InputError as error:
            said[name] = str(error)
    pipe.pipeline.close()
    return said


def other_optimizers() -> list[str]:
    """What is said of optimizers and scalers that see one process only, in all processes."""
    pipe = piped()
    said, scaler = [], torch.amp.GradScaler("cpu")
    lbfgs, sgd = torch.optim.LBFGS(pipe.parameters()), torch.optim.SGD(pipe.parameters(), 0.1)
    scaler.scale(pipe(batch())).backward()
    for act in (lambda: lbfgs.step(lambda: 0.0), lambda: scaler.step(sgd)):
        try:
            act()
        except pipecompile.InputError as error:
            said.append(str(error))
    torch.amp.GradScaler("cpu", enabled=False).step(sgd)
    of_none = torch.optim.AdamW(pipe.pipeline.share.stand_in)  # of a process that trains nothing
    of_none.step()
    said.append(f"states: {len(of_none.state)}")
    gc.collect()  # pipelines of other scenes, which were not closed
    hooks = optimizer._global_optimizer_pre_hooks
    open_ = len(hooks)
    pipe.pipeline.close()
    said.append(f"hooks: {open_}, closed: {len(hooks)}")
    return said


def misuses() -> dict[str, Any]:
    """In one start of processes, what several scenes return."""
    scenes = (other_settings, other_backwards, other_steps, reads_an_output, other_optimizers)
    return {scene.__name__: scene() for scene in scenes}


def crossing() -> None:
    """Rank 1 calls two pipelines in the other order."""
    pipes = [piped(pace=CROSSING), piped(pace=CROSSING)]
    for pipe in pipes if dist.get_rank() == 0 else reversed(pipes):
        step(pipe)


def saves_alone(folder: str) -> None:
    """Rank 0 alone saves, as it would save a whole model; the other one waits for it."""
    pipe = piped(pace=CROSSING)
    with pipe.pipeline:
        step(pipe)
        if dist.get_rank() == 0:
            pipecompile.save(f"{folder}/step_1", pipe)
        dist.barrier()


def no_call() -> None:
    """Rank 1 makes no second call, but lives on."""
    pipe = piped()
    step(pipe)
    pipe.pipeline.share.processes.pace = replace(PATIENT, absent=0.5)  # from now on: a start may take longer
    if dist.get_rank() == 1:
        await_moment("waited")
    try:
        step(pipe)
    finally:
        announce("waited")


def one_more_call() -> None:
    """The second part of each batch has one batch more."""
    pipe = piped(parts=2)
    pipe.pipeline.close()
    pipe.pipeline.close()  # says nothing
    pipe = piped(parts=2)
    with pipe.pipeline:
        for _ in range(2 + dist.get_rank() // 2):
            step(pipe)


def raises(at: int, backward: bool) -> None:
    """The stage of the last rank."""
    pipe = piped(Net(Stopping(at, backward)))
    for _ in range(3):
        step(pipe)


def raises_in(rank: int, at: int, backward: bool, error: str, parts: int = 1) -> None:
    """The stage of any rank: each has one that could, and all but one are told not to."""
    if error == "OutOfMemoryError":
        ERROR[0] = torch.OutOfMemoryError
    size = dist.get_world_size() // parts
    model = Net()
    model.layers = nn.Sequential(*(nn.Sequential(*blocks(1), Stopping(-1, backward)) for _ in range(size)))
    model.layers[rank][-1].at = at
    plan = pipecompile.PlanOptions(pins={f"layers.{stage}": stage for stage in range(size)})
    pipe = piped(model, plan=plan, parts=parts)
    while True:
        step(pipe)


class MakesNaN(nn.Module):
    """Makes NaN in the forward, or in the backward alone."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.backward = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.now:
            return x
        return (x * 0).sqrt() + x if self.backward else torch.log(x * 0 - 1) + x


def makes_nan(rank: int, backward: bool, steps: int = 1, parts: int = 1) -> None:
    """The stage of a rank makes NaN after some steps, in torch's anomaly mode."""
    torch.autograd.set_detect_anomaly(True)
    size = dist.get_world_size() // parts
    model = Net()
    model.layers = nn.Sequential(*(nn.Sequential(*blocks(1), MakesNaN()) for _ in range(size)))
    plan = pipecompile.PlanOptions(pins={f"layers.{stage}.0": stage for stage in range(size)})
    pipe = piped(model, plan=plan, parts=parts)
    with pipe.pipeline:
        for _ in range(steps):
            step(pipe)
        model.layers[rank][-1].now, model.layers[rank][-1].backward = True, backward
        step(pipe)


def ends_between(rank: int, how: str, parts: int = 1) -> None:
    """One rank ends its script after a step: it raises, returns, or leaves at once."""
    pipe = piped(parts=parts)
    step(pipe)
    if dist.get_rank() == rank:
        match how:
            case "raise":
                raise KeyError("data")
            case "return":
                return
            case "exit":
                os._exit(3)
    step(pipe)


def trains_on(steps: int = 0, parts: int = 1) -> None:
    """Steps until one is hurt, which is after so many steps."""
    pipe = piped(pace=QUICK, parts=parts)
    step(pipe)
    meet("trained")
    for _ in range(steps):
        step(pipe)
    announce("training")
    while True:
        step(pipe)


def raises_between() -> None:
    """Rank 1 raises in the script, inside ``with``."""
    pipe = piped()
    with pipe.pipeline:
        step(pipe)
        if dist.get_rank() == 1:
            raise KeyError("data")
        step(pipe)


def after_a_failure() -> tuple[str, str]:
    """What a call says after one that has failed."""
    pipe = piped(Net(Stopping(2, False)))
    said = []
    for _ in range(2):
        try:
            while True:
                step(pipe)
        except pipecompile.RankError as error:
            said.append(str(error))
    return said[0], said[1]


def other_seed() -> None:
    """Each rank builds a model of its own."""
    torch.manual_seed(dist.get_rank())
    piped(Net())


def other_modes(which: str) -> tuple[str, float, float]:
    """Rank 1 evaluates while rank 0 trains. Then all make the same call."""
    pipe = piped(Net(nn.Dropout(0.5)))
    pipe.eval()
    step(pipe)
    pipe.train()
    before, rank, text = step(pipe), dist.get_rank(), ""
    if which == "module":
        pipe.train(rank == 0)
    try:
        torch.autograd.set_detect_anomaly(which == "anomaly" and rank == 1)
        with torch.set_grad_enabled(which != "gradients" or rank == 0):
            pipe(batch())
    except pipecompile.InputError as error:
        text = str(error)
    torch.autograd.set_detect_anomaly(False)
    pipe.train()
    after = step(pipe)
    pipe.pipeline.close()
    return text, before, after


def refused() -> dict[str, str]:
    """What is said of options and arguments that do not work over processes, by case."""
    cases: dict[str, Any] = {
        "replicas": lambda: piped(plan=pipecompile.PlanOptions(replicas=[2])),
        "verify": lambda: piped(verify=3),
        "input": lambda: piped()(batch().requires_grad_()),
        "names": lambda: pipecompile.compile(Net(), mesh=init_device_mesh("cpu", (2,), mesh_dim_names=("rows",))),
        "both": lambda: pipecompile.compile(Net(), ["cpu"], mesh=init_device_mesh("cpu", (2,))),
        "replan": lambda: piped().pipeline.replan(),
        "load": lambda: piped().load_state_dict({}),
        "early": lambda: list(piped(example_inputs=None).parameters()),
    }
    said = {}
    for name, act in cases.items():
        try:
            act()
        except pipecompile.PipecompileError as error:
            said[name] = str(error)
    return said


def shares() -> dict[str, Any]:
    """What each rank's tools see of the model after a step."""
    torch.manual_seed(0)
    model = Net(nn.BatchNorm1d(D))
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    pipe = piped(model)
    loss = pipe(batch())
    loss.backward()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            torch.nn.utils.clip_grad_norm_(pipe.parameters(), 1e9)
        quiet = len(caught) == len([w for w in caught if "pipe.pipeline.clip_grad_norm_" in str(w.message)]) == 1
    asked: Counter[int] = Counter()
    foreign = share.foreign
    share.foreign = lambda captures, rank: asked.update([rank]) or foreign(captures, rank)
    pipe.state_dict()
    found = {
        "asked": asked[dist.get_rank()],
        "names": [name for name, _ in pipe.named_parameters(prefix="of")],
        "of the pipe": list(pipe.state_dict()),
        "of the model": list(model.state_dict()),
        "of a part": list(model.layers.state_dict(prefix="layers.")),
        "as before": all(
            torch.equal(v, expected[k]) for k, v in pipe.state_dict().items() if "running" not in k and "num" not in k
        ),
        "all": list(expected),
        "warned once": quiet,
        "bytes": sum(p.nbytes for p in model.parameters()),
        "held": sum(p.untyped_storage().nbytes() for p in model.parameters()),
    }
    pipe.pipeline.close()
    return found


def rows_of_a_mesh() -> tuple[str, list[float]]:
    """Each row of a mesh has pipelines of its own, the second row two of them, of which one fails. Then all have one.

    The first two processes have a group of their own, besides.
    """
    dist.new_group([0, 1])
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("other", "stage"))
    row, said = mesh.get_local_rank("other"), ""
    own = [row_of(mesh["stage"], row) for _ in range(row + 1)]
    losses = [step(pipe) for pipe in own]
    if row == 1:
        try:
            with own.pop().pipeline:
                raise KeyError("of the second row")
        except KeyError as error:
            said = str(error)
    meet("failure")
    losses += [step(pipe) for pipe in own]
    for pipe in own:
        pipe.pipeline.close()
    pipe = piped()
    losses.append(step(pipe))
    pipe.pipeline.close()
    return said, losses


def row_of(mesh: Any, seed: int) -> Any:
    processes.Pace = lambda: PATIENT
    torch.manual_seed(seed)
    return pipecompile.compile(Net(), mesh=mesh, microbatches=4, costs="count", example_inputs=batch(), verify="never")


def wrapped() -> str:
    """A tool wraps the pipe as it would a whole model."""
    pipe = piped()
    with pytest.raises(pipecompile.InputError) as caught:
        nn.parallel.DistributedDataParallel(pipe)
    pipe.pipeline.close()
    return str(caught.value)
