"""Lets the unsplit model run where its parameters are on several devices."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pipecompile.capture.state.model_state import named_tensors
from pipecompile.ops.accelerators import factories_on
from pipecompile.ops.torch_internals import pytree


@contextmanager
def on_one_device(model: nn.Module, device: torch.device | None = None) -> Iterator[Callable[[Any], Any]]:
    """The unsplit model on one device, in place: a context in which it can run, and its backward.

    Args:
        device: by default that of its first tensor.

    Returns:
        A function that copies the tensors of an argument tree to the device.
    """
    tensors = list({id(tensor): tensor for _, tensor in named_tensors(model)}.values())
    here = device or next((tensor.device for tensor in tensors), None)
    elsewhere = [(tensor, tensor.data) for tensor in tensors if tensor.device != here]
    try:
        for tensor, own in elsewhere:
            tensor.data = own.to(here)
        versions = [tensor._version for tensor, _ in elsewhere]
        with factories_on(here):
            yield lambda tree: pytree.tree_map_only(Tensor, lambda t: t if here is None else t.to(here), tree)
    finally:
        for (tensor, own), version in zip(elsewhere, versions, strict=True):
            if tensor._version != version or not isinstance(tensor, nn.Parameter):  # batch norm writes unseen
                own.copy_(tensor.data)
            tensor.data = own
