"""Modules of the pipeline itself.

They are built from dotted names, so that tensors have the same names in them as in the model. They are called without
global module hooks, which are for the model's modules.
"""

from __future__ import annotations

from typing import Any

from torch import nn


def owner_of(root: nn.Module, target: str) -> tuple[Any, str]:
    """Returns the module that owns a dotted name, creating missing modules, and the last part of the name."""
    *parents, last = target.split(".")
    owner: Any = root
    for parent in parents:
        if parent not in owner._modules:
            owner.add_module(parent, nn.Module())
        owner = owner._modules[parent]
    return owner, last


def called_bare(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Calls a module without running hooks."""
    return module.forward(*args, **kwargs)
