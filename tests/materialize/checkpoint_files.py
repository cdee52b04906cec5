"""Checkpoints for tests: one file, or shards with an index."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """A state dict without shared memory; a tied weight is under its first name alone."""
    seen: set[int] = set()
    state = {}
    for key, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            state[key] = tensor.detach().clone()
            seen.add(id(tensor))
    return state


def saved(state: Mapping[str, Tensor], folder: Path, shards: int = 1) -> Path:
    """Saves a state, and returns the path to pass to ``from_checkpoint``."""
    if shards == 1:
        save_file(dict(state), folder / "model.safetensors")
        return folder
    names = {key: f"model-{number % shards}.safetensors" for number, key in enumerate(state)}
    for file in set(names.values()):
        save_file({key: tensor for key, tensor in state.items() if names[key] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return folder
