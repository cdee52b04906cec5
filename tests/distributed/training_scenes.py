"""Trainings over several processes beside the same pipeline in the threads of one of them.

Each rank returns what differs between the two in what it has, bit for bit: losses, outputs, norms, gradients,
parameters and buffers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import MODELS, Draw, Inputs, Model
from oracle import leaves
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional as F
from toys import VOCABULARY, D, Sundry, blocks, mean_square

import pipecompile
from pipecompile.compiler import learn, rehearse
from pipecompile.ir.graph import Cost
from pipecompile.ir.timeline import Timeline
from pipecompile.planning.calibration import Times
from pipecompile.runtime.compiled import Compiled

STEPS, ROWS, LENGTH = 3, 8, 6
Seen = dict[str, Tensor]


class Dropping(nn.Module):
    """Draws random numbers in each stage."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(D, D) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = F.dropout(torch.tanh(layer(x)), 0.3, self.training)
        return x


class Contrastive(nn.Module):
    """A loss that mixes the rows of the batch, with a parameter that nothing else reads."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = blocks(2), blocks(2)
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        left, right = (F.normalize(tower(x), dim=-1) for tower in (self.left, self.right))
        return F.cross_entropy(self.scale * (left @ right.T), torch.arange(len(x)))


def _mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_local_experts": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = MixtralConfig(vocab_size=61, use_cache=False, **sizes, **heads)
    config._experts_implementation = "batched_mm"  # exists in float64
    return MixtralForCausalLM(config)


def _ragged(draw: Draw) -> Inputs:
    """Labels of which each row has another number."""
    (args, kwargs), keep = MODELS["gpt2"].sample(draw), torch.arange(draw.length)
    labels = kwargs["labels"].clone()
    labels[keep >= 1 + torch.arange(draw.batch)[:, None] % draw.length] = -100
    return args, {**kwargs, "labels": labels}


_INSIDE: dict[str, Any] = {"loss": lambda output: output, "inside": True}
MORE = {
    "dropping": Model("dropping", Dropping, lambda draw: ((draw.floats(D),), {}), loss=mean_square, inside=False),
    "contrastive": Model("contrastive", Contrastive, lambda draw: ((draw.floats(D),), {}), **_INSIDE),
    "ragged": Model("ragged", MODELS["gpt2"].make, _ragged),
    "mixtral": Model("mixtral", _mixtral, MODELS["gpt2"].sample),
}


def train(name: str, schedule: str, **options: Any) -> list[str]:
    """What differs, or "refused" with the reason, if both are refused in the same words."""
    torch.set_num_threads(1)
    return list(_compared((MODELS | MORE)[name], schedule, options))


def _step(pipe: Any, way: str, step: int) -> Seen:
    """The backwards of a training step, in one of the ways of ``WAYS``."""
    one, two, three = (
        torch.randint(VOCABULARY, (ROWS,), generator=torch.Generator().manual_seed(10 * step + k)) for k in range(3)
    )
    match way:
        case "accumulated":
            for ids in (one, two):
                (pipe(ids)["loss"] / 2).backward()
        case "of two calls":
            (pipe(one)["loss"] + pipe(two)["loss"]).backward()
        case "in bfloat16":
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = pipe(one)["loss"]
            loss.backward()
        case "with an evaluation between":
            loss = pipe(one)["loss"]
            with torch.no_grad():
                between = pipe(three)["loss"]
            loss.backward()
            return {f"step {step}: between": between}
        case "twice":
            loss = pipe(one)["loss"]
            loss.backward(retain_graph=True)
            loss.backward()
        case "after an evaluation" if step == 0:
            pipe.eval()
            with torch.no_grad():
                pipe(three)
            pipe.train()
            pipe(one)["loss"].backward()
        case _:
            pipe(one)["loss"].backward()
    return {}


def scaled() -> list[bool | float]:
    """Whether weights and scale are those of torch's scaler with the unsplit model, when rank 1 gets an infinity."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    unsplit, x = Reaching(), torch.randn(ROWS, D)
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("stage",))
    plan = pipecompile.PlanOptions(pins={"layers.0": 0, "layers.1": 1})
    options: dict[str, Any] = {"microbatches": 4, "costs": "count", "plan": plan}
    pipe = pipecompile.compile(Reaching(), mesh=mesh, example_inputs=(x, torch.zeros(ROWS)), **options)
    scalers = torch.amp.GradScaler("cpu", init_scale=2.0), pipe.pipeline.grad_scaler(init_scale=2.0)
    with pipe.pipeline:
        for model, scaler in zip((unsplit, pipe), scalers, strict=True):
            optimizer = torch.optim.SGD(model.parameters(), 0.1)
            for far in (0.0, math.inf, 1.0):
                scaler.scale(model(x, torch.full((ROWS,), far))).backward()
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
    expected = unsplit.state_dict()
    close = [torch.allclose(value, expected[name], atol=1e-6) for name, value in pipe.state_dict().items()]
    return [len(close) == 2, all(close), *(scaler.get_scale() for scaler in scalers)]


def tuned_and_scaled() -> dict[str, Any]:
    """In one start of processes, what several scenes return."""
    scenes = {"train": tuned("train"), "rehearse": tuned("rehearse"), "scaled": scaled()}
    Compiled.times = uneven
    return {**scenes, "pays": tuned("train", slips=True)}


def uneven(compiled: Compiled, timeline: Timeline) -> tuple[Times, ...]:
    """The first stage takes 20 times what the second one takes, whatever they took."""
    predicted = compiled.planned.stage_costs
    return tuple(Times(cost, Cost(forward, 2 * forward)) for cost, forward in zip(predicted, (2e-3, 1e-4), strict=True))


class Reaching(nn.Module):
    """The second layer's weight gets a gradient of the caller's."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(D, D) for _ in range(2))

    def forward(self, x: Tensor, far: Tensor) -> Tensor:
        inside = torch.tanh(self.layers[0](x))
        return (self.layers[1](inside).square().mean(1) + self.layers[1].weight.sum() * far).mean()


def tuned(tune: str, slips: bool = False) -> dict[str, Any]:
    """What a rank has learnt of the plan in a few steps, whose stages count as slow enough, and whether they train.

    Args:
        slips: whether rank 1 evaluates, which is refused, where all would tell what they have measured.
    """
    torch.set_num_threads(1)
    learn.all_short = rehearse.all_short = lambda costs: False  # type: ignore[attr-defined]
    torch.manual_seed(0)
    unsplit, x = blocks(6), torch.randn(64, D)
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("stage",))
    plan = pipecompile.PlanOptions(tune=tune)
    pipe = pipecompile.compile(blocks(6), mesh=mesh, microbatches=2, plan=plan, example_inputs=x)
    planned = pipe.pipeline.costs
    with pipe.pipeline:
        for model in (unsplit, pipe):
            optimizer = torch.optim.SGD(model.parameters(), 0.1)
            for step in range(6):
                if slips and model is pipe and step == learn.WARM_UP + learn.STEPS:
                    pipe.train(dist.get_rank() == 0)
                    with pytest.raises(pipecompile.InputError, match="do not make the same call"):
                        pipe(x)
                    pipe.train()
                output = model(x)
                F.mse_loss(output, x).backward()
                optimizer.step()
                optimizer.zero_grad()
        report = pipe.pipeline.report
    expected = unsplit.state_dict()
    return {
        "learned": report.learned,
        "first": planned.corrections,
        "corrections": pipe.pipeline.costs.corrections,
        "predicted": pipe.pipeline.predicted.makespan,
        "stages": pipe.pipeline.plan.stage_of,
        "same": all(torch.allclose(value, expected[name], atol=1e-5) for name, value in pipe.state_dict().items()),
    }


WAYS: dict[str, dict[str, Any]] = {
    "accumulated": {},
    "of two calls": {},
    "in bfloat16": {},
    "with an evaluation between": {},
    "twice": {},
    "after an evaluation": {},
    "on fewer stages than processes": {"plan": pipecompile.PlanOptions(max_stages=1)},
    "recomputed": {"plan": pipecompile.PlanOptions(recompute="always")},
    "compiled": {"stage_compile": "aot_eager"},
}


def train_in(way: str) -> list[str]:
    """What differs in float32, where the order of additions shows."""
    torch.set_num_threads(1)
    options = {"microbatches": 4, "costs": "count", "example_inputs": torch.arange(ROWS), **WAYS[way]}

    def trained(**place: Any) -> Seen:
        torch.manual_seed(0)
        pipe = pipecompile.compile(Sundry(), **place, **options)
        optimizer = torch.optim.SGD(pipe.parameters(), lr=0.1, momentum=0.9)
        seen: Seen = {}
        with pipe.pipeline:
            for step in range(STEPS):
                seen |= _step(pipe, way, step)
                seen[f"step {step}: norm"] = pipe.pipeline.clip_grad_norm_(0.5)
                optimizer.step()
                optimizer.zero_grad()
        return seen | {f"at last: {name}": tensor.clone() for name, tensor in pipe.state_dict().items()}

    size = dist.get_world_size()
    box = [trained(devices=["cpu"] * size) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(box, 0)
    found = trained(mesh=init_device_mesh("cpu", (size,), mesh_dim_names=("stage",)))
    return [name for name, value in found.items() if not torch.equal(value, box[0][name])]


def _compared(model: Model, schedule: str, options: Mapping[str, Any]) -> Iterator[str]:
    size = dist.get_world_size()
    asynchronous = schedule.startswith("pipedream")
    options = {"schedule": schedule, "microbatches": 4, "costs": "count", **options}
    if asynchronous:
        options["optimizer"] = lambda parameters: torch.optim.SGD(parameters, 0.1, momentum=0.9)
    mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("stage",))
    box = [_result(model, asynchronous, devices=["cpu"] * size, **options) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(box, 0)  # one process trains in threads, for all
    expected, found = box[0], _result(model, asynchronous, mesh=mesh, **options)
    if isinstance(found, str) or isinstance(expected, str):
        if found != expected:
            yield f"{expected if isinstance(expected, str) else 'trained'}, but {found}"
        else:
            yield f"refused: {found}"
        return
    assert found, "a rank has something to compare"
    for name, value in found.items():
        if not torch.equal(value, expected[name]):
            far = (value - expected[name]).abs().max() if value.shape == expected[name].shape else "its shape"
            yield f"{name} by {far}"


def _result(model: Model, asynchronous: bool, **options: Any) -> Seen | str:
    """What is seen in a training, or the error that refuses it."""
    try:
        pipe = pipecompile.compile(model.build(), **options, example_inputs=_inputs(model, 0))
        with pipe.pipeline:
            return _trained(pipe, model, asynchronous)
    except pipecompile.PipecompileError as error:
        return f"{type(error).__name__}: {error}"


def _inputs(model: Model, step: int) -> Any:
    return model.inputs(ROWS, LENGTH if LENGTH in model.lengths else model.lengths[0], seed=step)


def _trained(pipe: Any, model: Model, asynchronous: bool) -> Seen:
    """What a rank can read after a few steps, by name."""
    seen: Seen = {}
    optimizer = torch.optim.AdamW(pipe.parameters(), lr=1e-2)
    for step in range(STEPS):
        args, kwargs = _inputs(model, step)
        torch.manual_seed(step)
        output = pipe(*args, **kwargs)
        seen |= {f"step {step}: output {name}": t for name, t in leaves(output) if _is_here(t)}
        if not asynchronous:
            loss = model.loss(output)
            loss.backward()
            if _is_here(loss):
                seen[f"step {step}: loss"] = loss.detach().clone()
            seen[f"step {step}: norm"] = pipe.pipeline.clip_grad_norm_(0.1).double()
            named = pipe.named_parameters()
            seen |= {f"step {step}: gradient of {n}": p.grad.clone() for n, p in named if p.grad is not None}
            optimizer.step()
            optimizer.zero_grad()
    pipe.pipeline.flush()
    pipe.eval()
    args, kwargs = _inputs(model, STEPS)
    with torch.no_grad():
        seen |= {f"evaluated: output {name}": t for name, t in leaves(pipe(*args, **kwargs)) if _is_here(t)}
    seen |= {f"at last: {name}": tensor.clone() for name, tensor in pipe.state_dict().items()}
    return seen


def _is_here(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.is_meta
