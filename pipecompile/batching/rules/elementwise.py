"""Elementwise functions, with broadcasting, and the arithmetic of sums over the batch."""

from __future__ import annotations

from typing import Any

import torch.fx as fx

from pipecompile.batching.rules.batch_types import PARTIAL, SHARED, Batched, Kind, Local, Mixed, Partial, Shared
from pipecompile.batching.rules.even_rows import met
from pipecompile.batching.rules.use import Answer, Edited, RowsArgument, ShareArgument, Use, WholeArgument, rule
from pipecompile.ops import functional

NONLINEAR = """
    abs absolute acos acosh asin asinh atan atan2 atanh arctan arctan2 bitwise_and bitwise_not bitwise_or bitwise_xor
    bitwise_left_shift bitwise_right_shift ceil celu clamp clamp_max clamp_min clip copysign cos cosh deg2rad digamma
    elu eq erf erfc erfinv exp exp2 expm1 float_power floor floor_divide floordiv fmax fmin fmod frac ge gelu gt
    hardshrink hardsigmoid hardswish hardtanh heaviside hypot i0 igamma igammac isclose isfinite isinf isnan le
    leaky_relu lerp lgamma log log10 log1p log2 logaddexp logaddexp2 logical_and logical_not logical_or logical_xor
    logit logsigmoid log_sigmoid lt maximum minimum mish mod mvlgamma nan_to_num ne nextafter polygamma pow
    prelu reciprocal relu relu6 remainder round rrelu rsqrt selu sgn sigmoid sign signbit silu sin sinc sinh softplus
    softshrink softsign special_expit special_erf special_log1p special_xlog1py sqrt square tan tanh tanhshrink
    threshold trunc fix where masked_fill xlogy and __rand__ or xor invert lshift rshift angle polar complex
    addcdiv addcmul rpow rfloordiv rmod dropout alpha_dropout feature_alpha_dropout feature_dropout dropout1d dropout2d
    dropout3d bernoulli
    rand_like randn_like randint_like poisson zero fill uniform normal exponential
    geometric cauchy log_normal random quantize_per_tensor fake_quantize_per_tensor_affine
    bool long int short byte
"""
LINEAR = """
    clone contiguous detach alias float double half bfloat16 to type type_as cpu cuda requires_grad positive neg
    negative alias lift_fresh conj real imag resolve_conj resolve_neg copy
"""


def broadcast(use: Use, arguments: list[Any]) -> Kind:
    """The kind of an elementwise result of broadcast operands."""
    found: Kind = SHARED
    of: Any = None
    for argument in arguments:
        kind = use.kind(argument)
        if isinstance(kind, Batched | Local):
            placed = _aligned(kind, use.ndim(argument), len(use.out))
            placed = Batched(placed.dim) if isinstance(kind, Local) and len(arguments) > 1 else placed
            if isinstance(found, Shared):
                found, of = placed, argument
            elif found != placed:
                same = met(use, (found, of), (placed, argument))
                if same is None:
                    return use.mixed(f"{use.name} of values with the batch in different dimensions")
                found, of = same, argument if same == placed else of
        elif not isinstance(kind, Shared):
            return kind if isinstance(kind, Mixed) else use.mixed(f"{use.name} of a sum over the batch")
    return found


def _aligned(kind: Batched | Local, ndim: int, out: int) -> Batched | Local:
    dim = kind.dim - ndim + out
    return kind.at(dim) if isinstance(kind, Batched) else Local(dim)


def _numbers(use: Use) -> tuple[WholeArgument, ...]:
    """Edits for the arguments that count samples."""
    return tuple(WholeArgument(i) for i in range(len(use.node.args)) if use.counts(i))


def _with_numbers(use: Use, kind: Kind, edits: tuple[Any, ...] = ()) -> Answer:
    edits = (*edits, *_numbers(use))
    return Edited(kind, edits) if edits and not isinstance(kind, Mixed) else kind


@rule(NONLINEAR)
def entry_by_entry(use: Use) -> Answer:
    """(..., batch, ...), (..., batch, ...) -> (..., batch, ...), broadcast.

    Mixes samples if operands have the batch in different dimensions, or if one is a sum over the batch.
    """
    kind = broadcast(use, list(use.tensors))
    if isinstance(kind, Local):
        return use.mixed(f"{use.name} of row numbers")
    rows = [n for n in use.tensors if isinstance(use.kind(n), Local)]
    positions = tuple(i for i, a in enumerate(use.node.args) if isinstance(a, fx.Node) and a in rows)
    if len(positions) < len(rows) or any(n not in use.early for n in rows):
        return use.mixed(f"{use.name} of row numbers")
    return _with_numbers(use, kind, tuple(RowsArgument(i) for i in positions))


@rule("zeros_like ones_like full_like empty_like")
def constant_like(use: Use) -> Answer:
    """(..., batch, ...) -> (..., batch, ...), filled with a constant: only the operand's shape matters."""
    kind = use.kind(use.node.args[0])
    return kind if isinstance(kind, Batched) else use.mixed() if use.scale.growing(use.node) else SHARED


@rule(LINEAR, functional.after, functional.with_data)
def one_value(use: Use) -> Answer:
    """(..., batch, ...) -> (..., batch, ...); mixes samples if a sum over the batch is rounded to integers."""
    if (
        len(use.tensors) > 1
        and use.name in ("type_as", "to", "after")
        and not isinstance(use.kind(use.arg(0)), Partial)
    ):
        return use.kind(use.arg(0))
    kind = use.kind(use.arg(0))
    if isinstance(kind, Local) and use.name in ("neg", "negative"):
        return entry_by_entry(use)
    if isinstance(kind, Partial) and _rounds(use):
        return use.mixed("a sum over the batch rounded to integers")
    if isinstance(kind, Partial | Local) and len(use.tensors) == 1:
        return kind
    return broadcast(use, list(use.tensors))


def _rounds(use: Use) -> bool:
    """Whether a call converts floats to integers."""
    before, after = (n.meta["val"].dtype for n in (use.node.args[0], use.node))  # type: ignore[union-attr]
    return bool(before.is_floating_point and not (after.is_floating_point or after.is_complex))


@rule("add sub rsub radd subtract")
def plus(use: Use) -> Answer:
    """(..., batch, ...), (..., batch, ...) -> (..., batch, ...); sum (...), (...) -> sum (...).

    Mixes samples if a sum over the batch is added to values of its samples.
    """
    left, right = use.node.args[0], use.arg(1, "other", 0)
    kinds = [use.kind(left), use.kind(right)]
    if not any(isinstance(kind, Partial) for kind in kinds):
        return entry_by_entry(use)
    if all(isinstance(kind, Partial) for kind in kinds):
        return PARTIAL
    other = kinds.index(next(kind for kind in kinds if not isinstance(kind, Partial)))
    argument = (left, right)[other]
    if argument == 0:
        return PARTIAL
    if not isinstance(kinds[other], Shared) or len(use.node.args) < 2:
        return use.mixed("a sum over the batch plus values of its samples")
    edits = (WholeArgument(other),) if use.counts(other) else ()
    return Edited(PARTIAL, (*edits, ShareArgument(other)))


@rule("mul multiply div divide true_divide truediv rmul rdiv rtruediv")
def times(use: Use) -> Answer:
    """(..., batch, ...), (..., batch, ...) -> (..., batch, ...); sum (...), (...) -> sum (...).

    Mixes samples if a sum over the batch is a divisor, is rounded, or is multiplied or divided by what is not shared.
    """
    left, right = use.node.args[0], use.arg(1, "other", 1)
    kinds = [use.kind(left), use.kind(right)]
    if not any(isinstance(kind, Partial) for kind in kinds):
        return entry_by_entry(use)
    reflected = use.name in ("rdiv", "rtruediv")
    divides = reflected or use.name in ("div", "divide", "true_divide", "truediv")
    numerator, factor = (1, 0) if reflected else (0, 1)
    if divides and (use.node.kwargs.get("rounding_mode") or not isinstance(kinds[numerator], Partial)):
        return use.mixed("a division by a sum over the batch")
    if not divides and isinstance(kinds[1], Partial):
        factor = 0 if isinstance(kinds[0], Shared) else 1
    if not isinstance(kinds[factor], Shared):
        return use.mixed(f"{use.name} of two values that depend on the whole batch")
    return _with_numbers(use, PARTIAL)
