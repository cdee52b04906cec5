"""Modules built from dotted names, so that tensors stand in them under the names that they have in the model."""

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
