"""Devices as constants of a graph: a model that says ``device=x.device`` must run wherever its stage runs."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx as fx


def retarget(argument: Any, old: torch.device, new: torch.device) -> Any:
    """An fx argument (nested) with the device that the trace was made for replaced by another."""
    match argument:
        case torch.device() if same_device(argument, old):
            return new
        case str() if argument in ("cpu", "cuda", "mps", "xpu", "meta") and same_device(torch.device(argument), old):
            return str(new)
        case fx.immutable_collections.immutable_list() | list():
            return [retarget(item, old, new) for item in argument]
        case tuple() if hasattr(argument, "_fields"):
            return type(argument)(*(retarget(item, old, new) for item in argument))
        case tuple():
            return tuple(retarget(item, old, new) for item in argument)
        case dict():
            return {key: retarget(item, old, new) for key, item in argument.items()}
        case _:
            return argument


def same_device(a: torch.device, b: torch.device) -> bool:
    """Whether two devices are the same, a missing index standing for any."""
    return a.type == b.type and (a.index is None or b.index is None or a.index == b.index)
