"""Trainings on a mesh with the dimension ``data``, beside the unsplit model on the whole batch.

Each rank returns what differs, by more than rounding from the unsplit model, or at all from the other ranks that have
the same parameters.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from models import MODELS, Model
from oracle import leaves
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree
from toys import VOCABULARY, Sparse, Sundry
from training_scenes import LENGTH, MORE, STEPS

import pipecompile
from pipecompile.compiler import plan_call
from pipecompile.distributed import members, shards
from pipecompile.profile import profile

Seen = dict[str, Tensor]
NEAR = {torch.float64: {"rtol": 1e-9, "atol": 1e-11}, torch.float32: {"rtol": 1e-6, "atol": 1e-7}}  # a loss in float32


DEFERRED = pipecompile.Batching(batch_norm="deferred")
OWN = {
    "sundry": Model(
        "sundry",
        Sundry,
        lambda draw: ((torch.randint(VOCABULARY, (draw.batch,), generator=draw.generator),), {}),
        loss=lambda output: output["loss"],
    )
}


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x: Tensor, scale: Any) -> Tensor:
        return (self.layer(x) * scale).mean()


def mesh_of(parts: int) -> Any:
    size = dist.get_world_size()
    return init_device_mesh("cpu", (parts, size // parts), mesh_dim_names=("data", "stage"))


def part_of(inputs: Any, sizes: Sequence[int], part: int) -> Any:
    """The rows of one part of a batch."""
    begin = sum(sizes[:part])

    def cut(leaf: Any) -> Any:
        is_batched = isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == sum(sizes)
        return leaf[begin : begin + sizes[part]] if is_batched else leaf

    return pytree.tree_map(cut, inputs)


def train(
    name: str,
    sizes: Sequence[int],
    schedule: str = "1f1b",
    accumulate: int = 1,
    zero: bool = False,
    shard: bool = False,
    **more: Any,
) -> list[str]:
    """What differs after a few steps, each of ``accumulate`` calls on ``sizes`` rows.

    With ``zero``, each process keeps the optimizer's state of some of its parameters; with ``shard``, some rows of all
    of them. A model that draws random
    numbers, or normalizes each microbatch by itself, is compared with the pipeline of one process that has as many
    microbatches.
    """
    torch.set_num_threads(1)
    model, parts = (MODELS | MORE | OWN)[name], len(sizes)
    count = min(min(sizes), 4)
    mesh = mesh_of(parts)
    part = mesh.get_local_rank("data")
    options: dict[str, Any] = {"schedule": schedule, "costs": "count"}
    if name == "sundry":
        options["batching"] = DEFERRED
    if not model.inside:
        options["loss_fn"] = _loss_fn(model)
    pipe = pipecompile.compile(
        model.build(),
        mesh=mesh,
        microbatches=count,
        example_inputs=part_of(_inputs(model, sum(sizes), 0), sizes, part),
        fully_shard=shard,
        **_read(more),
        **options,
    )
    if shard:
        assert_divided(pipe, part, parts)

    sharded = {"optimizer_class": torch.optim.AdamW, "process_group": mesh.get_group("data")}

    def steps(call: Callable[..., Any], owner: Any, split: bool, clip: Callable[[float], Tensor]) -> Seen:
        make = partial(ZeroRedundancyOptimizer, **sharded) if zero and split else torch.optim.AdamW
        return _trained(model, call, owner, make, sizes, part if split else None, accumulate, clip)

    with pipe.pipeline:
        found = steps(pipe, pipe, True, pipe.pipeline.clip_grad_norm_)
        if name in ("dropping", "sundry"):
            devices = ["cpu"] * mesh.size(1)
            other = pipecompile.compile(model.build(), devices, microbatches=count * parts, **options)
            expected = steps(other, other, False, other.pipeline.clip_grad_norm_)
        else:
            other = model.build()
            call = other if model.inside else lambda *args, target: _loss_fn(model)(other(*args), target)
            clip = lambda norm: torch.nn.utils.clip_grad_norm_(other.parameters(), norm)  # noqa: E731
            expected = steps(call, other, False, clip)
        differing = list(_differences(found, expected, sizes, part))
        digests: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(digests, {n: _digest(_whole(t)) for n, t in pipe.state_dict().items()})
        twins = [digests[place] for place in mesh.mesh[:, mesh.get_local_rank("stage")].tolist()]
        differing += [f"{n} between parts" for twin in twins for n in twin if twin[n] != twins[0][n]]
    return differing


def divided_beside_the_pipe(folder: str) -> tuple[list[str], list[bool], list[str]]:
    """What differs in an export, what is trained once a layer is frozen in the model, and an optimizer's own state."""
    mesh = mesh_of(2)
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(5, 5) for _ in range(4)))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x = torch.ones(4, 5)
    options: dict[str, Any] = {"microbatches": 2, "costs": "count", "loss_fn": nn.functional.mse_loss}
    call = {"input": x, "target": x}
    pipe = pipecompile.compile(model, mesh=mesh, example_inputs=call, fully_shard=True, **options)
    with pipe.pipeline:
        pipecompile.export_safetensors(folder, pipe)
        dist.barrier()
        found = {name: t for file in Path(folder).glob("*.safetensors") for name, t in load_file(file).items()}
        odd = [name for name, tensor in before.items() if not torch.equal(found[name], tensor)]
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("bias" in name)
        pipe(**call).backward()
        trained = ["bias" in name for name, p in pipe.named_parameters() if p.grad is not None]
        assert all(p.requires_grad == ("bias" in name) for name, p in pipe.named_parameters())
        parameters = [p for p in pipe.parameters() if p.grad is not None]
        optimizer = torch.optim.AdamW(parameters)
        optimizer.step()
        kinds = [type(value).__name__ for p in parameters for value in optimizer.state[p].values() if value.ndim]
        with torch.no_grad():
            loss = pipe(**call)
        for parameter in parameters:
            parameter.data.zero_()
        with torch.no_grad():
            assert pipe(**call) != loss, "the caller's writes are seen"
    return odd, trained, kinds


@patch.object(shards, "BUCKET", members.BUCKET)
def sharded(
    name: str, sizes: Sequence[int], accumulate: int = 1, bucket: int = members.BUCKET, **more: Any
) -> list[str]:
    """What differs, bit for bit, between trainings whose parameters are divided over the parts and are not.

    Args:
        bucket: bytes of parameters that travel at once.
    """
    shards.BUCKET = bucket
    torch.set_num_threads(1)
    model = (MODELS | MORE | OWN)[name]
    mesh = mesh_of(len(sizes))
    part = mesh.get_local_rank("data")
    inputs = part_of(_inputs(model, sum(sizes), 0), sizes, part)
    options: dict[str, Any] = {"mesh": mesh, "microbatches": 2, "costs": "count", "example_inputs": inputs}
    if not model.inside:
        options["loss_fn"] = _loss_fn(model)
    seen = []
    for shard in (True, False):
        pipe = pipecompile.compile(model.build(), fully_shard=shard, **_read(more), **options)
        with pipe.pipeline:
            clip = lambda norm, pipe=pipe: pipe.pipeline.clip_grad_norm_(1e9).round(decimals=6)  # noqa: E731
            seen.append(_trained(model, pipe, pipe, torch.optim.AdamW, sizes, part, accumulate, clip))
        if any(isinstance(parameter, DTensor) for parameter in pipe.parameters()):
            assert not any(each.current.leaves for each in pipe.pipeline._session.weights.values()), "it is freed"
    found, expected = seen
    assert any("gradient" in key for key in found) or not dict(pipe.named_parameters())
    odd = [key for key in found if not found[key].is_meta and not torch.equal(found[key], expected[key])]
    return odd + [f"{key} is missing" for key in expected.keys() - found.keys()]


def _read(options: dict[str, Any]) -> dict[str, Any]:
    """Options of ``compile``, given as JSON."""
    plan = {"plan": pipecompile.PlanOptions(**options["plan"])} if "plan" in options else {}
    return {**options, **plan}


def assert_divided(pipe: Any, part: int, parts: int) -> None:
    """Each process has its rows of the parameters that its stages read, and no other memory of them."""
    named = dict(pipe.named_parameters())
    divided = {name: p for name, p in named.items() if isinstance(p, DTensor)}
    assert divided or not named
    for name, parameter in divided.items():
        rows = -(-len(parameter) // parts)
        assert len(parameter.to_local()) == max(0, min(rows, len(parameter) - part * rows)), name
    own = dict(pipe.pipeline.model.named_parameters())
    assert all(own[name].untyped_storage().nbytes() == own[name].itemsize for name in divided)


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


def _loss_fn(model: Model) -> Callable[..., Tensor]:
    return lambda output, target: model.loss(output) + 0 * target.sum()


def _inputs(model: Model, rows: int, step: int) -> Any:
    args, kwargs = model.inputs(rows, LENGTH if LENGTH in model.lengths else model.lengths[0], seed=step)
    return (args, kwargs) if model.inside else (args, {**kwargs, "target": torch.zeros(rows)})


def _trained(
    model: Model,
    call: Callable[..., Any],
    owner: nn.Module,
    make: Callable[..., torch.optim.Optimizer],
    sizes: Sequence[int],
    part: int | None,
    accumulate: int,
    clip: Callable[[float], Tensor],
) -> Seen:
    """What is seen in a training, on one part or on the whole batch."""
    seen: Seen = {}
    optimizer = make(owner.parameters(), lr=1e-2)
    for step in range(STEPS):
        for again in range(accumulate):
            inputs = _inputs(model, sum(sizes), step * accumulate + again)
            args, kwargs = inputs if part is None else part_of(inputs, sizes, part)
            torch.manual_seed(step)
            output = call(*args, **kwargs)
            loss = model.loss(output) if model.inside else output
            (loss / accumulate).backward()
            seen[f"step {step}.{again}: loss"] = loss.detach().clone()
            named = ((f"step {step}.{again}: input {name}", leaf) for name, leaf in leaves((args, kwargs)))
            seen |= {name: leaf.clone() for name, leaf in named if isinstance(leaf, Tensor)}  # T5 writes its labels
        seen[f"step {step}: norm"] = clip(0.1).double()
        named = owner.named_parameters()
        seen |= {f"step {step}: gradient of {n}": _whole(p.grad) for n, p in named if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
    owner.eval()
    inputs = _inputs(model, sum(sizes), 99)
    args, kwargs = inputs if part is None else part_of(inputs, sizes, part)
    with torch.no_grad():
        seen |= {f"evaluated: {n}": t for n, t in leaves(call(*args, **kwargs)) if isinstance(t, Tensor)}
    seen |= {f"at last: {name}": _whole(tensor) for name, tensor in owner.state_dict().items()}
    return seen


def _differences(found: Seen, expected: Seen, sizes: Sequence[int], part: int) -> Iterator[str]:
    assert any("loss" in name for name in found), "a process has a loss"
    for name, value in found.items():
        other = expected[name]
        if value.is_meta:
            continue
        if ("input" in name or name.startswith("evaluated")) and other.ndim and len(other) == sum(sizes):
            other = part_of(other, sizes, part)
        if value.shape != other.shape or not torch.allclose(
            value.double(), other.double(), **NEAR.get(value.dtype, {})
        ):
            yield f"{name} by {(value - other).abs().max() if value.shape == other.shape else value.shape}"


def _digest(tensor: Tensor) -> str:
    return hashlib.blake2b(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data).hexdigest()


def sparse_gradients() -> list[str]:
    """What differs in the gradients of a model with a sparse one, of parts that have different rows."""
    torch.manual_seed(0)
    model = Sparse()
    other = copy.deepcopy(model)
    ids = torch.arange(12).reshape(6, 2)
    sizes, mesh = (4, 2), mesh_of(2)
    mine = part_of(ids, sizes, mesh.get_local_rank("data"))
    pipe = pipecompile.compile(model, mesh=mesh, microbatches=2, costs="count", example_inputs=mine)
    pipe(mine).backward()
    other(ids).backward()
    expected = {name: parameter.grad for name, parameter in other.named_parameters()}
    found = {name: parameter.grad for name, parameter in pipe.named_parameters()}
    assert found
    assert any(gradient.is_sparse for gradient in found.values()) == ("words.weight" in found)
    return [n for n, g in found.items() if not torch.allclose(g.to_dense(), expected[n].to_dense(), atol=1e-6)]


def refused() -> dict[str, str]:
    """The errors of calls, and of ``compile``, that a mesh with parts refuses."""
    mesh, part = mesh_of(2), dist.get_rank() // (dist.get_world_size() // 2)
    sharded = nn.Sequential(nn.Linear(2, 2))
    fully_shard(sharded, mesh=mesh["data"])
    others = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("dp", "pp"))
    ids = torch.arange(8)
    options: dict[str, Any] = {"microbatches": 2, "costs": "count", "mesh": mesh}

    def without_a_loss() -> None:
        pipecompile.compile(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), **options)(torch.ones(4, 2))

    def gradient_of_an_output() -> None:
        pipecompile.compile(Sundry(), batching=DEFERRED, **options)(ids)["logits"].sum().backward()

    def other_lengths() -> None:
        args, kwargs = MODELS["gpt2"].inputs(4, 6 + part)
        pipecompile.compile(MODELS["gpt2"].build(), **options)(*args, **kwargs)

    def steps_inside() -> None:
        optimizer = lambda parameters: torch.optim.SGD(parameters, 0.1)  # noqa: E731
        pipecompile.compile(Sundry(), schedule="pipedream", optimizer=optimizer, **options)

    def optimizer_of_a_module() -> None:
        model = Sundry()
        pipe = pipecompile.compile(model, batching=DEFERRED, example_inputs=ids, fully_shard=True, **options)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        pipe(ids)["loss"].backward()
        optimizer.step()

    acts: dict[str, Callable[[], object]] = {
        "no loss": without_a_loss,
        "gradient": gradient_of_an_output,
        "lengths": other_lengths,
        "statistics": lambda: pipecompile.compile(Sundry(), example_inputs=ids, **options),
        "pipedream": steps_inside,
        "names": lambda: pipecompile.compile(Sundry(), mesh=others),
        "DTensor": lambda: pipecompile.compile(sharded, mesh=mesh),
        "optimizer": optimizer_of_a_module,
        "number": lambda: pipecompile.compile(Scaled(), **options)(torch.ones(4, 2), scale=1.0 + part),
        "kind": lambda: pipecompile.compile(Scaled(), **options)(torch.ones(4, 2), torch.ones(4, 1) if part else 2.0),
    }
    said = {}
    for name, act in acts.items():
        torch.manual_seed(0)
        try:
            act()
        except pipecompile.PipecompileError as error:
            said[name] = f"{type(error).__name__}: {error}"
    return said


def chosen(parts: int, sizes: Sequence[int], per_call: float) -> tuple[str, int, list[str], list[str]]:
    """The schedule and the number of microbatches that auto chooses, what it says, and what differs from the model.

    Args:
        parts: 1 for a mesh of stages alone.
        per_call: seconds of a layer on any number of rows, beside 10 ms for each row.
    """
    torch.set_num_threads(1)

    def slow(captured: Any, graph: Any, *args: Any, **kwargs: Any) -> Any:
        counted = profile(captured, graph, "count")
        seconds = per_call + 0.01 * captured.microbatch
        pairs = zip(graph.nodes, counted.costs, strict=True)
        costs = (
            replace(cost, forward=seconds, backward=2 * seconds) if n.op == "linear" else cost for n, cost in pairs
        )
        return replace(counted, costs=tuple(costs))

    plan_call.profile = slow  # type: ignore[assignment]
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(6))).double()
    alone = copy.deepcopy(model)
    mesh = mesh_of(parts) if parts > 1 else init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("stage",))
    part = mesh.get_local_rank("data") if parts > 1 else 0
    x, y = torch.randn(2, sum(sizes), 3, dtype=torch.float64).unbind()
    pipe = pipecompile.compile(model, mesh=mesh, schedule="auto", loss_fn=nn.functional.mse_loss, costs="count")
    with pipe.pipeline:
        here = slice(sum(sizes[:part]), sum(sizes[: part + 1]))
        loss = pipe(x[here], target=y[here])
        loss.backward()
        expected = nn.functional.mse_loss(alone(x), y)
        expected.backward()
        odd = [] if torch.allclose(loss, expected, rtol=1e-12) else [f"loss {loss} of {expected}"]
        wanted = {name: p.grad for name, p in alone.named_parameters()}
        own = {name: p for name, p in model.named_parameters() if p.grad is not None}
        odd += [] if own else ["no gradients"]
        odd += [n for n, p in own.items() if not torch.allclose(p.grad, wanted[n], rtol=1e-9, atol=1e-15)]
        return pipe.pipeline.schedule, pipe.pipeline.microbatches, list(pipe.pipeline.report.schedule), odd
