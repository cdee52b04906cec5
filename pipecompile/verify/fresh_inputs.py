"""Fresh inputs like those of a sample call: other values, another batch size, other lengths.

Floats are drawn from a normal distribution with the sample's mean and standard deviation. Integers and flags are drawn
from the sample's values, so that ids stay in range and ignored labels stay ignored. If order or layout matters (masks,
positions, offsets), whole rows are drawn instead of elements.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pipecompile.capture import Call, Captured
from pipecompile.ops.symbols import resolve

FEW = 2  # distinct values at which a tensor counts as a mask or a constant


def like(call: Call, shapes: Mapping[str, tuple[int, ...]], generator: torch.Generator) -> dict[str, Tensor]:
    """Fresh tensors for a call.

    Args:
        shapes: the shape of each tensor, with as many dimensions as the sample.
    """
    fresh = {}
    for name, sample in call.tensors.items():
        drawn = _drawn(sample.detach(), shapes[name], name in call.batched, generator)
        fresh[name] = drawn.to(sample.device).requires_grad_(sample.requires_grad)
    return fresh


def other_shapes(captured: Captured, call: Call) -> dict[str, tuple[int, ...]] | None:
    """Shapes with another batch size and other lengths, where these are symbolic; None if all are fixed."""
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
    """The shapes of a call's tensors."""
    return {name: tuple(tensor.shape) for name, tensor in call.tensors.items()}


def _shorter(size: int) -> int:
    """Three quarters of a length, which stays even if it was.

    Lengths below 4 are increased by one instead, so that no dimension becomes 1.
    """
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
    """Whether positions of elements matter: flags, few distinct values, non-finite values, or an ascending row."""
    if tensor.dtype == torch.bool or torch.unique(tensor).numel() <= FEW:
        return True
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex or tensor.dim() == 0:
        return not bool(tensor.isfinite().all())
    return tensor.shape[-1] > 1 and bool((tensor.diff(dim=-1) >= 0).all())


def _rows(sample: Tensor, shape: tuple[int, ...], batched: bool, generator: torch.Generator) -> Tensor:
    """Random rows of the sample; longer dimensions repeat the last element."""
    out = sample
    for dim, size in enumerate(shape):
        if dim == 0 and batched:
            index = torch.randint(sample.shape[0], (size,), generator=generator)
        else:
            index = torch.arange(size).clamp(max=max(0, sample.shape[dim] - 1))
        out = out.index_select(dim, index)
    return out.clone()
