"""Products, convolutions, normalization, attention: samples stay apart as long as their dimension is not summed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from pipecompile.batching.rules.batch_types import PARTIAL, SHARED, Batched, Kind, Local, Partial, Shared
from pipecompile.batching.rules.use import Answer, Use, only_first, rule
from pipecompile.ops import functional


@rule("linear")
def linear(use: Use) -> Answer:
    """(..., batch, ..., in), (out, in) -> (..., batch, ..., out); mixes samples if the last dimension is the batch."""
    x, rest = use.node.args[0], [n for n in use.tensors if n is not use.node.args[0]]
    kind = use.kind(x)
    if not all(isinstance(use.kind(n), Shared) for n in rest):
        return use.mixed("weights that depend on samples")
    if isinstance(kind, Batched):
        return kind if kind.dim < use.ndim(x) - 1 else use.mixed("a product that sums over samples")
    return kind if isinstance(kind, Shared) else use.mixed()


@rule("matmul bmm mm mv dot rmatmul")
def matmul(use: Use) -> Answer:
    """(..., n, k), (..., k, m) -> (..., n, m), with the batch in n, m or a leading dimension, or sum (n, m) if it is k.

    Mixes samples if the batch is k of one operand only, or if operands put it into different dimensions of the result.
    """
    a, b = use.node.args[0], use.arg(1, "other", use.node.kwargs.get("mat2"))
    if use.name == "rmatmul":
        a, b = b, a
    return _product(use, a, b)


@rule("addmm baddbmm")
def add_product(use: Use) -> Answer:
    """(..., n, m), (..., n, k), (..., k, m) -> (..., n, m), as for matmul; mixes samples if k is the batch."""
    start = use.kind(use.node.args[0])
    names = ("batch1", "batch2") if use.name == "baddbmm" else ("mat1", "mat2")
    kind = _product(use, use.arg(1, names[0]), use.arg(2, names[1]))
    if isinstance(kind, Shared) and isinstance(start, Shared):
        return SHARED
    offset = len(use.out) - use.ndim(use.node.args[0])
    fits = isinstance(start, Shared) or (isinstance(start, Batched) and start.at(start.dim + offset) == kind)
    return kind if isinstance(kind, Batched) and fits else use.mixed()


def _product(use: Use, a: object, b: object) -> Kind:
    left, right, out = use.kind(a), use.kind(b), len(use.out)
    sizes = use.ndim(a), use.ndim(b)
    if (isinstance(left, Partial) and isinstance(right, Shared)) or (
        isinstance(right, Partial) and isinstance(left, Shared)
    ):
        return PARTIAL
    summed = (sizes[0] - 1, max(0, sizes[1] - 2))  # the dimensions that the product sums over
    over = [isinstance(k, Batched) and k.dim == dim for k, dim in zip((left, right), summed, strict=True)]
    if any(over):
        matched = all(over) and (left.outer, left.inner) == (right.outer, right.inner)  # type: ignore[union-attr]
        return PARTIAL if matched else use.mixed("a product that sums over samples")
    found: set[Kind] = set()
    for kind, ndim, first in ((left, sizes[0], True), (right, sizes[1], False)):
        if isinstance(kind, Batched):
            found.add(kind.at(_kept(kind.dim, ndim, out, sizes, first)))
        elif not isinstance(kind, Shared):
            return use.mixed()
    if len(found) > 1:
        return use.mixed("a product of samples with samples")
    return found.pop() if found else SHARED


def _kept(dim: int, ndim: int, out: int, sizes: tuple[int, int], first: bool) -> int:
    """Where a dimension of one factor is in the product."""
    if first:
        missing = 1 if sizes[1] == 1 else 0
        return dim - ndim + out + missing
    missing = 1 if sizes[0] == 1 and dim == ndim - 1 else 0
    return dim - ndim + out + (1 if sizes[0] == 1 and dim < ndim - 1 else 0) if not missing else out - 1


@rule("einsum")
def einsum(use: Use) -> Answer:
    """(..., batch, ...), ... -> (..., batch, ...), or sum (...) if the equation sums over the batch.

    Mixes samples if operands have the batch under different letters, or if an operand without a batch has the batch's
    letter. An equation with an ellipsis or without ``->`` has no rule.
    """
    equation = use.node.args[0]
    operands = use.node.args[1] if isinstance(use.node.args[1], tuple | list) else use.node.args[1:]
    if not isinstance(equation, str) or "." in equation or "->" not in equation:
        return None
    left, result = equation.replace(" ", "").split("->")
    return _contraction(use, operands, left.split(","), result)


@rule("tensordot")
def tensordot(use: Use) -> Answer:
    """(..., batch, ...), (...) -> (..., batch, ...), or sum (...) if both operands have the batch in a summed one.

    Mixes samples if one operand alone has, or both have the batch in dimensions that stay. Dimensions in a tensor have
    no rule.
    """
    a, b, dims = use.given("a"), use.given("b"), use.given("dims", 2)
    if isinstance(dims, int):
        summed = list(range(-dims, 0)), list(range(dims))
    elif isinstance(dims, tuple | list) and len(dims) == 2:
        summed = tuple([each] if isinstance(each, int) else each for each in dims)  # type: ignore[assignment]
    else:
        return None
    if not all(isinstance(each, tuple | list) and all(isinstance(dim, int) for dim in each) for each in summed):
        return None
    sizes = use.ndim(a), use.ndim(b)
    labels = list(range(sizes[0])), list(range(sizes[0], sum(sizes)))
    for left, right in zip(*summed, strict=True):
        labels[1][right % sizes[1]] = labels[0][left % sizes[0]]
    return _contraction(use, (a, b), labels, sorted(set(labels[0]) ^ set(labels[1])))


def _contraction(
    use: Use, operands: Sequence[object], labels: Sequence[Sequence[object]], result: Sequence[object]
) -> Answer:
    """What a sum of products is, from the labels of the dimensions of each operand and of the result."""
    found: set[tuple[object, int, int]] = set()
    for own, operand in zip(labels, operands, strict=True):
        kind = use.kind(operand)
        if isinstance(kind, Batched) and not kind.ragged:
            found.add((own[kind.dim], kind.outer, kind.inner))
        elif not isinstance(kind, Shared):
            return use.mixed()
    if not found:
        return SHARED
    if len(found) > 1:
        return use.mixed("a product of samples with samples")
    label, outer, inner = found.pop()
    users = [k for k, own in zip(map(use.kind, operands), labels, strict=True) if label in own]
    if not all(isinstance(k, Batched) for k in users):
        return use.mixed()
    return Batched(result.index(label), outer, inner) if label in result else PARTIAL


@rule("bilinear")
def bilinear(use: Use) -> Answer:
    """(..., batch, ..., in1), (..., batch, ..., in2) -> (..., batch, ..., out)."""
    kinds = {use.kind(n) for n in use.tensors} - {SHARED}
    kind = kinds.pop() if len(kinds) == 1 else None
    return kind if isinstance(kind, Batched) and kind.dim < len(use.out) - 1 else use.mixed()


@rule(F.embedding, "one_hot")
def embedding(use: Use) -> Answer:
    """(..., batch, ...) -> (..., batch, ..., width); mixes samples if scale_grad_by_freq=True."""
    if use.name == "embedding" and use.given("scale_grad_by_freq"):
        return use.mixed("gradients scaled by how often a word is in the batch", certain=True)
    kind = only_first(use, use.node.args[0])
    return kind if isinstance(kind, Batched | Shared) else use.mixed()


@rule(F.embedding_bag)
def bags(use: Use) -> Answer:
    """words (batch,), table (words, width), row numbers (batch,) as offsets -> (batch, width).

    Mixes samples if scale_grad_by_freq=True. Has no rule for other offsets, and for (batch, bag).
    """
    if use.given("scale_grad_by_freq"):
        return use.mixed("gradients scaled by how often a word is in the batch", certain=True)
    words, offsets, weights = use.given("input"), use.given("offsets"), use.given("per_sample_weights")
    alone = isinstance(use.kind(use.given("weight")), Shared) and not use.given("include_last_offset")
    if not alone or use.kind(offsets) != Local(0) or use.kind(words) != Batched(0):
        return None
    return Batched(0) if weights is None or use.kind(weights) == Batched(0) else None


@rule(torch.embedding, torch.ops.aten.embedding)
def table(use: Use) -> Answer:
    """(words, width), (..., batch, ...) -> (..., batch, ..., width); mixes samples if scale_grad_by_freq=True."""
    if use.arg(4, "scale_grad_by_freq", False):
        return use.mixed("gradients scaled by how often a word is in the batch", certain=True)
    kind = only_first(use, use.arg(1, "indices"))
    return kind if isinstance(kind, Batched | Shared) else use.mixed()


@rule("""
    conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d max_pool1d max_pool2d max_pool3d avg_pool1d
    avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d
    adaptive_max_pool2d adaptive_max_pool3d lp_pool1d lp_pool2d interpolate upsample upsample_nearest upsample_bilinear
    pixel_shuffle pixel_unshuffle channel_shuffle fold group_norm instance_norm local_response_norm
    affine_grid stft grid_sample max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices
""")
def images(use: Use) -> Answer:
    """(batch, channels, ...) -> (batch, channels, ...); mixes samples if the batch is not the first dimension."""
    if any(isinstance(use.kind(n), Partial) for n in use.tensors):
        return use.mixed()
    kinds = {use.kind(n) for n in use.tensors} - {SHARED}
    if not kinds:
        return _alike(use, SHARED)
    kind = kinds.pop()
    first = isinstance(kind, Batched) and kind.dim == 0 and not kinds
    return _alike(use, kind) if first and use.ndim(use.node.args[0]) > 2 else use.mixed()


def _alike(use: Use, kind: Kind) -> Answer:
    return kind if use.scale.shape(use.node) is not None else (kind,) * len(use.scale.shapes(use.node))


@rule("batch_norm")
def batch_norm(use: Use) -> Answer:
    """(batch, channels, ...) -> (batch, channels, ...); mixes samples if the batch is dimension 1.

    In training, each microbatch is normalized by its own statistics, as in GPipe (Huang et al. 2019, section 2.2).
    """
    kind = use.kind(use.node.args[0])
    return kind if isinstance(kind, Batched | Shared) and getattr(kind, "dim", 0) != 1 else use.mixed()


@rule(functional.moments)
def batch_moments(use: Use) -> Answer:
    """(batch, channels, ...) -> sum (3, channels), for a batch norm with deferred statistics."""
    kind = use.kind(use.node.args[0])
    return PARTIAL if isinstance(kind, Batched) and kind.dim != 1 else use.mixed()


@rule(functional.add_moments)
def running_statistics(use: Use) -> Answer:
    """mean (channels,), var (channels,), (3, channels) -> (channels,), shared: written once, in the tail."""
    return SHARED


@rule("layer_norm rms_norm")
def layer_norm(use: Use) -> Answer:
    """(..., batch, ..., width) -> (..., batch, ..., width); mixes samples if a normalized dimension is the batch."""
    first, shape = use.node.args[0], use.arg(1, "normalized_shape", ())
    kind = only_first(use, first)
    if isinstance(kind, Batched):
        return kind if kind.dim < use.ndim(first) - len(shape) else use.mixed("a normalization over samples")
    return kind if isinstance(kind, Shared) else use.mixed()


@rule("_weight_norm")
def weight_norm(use: Use) -> Answer:
    """(out, in), (out, 1) -> (out, in), shared; mixes samples if an operand depends on samples."""
    return SHARED if all(isinstance(use.kind(n), Shared) for n in use.tensors) else use.mixed()


@rule("scaled_dot_product_attention")
def attention(use: Use) -> Answer:
    """(..., batch, ..., length, width) of query, key, value, mask -> (..., batch, ..., length, width).

    Mixes samples unless the batch is the same leading dimension of every operand that has one.
    """
    out, found = len(use.out), set()
    for n in use.tensors:
        kind = use.kind(n)
        if isinstance(kind, Batched) and kind.dim < use.ndim(n) - 2:
            found.add(kind.at(kind.dim - use.ndim(n) + out))
        elif not isinstance(kind, Shared):
            return use.mixed("attention between samples")
    if len(found) > 1:
        return use.mixed("attention between samples")
    return found.pop() if found else SHARED


@rule("multi_head_attention_forward")
def multi_head_attention(use: Use) -> Answer:
    """query, key, value (length, batch, width) -> (length, batch, width), weights (batch, length, length)."""
    kinds = [use.kind(n) for n in use.node.args[:3]]
    if all(kind == Batched(1) for kind in kinds) and use.ndim(use.node.args[0]) == 3:
        count = len(use.scale.shapes(use.node))
        return (Batched(1), *(Batched(0),) * (count - 1))
    return use.mixed()


@rule("lstm gru rnn_tanh rnn_relu")
def recurrent(use: Use) -> Answer:
    """x (length, batch, in), states (layers, batch, width) -> (length, batch, width), states (layers, batch, width).

    With ``batch_first=True``, x and the first result are (batch, length, ...). The arguments are ``x, states, weights,
    biases, layers, dropout, training, bidirectional, batch_first``. The form for packed sequences has no rule.
    """
    x, states, flags = use.node.args[0], use.node.args[1], use.node.args[-1]
    if not isinstance(flags, bool) or use.ndim(x) != 3:
        return None
    dim = 0 if flags else 1
    kinds = [use.kind(n) for n in (states if isinstance(states, tuple | list) else (states,))]
    if use.kind(x) == SHARED and all(kind == SHARED for kind in kinds):
        return (SHARED,) * len(use.scale.shapes(use.node))
    fits = use.kind(x) == Batched(dim) and all(kind in (Batched(1), SHARED) for kind in kinds)
    return (Batched(dim), *(Batched(1),) * (len(use.scale.shapes(use.node)) - 1)) if fits else use.mixed()


@rule("lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell")
def cell(use: Use) -> Answer:
    """x (batch, in), states (batch, width) -> states (batch, width)."""
    kinds = {use.kind(n) for n in use.tensors} - {SHARED}
    if kinds == {Batched(0)}:
        count = len(use.scale.shapes(use.node))
        return (Batched(0),) * count if use.scale.shape(use.node) is None else Batched(0)
    return use.mixed()


@rule("cdist")
def cdist(use: Use) -> Answer:
    """(..., n, width), (..., m, width) -> (..., n, m), with the batch in n or in a leading dimension.

    Mixes samples if the batch is m.
    """
    out, found = len(use.out), set()
    for n in use.tensors[:2]:
        kind = use.kind(n)
        if isinstance(kind, Batched) and kind.dim < use.ndim(n) - 2:
            found.add(kind.at(kind.dim - use.ndim(n) + out))
        elif isinstance(kind, Batched) and n is use.node.args[0] and kind.dim == use.ndim(n) - 2:
            found.add(kind.at(out - 2))
        elif not isinstance(kind, Shared):
            return use.mixed()
    return found.pop() if len(found) == 1 else use.mixed("distances between samples")


@rule("""
    linalg_solve linalg_inv linalg_solve_triangular linalg_qr linalg_svd linalg_eigh linalg_cholesky linalg_det
    inverse
""")
def matrices(use: Use) -> Answer:
    """(..., batch, ..., n, m) -> (..., batch, ..., *sizes), for each result; mixes samples if the batch is n or m."""
    kinds = {use.kind(n) for n in use.tensors} - {SHARED}
    if not kinds:
        return _alike(use, SHARED)
    kind = kinds.pop()
    inside = isinstance(kind, Batched) and kind.dim < min(map(use.ndim, use.tensors)) - 2 and not kinds
    return _alike(use, kind) if inside else use.mixed()
