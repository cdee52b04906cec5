"""Fresh inputs drawn like a sample call's: other values, and another batch size and other lengths.

Floats are drawn from a normal distribution with the sample's mean and deviation. Integers and flags are drawn from the
values that the sample holds, so that ids stay in range and ignored labels stay ignored. Where an order or a layout has
a meaning (masks, positions, offsets) whole rows are drawn, not elements.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pipecompile.capture import Call, Captured
from pipecompile.ops.symbols import resolve

FEW = 2  # distinct values of a tensor that is taken for a mask or a constant


def like(call: Call, shapes: Mapping[str, tuple[int, ...]], generator: torch.Generator) -> dict[str, Tensor]:
    """Fresh tensors for a call.

    Args:
        shapes: of each tensor, of the sample's rank.
    """
    fresh = {}
    for name, sample in call.tensors.items():
        drawn = _drawn(sample.detach(), shapes[name], name in call.batched, generator)
        fresh[name] = drawn.to(sample.device).requires_grad_(sample.requires_grad)
    return fresh


def other_shapes(captured: Captured, call: Call) -> dict[str, tuple[int, ...]] | None:
    """The shapes of another batch size and other lengths, as far as these are symbols; None if none is."""
    values = captured.size_values(call.tensors)
    batch = {s for s, (name, dim) in captured.sizes.items() if dim == 0 and name in call.batched}
    lengths = {s: _shorter(size) for s, size in values.items() if s not in batch}
    rows = None if call.batch is None or not batch else call.batch + 1
    shapes = {}
    for name, sample in call.tensors.items():
        sizes = [int(resolve(size, {**values, **lengths})) for size in captured.shapes[name]]
        if name in call.batched:
            sizes[0] = rows or int(sample.shape[0])
        shapes[name] = tuple(sizes)
    same = all(shapes[name] == tuple(t.shape) for name, t in call.tensors.items())
    return None if same else shapes


def same_shapes(call: Call) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in call.tensors.items()}


def _shorter(size: int) -> int:
    """Three quarters of a length, and an even one where it was even; short ones grow, lest they become a single one."""
    return size + 1 if size < 4 else size * 3 // 8 * 2 if size % 2 == 0 else size * 3 // 4


def _drawn(sample: Tensor, shape: tuple[int, ...], batched: bool, generator: torch.Generator) -> Tensor:
    cpu = sample.cpu()
    if not cpu.numel():
        return torch.zeros(shape, dtype=cpu.dtype)
    if _has_layout(cpu):
        return _rows(cpu, shape, batched, generator)
    if not cpu.dtype.is_floating_point and not cpu.dtype.is_complex:
        return cpu.flatten()[torch.randint(cpu.numel(), shape, generator=generator)]
    wide = cpu.to(torch.complex128 if cpu.dtype.is_complex else torch.float64)
    finite = wide[wide.isfinite()]
    noise = torch.randn(shape, dtype=wide.dtype, generator=generator)
    return (finite.mean() + noise * finite.std(correction=0)).to(cpu.dtype)


def _has_layout(tensor: Tensor) -> bool:
    """Whether elements stand where they stand for a reason: flags, few values, or an ascending row."""
    if tensor.dtype == torch.bool or torch.unique(tensor).numel() <= FEW:
        return True
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex or tensor.dim() == 0:
        return not bool(tensor.isfinite().all())
    return tensor.shape[-1] > 1 and bool((tensor.diff(dim=-1) >= 0).all())


def _rows(sample: Tensor, shape: tuple[int, ...], batched: bool, generator: torch.Generator) -> Tensor:
    """Rows of the sample, drawn; longer ones go on as they end."""
    out = sample
    for dim, size in enumerate(shape):
        if dim == 0 and batched:
            index = torch.randint(sample.shape[0], (size,), generator=generator)
        else:
            index = torch.arange(size).clamp(max=max(0, sample.shape[dim] - 1))
        out = out.index_select(dim, index)
    return out.clone()
