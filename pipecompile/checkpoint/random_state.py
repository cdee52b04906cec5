"""The states of all random generators, as plain values."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from pipecompile.ops.accelerators import default_generators


def random_state() -> dict[str, Any]:
    """The present states of the generators of torch, by device, of Python and of numpy."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    return {
        "torch": {str(generator.device): generator.get_state() for generator in default_generators()},
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys, np.int64)), *rest),
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Sets the generators; those of devices that are not here are left out."""
    for generator in default_generators():
        if (found := state["torch"].get(str(generator.device))) is not None:
            generator.set_state(found)
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
