"""What a node may not be: repeated, dropped or moved. Random functions, functions with effects, and heavy ones."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from pipecompile.capture.origin import origin_of

_RANDOM = frozenset(
    {
        "dropout", "dropout_", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout",
        "feature_dropout", "native_dropout", "rrelu", "rrelu_", "gumbel_softmax", "rand", "randn", "randint",
        "randperm", "rand_like", "randn_like", "randint_like", "bernoulli", "bernoulli_", "multinomial",
        "normal", "normal_", "uniform_", "exponential_", "geometric_", "cauchy_", "log_normal_", "random_", "poisson",
        "fractional_max_pool2d", "fractional_max_pool3d",
    }
)  # fmt: skip

# Functions that do much for each byte they give: repeating them may cost more than sending.
_CONTRACTIONS = frozenset(
    {
        "linear", "matmul", "bmm", "mm", "addmm", "baddbmm", "einsum", "tensordot", "bilinear", "__matmul__",
        "__rmatmul__", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
        "scaled_dot_product_attention", "cdist", "stft", "istft", "fft_rfft", "fft_fft", "lstm", "gru", "rnn_tanh",
        "svd", "qr", "inv", "pinv", "solve", "cholesky", "eigh", "sort", "argsort", "topk", "interpolate", "unfold",
    }
)  # fmt: skip
CHEAP_CONTRACTION = 16  # multiply-adds per element of output up to which a contraction counts as cheap


def name_of(node: fx.Node) -> str:
    """What a node calls: ``linear``, ``getitem``, ``size``."""
    if node.op == "call_function":
        return str(getattr(node.target, "__name__", node.target))
    return str(node.target)


def is_random(node: fx.Node) -> bool:
    """Whether running a node twice may give two results."""
    name = name_of(node)
    if name == "scaled_dot_product_attention":
        return bool(_argument(node, 4, "dropout_p", 0.0))
    if "dropout" in name and name in _RANDOM:
        return bool(_argument(node, 2, "training", True)) and _argument(node, 1, "p", 0.5) != 0.0
    return name in _RANDOM


def _argument(node: fx.Node, position: int, name: str, default: Any) -> Any:
    return node.kwargs.get(name, node.args[position] if len(node.args) > position else default)


def has_effect(node: fx.Node) -> bool:
    """Whether a node must run exactly once: it writes a buffer, or draws random numbers."""
    return bool(origin_of(node).writes) or is_random(node)


def is_cheap(node: fx.Node) -> bool:
    """Whether a stage had better compute a node again than receive it."""
    if name_of(node) not in _CONTRACTIONS:
        return True
    if name_of(node) not in ("matmul", "bmm", "mm", "__matmul__"):
        return False
    first = node.args[0]
    value = first.meta.get("val") if isinstance(first, fx.Node) else None
    return isinstance(value, Tensor) and _hint(value.shape[-1]) <= CHEAP_CONTRACTION


def _hint(size: int | torch.SymInt) -> int:
    return size.node.hint if isinstance(size, torch.SymInt) else size
