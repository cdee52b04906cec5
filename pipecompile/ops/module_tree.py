"""Modules of the pipeline's own.

They are built from dotted names, so that tensors stand in them under the names that they have in the model, and called
without the hooks of all modules, which are for the model's.
"""

from __future__ import annotations

from typing import Any

from torch import nn


def owner_of(root: nn.Module, target: str) -> tuple[Any, str]:
    """The module that a dotted name is an attribute of, made on the way, and the last part of the name."""
    *parents, last = target.split(".")
    owner: Any = root
    for parent in parents:
        if parent not in owner._modules:
            owner.add_module(parent, nn.Module())
        owner = owner._modules[parent]
    return owner, last


def called_bare(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The call of a module that runs no hooks."""
    return module.forward(*args, **kwargs)
