"""Tensors of a model whose memory is in another process, or not yet anywhere.

A tensor that is *away* keeps its identity, shape and type, and has the memory of one number, which all of its entries
share. The number is NaN, so that a value that should not have been read shows.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from pipecompile.ops.freed_memory import give_back
from pipecompile.ops.torch_internals import _swap_tensor_impl

MARK = "_pipecompile_away"  # attribute of such a tensor


def send_away(tensors: Iterable[Tensor]) -> None:
    """Frees the memory of tensors of a model and of their gradients. Tensors on the meta device move to the CPU."""
    for tensor in tensors:
        one = _one(tensor)
        if tensor.is_meta:
            _swap_tensor_impl(tensor, one.requires_grad_(tensor.requires_grad))
        else:
            tensor.data = one
        setattr(tensor, MARK, True)
        tensor.grad = None
    give_back()


def bring(tensor: Tensor, value: Tensor) -> None:
    """Gives a tensor that is away a memory and a value, of its own shape and type."""
    tensor.data = value
    delattr(tensor, MARK)


def is_away(tensor: Tensor) -> bool:
    """Whether a tensor's memory is in another process, or not yet anywhere."""
    return hasattr(tensor, MARK)


def lacks_values(model: nn.Module) -> bool:
    """Whether a parameter of a model is on the meta device, or away."""
    return any(parameter.is_meta or is_away(parameter) for parameter in model.parameters())


def stand_in(tensor: Tensor) -> Tensor:
    """The tensor; for one that is away, made-up values, the same in all processes."""
    if not is_away(tensor):
        return tensor
    if not tensor.is_floating_point():
        return torch.zeros(tensor.shape, dtype=tensor.dtype)
    drawn = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0))
    scale = max(1, tensor.shape[-1] if tensor.ndim else 1) ** -0.5  # activations keep their size
    return drawn.mul_(scale).to(tensor.dtype).requires_grad_(tensor.requires_grad)


def _one(like: Tensor) -> Tensor:
    """The NaN (or zero) of a tensor that is away, as a tensor of its shape."""
    value = float("nan") if like.is_floating_point() or like.is_complex() else 0
    device = torch.device("cpu") if like.is_meta else like.device
    one = torch.full((), value, dtype=like.dtype, device=device).expand(like.shape)
    return nn.Parameter(one, like.requires_grad) if like.is_meta and isinstance(like, nn.Parameter) else one
