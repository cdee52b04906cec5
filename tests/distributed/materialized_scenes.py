"""Pipelines of models that no process has as a whole, beside those of models that were loaded or initialised whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from unfilled import MAKE, SEED, STEPS, batch, initialized, on_meta, trained

import pipecompile
from pipecompile.ops.away import is_away


def compiled(model: nn.Module, **options: Any) -> Any:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("stage",))
    return pipecompile.compile(model, mesh=mesh, microbatches=4, costs="count", **options)


def trains_alike(name: str, folder: str, dtype: str = "float32") -> list[str]:
    """What differs after training, by initialisers and from a checkpoint, from the model that was initialised whole."""
    torch.set_num_threads(1)
    kind = getattr(torch, dtype)
    make: Callable[[], nn.Module] = lambda: MAKE[name]().to(kind)  # noqa: E731
    whole = initialized(make)
    path = Path(folder, f"{dist.get_rank()}.safetensors")
    save_model(whole, str(path))
    dist.barrier()
    with (first := compiled(whole)).pipeline:
        expected = trained(first)
    wrong = []
    for options in ({}, {"from_checkpoint": path}, {"from_checkpoint": path, "example_inputs": batch(0)}):
        torch.manual_seed(SEED)
        state = torch.get_rng_state()
        pipe = compiled(on_meta(make), **options)
        with pipe.pipeline:
            found = trained(pipe)
            assert all("not compared" in line for line in pipe.pipeline.report.verified)
        draws = pipe.pipeline._capture_in_use.is_random
        assert draws or torch.equal(torch.get_rng_state(), state), "nothing of the caller's is drawn"
        assert found.keys() == expected.keys()
        assert len(found) > STEPS
        model = pipe.pipeline.model
        assert dist.get_world_size() == 1 or any(is_away(p) for p in model.parameters())
        wrong += [f"{options}: {key}" for key, value in found.items() if not torch.equal(value, expected[key])]
    return wrong


def refused(way: str, folder: str) -> str:
    """The error with which all processes refuse to fill a model."""
    rank = dist.get_rank()
    torch.manual_seed(rank if way == "other seeds" else 0)
    path: Path | None = Path(folder, "model.safetensors")
    if way == "one has no file":
        path = path if rank == 0 else Path(folder, "none")
    elif way != "missing keys":
        path = None
    make = {"no initialiser": Around, "reads another's": Reading}.get(way, MAKE["custom"])
    try:
        compiled(on_meta(make), from_checkpoint=path, example_inputs=batch(0))
    except pipecompile.InputError as error:
        return str(error)
    return ""


class Around(nn.Module):
    """Has a parameter that no initialiser sets."""

    def __init__(self) -> None:
        super().__init__()
        self.custom = MAKE["custom"]()
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, **kwargs: torch.Tensor) -> torch.Tensor:
        return self.custom(**kwargs)["loss"] * self.gain


class Reading(Around):
    """Its initialiser computes a parameter of the last stage from one of the first."""

    def reset_parameters(self) -> None:
        nn.init.ones_(self.gain)
        first, *_, last = self.custom.layers
        last.linear.weight.copy_(first.linear.weight)
