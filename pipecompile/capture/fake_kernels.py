"""Replacements, on fake tensors, for functions whose fake kernel is missing or rejects what the real kernel accepts.

A replacement returns a tensor of the right shape, dtype and ``requires_grad``; the graph records the function itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipecompile.errors import DependsOnData
from pipecompile.ops import functional


def _grouped_mm(a: Tensor, b: Tensor, *, offs: Tensor | None = None, bias: Any = None, out_dtype: Any = None) -> Tensor:
    """The fake kernel requires bfloat16; the real one on CPU accepts any dtype."""
    if offs is None:
        return torch.bmm(a, b)
    if b.ndim == 3:  # the rows of a are grouped, one matrix of b per group
        return a @ b[0] if a.ndim == 2 else torch.bmm(a, b)
    return (a @ b).unsqueeze(0).expand(offs.shape[0], -1, -1) * 1  # the contracted dimension is grouped


def _ctc_loss(log_probs: Tensor, targets: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """What ctc_loss saves for its backward has a data-dependent shape; its result does not."""
    reduction = kwargs.get("reduction", args[3] if len(args) > 3 else "mean")
    none = reduction in ("none", 0)
    return log_probs.sum((0, 2)) if none and log_probs.ndim == 3 else log_probs.sum()


def _histc(x: Tensor, bins: int = 100, *args: Any, **kwargs: Any) -> Tensor:
    """The fake CPU kernel rejects integers, which the GPU kernel accepts."""
    return x.new_zeros(bins)


def _gaussian_nll_loss(
    input: Tensor, target: Tensor, var: Any, full: bool = False, eps: float = 1e-6, reduction: str = "mean"
) -> Tensor:
    """The function checks whether any variance is negative, which needs real values."""
    if isinstance(var, Tensor) and var.ndim == input.ndim - 1:
        var = var.unsqueeze(-1)
    loss: Tensor = (input - target) / var
    return loss if reduction == "none" else loss.sum()


def _cov(input: Tensor, **options: Any) -> Tensor:
    """The function checks whether there are enough observations, by a value in a tensor."""
    return input @ input.T if input.ndim == 2 else (input * input).sum()


def _bincount(input: Tensor, weights: Tensor | None = None, minlength: Any = 0) -> Tensor:
    """``minlength`` entries; the recorded function checks that there are no more."""
    if isinstance(minlength, int) and minlength == 0:
        return torch.bincount(input, weights)
    if weights is None:
        return input.new_zeros(minlength, dtype=torch.int64)
    return weights.new_zeros(minlength, dtype=weights.dtype if weights.dtype == torch.float32 else torch.float64)


def _sparse_coo_tensor(indices: Tensor, values: Tensor, size: Any = None, **options: Any) -> Tensor:
    """Fakes of sparse tensors are dense, because few fake kernels accept sparse ones."""
    if size is None:
        raise DependsOnData("the size of a sparse tensor is inferred from its indices; pass size=")
    return values.new_zeros(size) * values.sum()


def _sparse_mm(a: Tensor, b: Tensor, *reduce: Any) -> Tensor:
    return a @ b


def _sparse_addmm(mat: Tensor, a: Tensor, b: Tensor, **options: Any) -> Tensor:
    return torch.addmm(mat, a, b)


def _same(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return x * 1


STAND_INS: dict[Callable[..., Any], Callable[..., Any]] = {
    F.ctc_loss: _ctc_loss,
    torch.histc: _histc,
    F.gaussian_nll_loss: _gaussian_nll_loss,
    torch.cov: _cov,
    torch.corrcoef: _cov,
    torch.bincount: _bincount,
    Tensor.bincount: _bincount,
    functional.bincount: _bincount,
    torch.sparse_coo_tensor: _sparse_coo_tensor,
    torch.sparse.mm: _sparse_mm,
    torch.sparse.addmm: _sparse_addmm,
    torch.fake_quantize_per_tensor_affine: _same,
    torch.fake_quantize_per_channel_affine: _same,
    Tensor.coalesce: _same,
    Tensor.to_sparse: _same,
    Tensor.to_sparse_csr: _same,
    Tensor.to_dense: _same,
    **({F.grouped_mm: _grouped_mm} if hasattr(F, "grouped_mm") else {}),
    **({torch._grouped_mm: _grouped_mm} if hasattr(torch, "_grouped_mm") else {}),
}

# What the graph records for functions whose results can have other shapes than those of their replacements.
RECORDED = {torch.bincount: functional.bincount, Tensor.bincount: functional.bincount}
