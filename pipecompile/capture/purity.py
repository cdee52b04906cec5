"""Finds nodes that must not be repeated, dropped or moved: random functions, functions with effects, costly ones."""

from __future__ import annotations

import torch
import torch.fx as fx
from torch import Tensor

from pipecompile.capture.origin import origin_of
from pipecompile.ops.autograd_functions import custom_of
from pipecompile.ops.functional import number
from pipecompile.ops.operators import function_of, is_opaque, named
from pipecompile.ops.randomness import draws
from pipecompile.ops.torch_internals import OpOverload

# Functions that compute much per byte of output: repeating them may cost more than sending the result.
_PRODUCTS = named("matmul bmm mm")
_CONTRACTIONS = _PRODUCTS | named("""
    linear addmm baddbmm einsum tensordot bilinear rmatmul conv1d conv2d conv3d conv_transpose1d conv_transpose2d
    conv_transpose3d scaled_dot_product_attention cdist stft istft fft_rfft fft_fft lstm gru rnn_tanh svd qr inverse
    pinverse cholesky linalg_svd linalg_qr linalg_inv linalg_pinv linalg_solve linalg_cholesky linalg_eigh sort argsort
    topk interpolate unfold
""")
CHEAP_CONTRACTION = 16  # most multiply-adds per output element of a cheap contraction


def name_of(node: fx.Node) -> str:
    """Returns the name of what a node calls: ``linear``, ``getitem``, ``size``."""
    if node.op == "call_function":
        if isinstance(node.target, OpOverload):  # aten::add.Tensor
            return str(node.target._schema.name).partition("::")[2]
        return str(getattr(node.target, "__name__", node.target))
    return str(node.target)


def is_random(node: fx.Node) -> bool:
    """Whether a node may give two different results when it runs twice."""
    if (custom := custom_of(node.target)) is not None:
        return custom.draws
    return node.op == "call_function" and draws(node.target, node.args, node.kwargs)


def has_effect(node: fx.Node) -> bool:
    """Whether a node must run exactly once: it writes a buffer, or draws random numbers."""
    return bool(origin_of(node).writes) or is_random(node)


def must_stay(node: fx.Node) -> bool:
    """Whether a node stays in the graph even if no other node reads it."""
    return node.op in ("placeholder", "output") or has_effect(node)


def is_cheap(node: fx.Node) -> bool:
    """Whether a node costs less to rematerialize in a stage than to receive."""
    function = function_of(node.target)
    if function is number:
        return True
    if node.op == "call_module" or is_opaque(function):
        return False
    if function not in _CONTRACTIONS:
        return True
    if function not in _PRODUCTS:
        return False
    first = node.args[0]
    value = first.meta.get("val") if isinstance(first, fx.Node) else None
    return isinstance(value, Tensor) and _hint(value.shape[-1]) <= CHEAP_CONTRACTION


def _hint(size: int | torch.SymInt) -> int:
    return size.node.hint if isinstance(size, torch.SymInt) else size
