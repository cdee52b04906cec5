"""A cut that moves between two steps, beside pipelines that begin with the new cut from a checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional as F

import pipecompile

VOCABULARY, D, LAYERS, ROWS = 11, 6, 4, 8
FIRST, SECOND = [0, 0, 0, 1], [0, 1, 1, 1]  # the stage of each layer


class Tied(nn.Module):
    """The head is the embedding, and belongs to the first stage that reads it; layers draw, and count their calls."""

    def __init__(self, normalized: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, D)
        self.layers = nn.ModuleList(nn.Linear(D, D) for _ in range(LAYERS))
        self.norms = nn.ModuleList(nn.BatchNorm1d(D) if normalized else nn.Identity() for _ in range(LAYERS))
        self.head = nn.Linear(D, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        hidden = self.embedding(ids)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            hidden = F.dropout(norm(torch.tanh(layer(hidden))), 0.2, self.training)
        return F.cross_entropy(self.head(hidden), labels)


def _plan(stages: list[int], ranks: int) -> pipecompile.PlanOptions:
    """Layers in stages; the head goes with the last one, and with more than two ranks each has a layer."""
    if ranks == 4:
        stages = [0, 1, 2, 3] if stages is FIRST else [0, 0, 1, 3]
    return pipecompile.PlanOptions(pins={f"layers.{layer}": stage for layer, stage in enumerate(stages)})


def _piped(stages: list[int], parts: int, normalized: bool, **options: Any) -> tuple[Any, Any, Any]:
    """A pipeline with AdamW in two groups and a scheduler, from the same seed."""
    ranks = dist.get_world_size() // parts
    mesh = init_device_mesh("cpu", (parts, ranks), mesh_dim_names=("data", "stage"))
    mesh = mesh if parts > 1 else init_device_mesh("cpu", (ranks,), mesh_dim_names=("stage",))
    torch.manual_seed(0)
    pipe = pipecompile.compile(
        Tied(normalized),
        mesh=mesh,
        microbatches=4 // parts,
        costs="count",
        plan=_plan(stages, ranks),
        example_inputs=_batch(0, parts),
        **options,
    )
    named = dict(pipe.named_parameters())
    decays = [p for name, p in named.items() if name.endswith("weight")]
    others = [p for name, p in named.items() if not name.endswith("weight")]
    optimizer = torch.optim.AdamW(
        [{"params": decays, "weight_decay": 0.3}, {"params": others or [], "weight_decay": 0.0}], lr=0.1
    )
    return pipe, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)


def _batch(step: int, parts: int) -> tuple[Tensor, Tensor]:
    drawn = torch.randint(VOCABULARY, (2, ROWS), generator=torch.Generator().manual_seed(step))
    ids, labels = drawn.chunk(parts, 1)[dist.get_rank() * parts // dist.get_world_size()]
    return ids, labels


def _steps(pipe: Any, optimizer: Any, scheduler: Any, steps: range, parts: int) -> list[float]:
    losses = []
    for step in steps:
        torch.manual_seed(step)
        loss = pipe(*_batch(step, parts))
        loss.backward()
        pipe.pipeline.clip_grad_norm_(0.5)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def _seen(pipe: Any, optimizer: Any) -> dict[str, Tensor]:
    """What a rank has, by name."""
    names = {id(p): name for name, p in pipe.named_parameters()}
    seen = {f"state {name}": tensor.clone() for name, tensor in pipe.state_dict().items()}
    for place, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            if parameter.numel() == 0:  # a rank that trains none of the model has an empty one
                continue
            name = f"group {place} with {group['lr']:g} {names[id(parameter)]}"
            seen[name] = parameter.detach().clone()
            seen |= {f"{name} {key}": value.clone() for key, value in optimizer.state.get(parameter, {}).items()}
    return seen


def moved(directory: str, parts: int = 1, normalized: bool = True) -> dict[str, Any]:
    """Two steps, a move, three steps; and a new pipeline with the new cut, from a checkpoint, for the last three."""
    torch.set_num_threads(1)
    pipe, optimizer, scheduler = _piped(FIRST, parts, normalized)
    _steps(pipe, optimizer, scheduler, range(2), parts)
    waits = pipe(*_batch(9, parts))
    path = Path(directory) / "checkpoint"
    pipecompile.save(path, pipe, optimizer)
    rates = scheduler.state_dict()
    before = {name for name, _ in pipe.named_parameters()}
    ranks = dist.get_world_size() // parts
    pipe.pipeline.replan(plan=_plan(SECOND, ranks), costs=pipe.pipeline.costs, optimizer=optimizer)
    try:
        waits.backward()
        said = ""
    except pipecompile.PipecompileError as error:
        said = str(error)
    after = {name for name, _ in pipe.named_parameters()}
    held = sum(p.untyped_storage().nbytes() for p in pipe.pipeline.model.parameters())
    losses = _steps(pipe, optimizer, scheduler, range(2, 5), parts)
    found = _seen(pipe, optimizer)
    pipe.eval()
    with torch.no_grad():
        losses.append(pipe(*_batch(5, parts)).item())
    pipe.pipeline.close()

    fresh, other, rate = _piped(SECOND, parts, normalized)
    pipecompile.load(path, fresh, other)
    rate.load_state_dict(rates)
    expected = _steps(fresh, other, rate, range(2, 5), parts)
    wanted = _seen(fresh, other)
    fresh.eval()
    with torch.no_grad():
        expected.append(fresh(*_batch(5, parts)).item())
    holds = sum(p.untyped_storage().nbytes() for p in fresh.pipeline.model.parameters())
    fresh.pipeline.close()
    return {
        "moved": sorted(before ^ after),
        "losses": losses == expected,
        "names": found.keys() == wanted.keys() or sorted(found.keys() ^ wanted.keys()),
        "differ": [name for name in found.keys() & wanted.keys() if not torch.equal(found[name], wanted[name])],
        "trained": sorted(after),
        "states": sum("exp_avg_sq" in name for name in found),
        "held": (held, holds),
        "waits": said,
    }


def gradients_move() -> list[str]:
    """What differs if a step's two backwards have a move in between: gradients of the first one move too.

    The optimizer knows the names of its parameters.
    """
    torch.set_num_threads(1)

    def trained(moves: bool) -> dict[str, Tensor]:
        pipe, _, _ = _piped(FIRST if moves else SECOND, 1, False)
        optimizer = torch.optim.AdamW(pipe.named_parameters(), lr=0.1)
        for step in range(2):
            torch.manual_seed(step)
            pipe(*_batch(step, 1)).backward()
            if moves and step == 0:
                pipe.pipeline.replan(plan=_plan(SECOND, 2), costs=pipe.pipeline.costs, optimizer=[optimizer])
        seen = {name: p.grad.clone() for name, p in pipe.named_parameters()}
        (group,), names = optimizer.param_groups, {id(p): name for name, p in pipe.named_parameters()}
        assert group["param_names"] == [names[id(p)] for p in group["params"]]
        assert names.keys() == {id(p) for p in group["params"]}
        pipe.pipeline.close()
        return seen

    found, expected = trained(True), trained(False)
    assert found
    return [name for name in found.keys() | expected.keys() if not torch.equal(found[name], expected[name])]


def refused() -> dict[str, str]:
    """What is said of moves that cannot be made, by case; the pipeline trains on after each."""
    torch.set_num_threads(1)
    pipe, optimizer, scheduler = _piped(FIRST, 1, False)
    plan, rank, said = _plan(SECOND, 2), dist.get_rank(), {}

    def attempt(case: str, **options: Any) -> None:
        try:
            pipe.pipeline.replan(**{"plan": plan, "costs": pipe.pipeline.costs, **options})
        except pipecompile.PipecompileError as error:
            said[case] = str(error)

    attempt("early", optimizer=optimizer)
    _steps(pipe, optimizer, scheduler, range(2), 1)
    attempt("missing")
    attempt("no optimizer", optimizer=7)
    others = torch.optim.AdamW(pipe.parameters(), lr=0.1 if rank else 0.2)
    attempt("groups", optimizer=others)
    attempt("fewer", optimizer=torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1))
    attempt("all at once", optimizer=torch.optim.LBFGS(pipe.parameters()))
    costs = pipe.pipeline.costs
    doubled = replace(costs, costs=tuple(replace(c, forward=2 * c.forward) for c in costs.costs))
    attempt("other plan", optimizer=optimizer, plan=_plan(FIRST if rank else SECOND, 2))
    attempt("no plan", optimizer=optimizer, plan=plan if rank else None)
    attempt("other costs", optimizer=optimizer, costs=doubled if rank else costs)
    attempt("no costs", optimizer=optimizer, costs=None if rank else costs)
    attempt("no file", optimizer=optimizer, costs="not there.json" if rank else costs)
    before = {name for name, _ in pipe.named_parameters()}
    _steps(pipe, optimizer, scheduler, range(2, 4), 1)
    said["same"] = str(before == {name for name, _ in pipe.named_parameters()})
    pipe.pipeline.replan(plan=_plan(FIRST, 2), optimizer=optimizer)  # back is no move; from the times of a step
    said["measured"] = pipe.pipeline.costs.origin
    _steps(pipe, optimizer, scheduler, range(4, 6), 1)
    attempt("none", optimizer=())
    pipe.pipeline.close()
    pipe, optimizer, scheduler = _piped([0] * LAYERS, 2, False, fully_shard=True)
    attempt("divided", optimizer=optimizer)
    pipe.pipeline.close()
    return said
