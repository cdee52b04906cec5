"""Losses: a sum or a mean over entries, some of which may be ignored."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.fx as fx
import torch.nn.functional as F

from pipecompile.batching.rules.batch_types import PARTIAL, SHARED, Batched, Kind, Shared
from pipecompile.batching.rules.use import Answer, Edited, Recount, Share, Use, rule


def reduction_of(use: Use) -> Any:
    """The value of ``reduction=``, or of the deprecated ``size_average=`` and ``reduce=``."""
    average, reduce = use.given("size_average"), use.given("reduce")
    if average is not None or reduce is not None:
        return "none" if reduce is False else "mean" if average in (None, True) else "sum"
    return use.given("reduction", "mean")


def reduced(use: Use, reduction: Any, entries: Kind) -> Answer:
    """The kind of a loss whose entries have the kind ``entries``."""
    if isinstance(entries, Shared):
        return SHARED
    if not isinstance(entries, Batched):
        return entries
    if reduction == "none":
        return entries
    if reduction == "sum":
        return PARTIAL
    if reduction == "mean" or (reduction == "batchmean" and entries.dim == 0):
        return (
            use.mixed("a mean over a number of entries that depends on values")
            if entries.ragged
            else Edited(PARTIAL, (Share(),))
        )
    return use.mixed()


# torch.kl_div and others have the same names as some of these, but take a number as the reduction.
_WEIGHED: tuple[Callable[..., Any], ...] = (F.mse_loss, F.l1_loss, F.huber_loss)  # divided by the sum of their weights


@rule(
    F.binary_cross_entropy, F.binary_cross_entropy_with_logits, F.smooth_l1_loss, F.gaussian_nll_loss,
    F.poisson_nll_loss, F.kl_div, F.hinge_embedding_loss, F.soft_margin_loss, F.margin_ranking_loss, *_WEIGHED,
)  # fmt: skip
def entry_losses(use: Use) -> Answer:
    """(..., batch, ...), (..., batch, ...) -> () or (..., batch, ...), broadcast.

    A mean that divides by the sum of weights (``F.mse_loss`` with ``weight=``) mixes samples.
    """
    reduction = reduction_of(use)
    if reduction == "mean" and use.function in _WEIGHED and use.given("weight") is not None:
        return use.mixed("a mean divided by the sum of weights")
    tensors = list(use.tensors)
    ndim = max(map(use.ndim, tensors), default=0)
    return reduced(use, reduction, _broadcast_to(use, tensors, ndim))


def _broadcast_to(use: Use, tensors: list[fx.Node], ndim: int) -> Kind:
    found: Kind = SHARED
    for n in tensors:
        kind = use.kind(n)
        if isinstance(kind, Batched):
            kind = kind.at(kind.dim - use.ndim(n) + ndim)
            if found not in (SHARED, kind):
                return use.mixed("a loss of values with the batch in different dimensions")
            found = kind
        elif not isinstance(kind, Shared):
            return use.mixed()
    return found


@rule(
    F.multi_margin_loss, F.multilabel_margin_loss, F.multilabel_soft_margin_loss, F.cosine_embedding_loss,
    F.triplet_margin_loss,
)  # fmt: skip
def row_losses(use: Use) -> Answer:
    """(batch, classes), (batch, ...) -> () or (batch, ...); mixes samples if the batch is not the first dimension."""
    kinds = {use.kind(n) for n in use.tensors if use.ndim(n)} - {SHARED}
    if not kinds:
        return SHARED
    entries = kinds.pop()
    if kinds or not isinstance(entries, Batched) or entries.dim != 0 or use.ndim(use.node.args[0]) < 2:
        return use.mixed()
    return reduced(use, reduction_of(use), entries)


@rule(F.cross_entropy, F.nll_loss)
def class_losses(use: Use) -> Answer:
    """(batch, classes, ...), (batch, ...) -> () or (batch, ...); mixes samples if the classes are the batch.

    A mean divides by the number of targets that are not ignored, or by the sum of their class weights, or, if targets
    are probabilities, by the number of rows (torch.nn.CrossEntropyLoss). Targets and class weights of a mean must be
    computed from inputs alone, so that the whole batch's total is known before the step.
    """
    scores, target, weight = use.node.args[0], use.arg(1, "target"), use.arg(2, "weight")
    kinds = [use.kind(scores), use.kind(target)]
    if all(isinstance(kind, Shared) for kind in kinds):
        return SHARED
    if weight is not None and not isinstance(use.kind(weight), Shared):
        return use.mixed()
    probabilities = use.ndim(scores) == use.ndim(target) and use.shape(scores) == use.shape(target)
    entries = _entries(kinds)
    if entries is None or (entries.dim == 1 and use.ndim(scores) > 1):
        return use.mixed("a loss of values with the batch in different dimensions")
    reduction = reduction_of(use)
    if reduction != "mean" or probabilities:
        return reduced(use, reduction, entries)
    if target not in use.early or (weight is not None and weight not in use.early):
        return use.mixed("a mean whose targets or class weights are not computed from inputs alone")
    return Edited(PARTIAL, (Recount(target, weight, use.arg(4, "ignore_index", -100)),))


def _entries(kinds: list[Kind]) -> Batched | None:
    """The kind of the loss's entries; targets (batch, ...) lack dimension 1 of scores (batch, classes, ...)."""
    scores, target = kinds
    for one, other in ((scores, target), (target, scores)):
        if isinstance(one, Batched) and (one == other or isinstance(other, Shared)):
            return one
    if not isinstance(scores, Batched) or not isinstance(target, Batched):
        return None
    place = target.dim + (target.dim >= 1)
    return scores if scores == target.at(place) else None


@rule(F.ctc_loss)
def ctc_loss(use: Use) -> Answer:
    """(length, batch, classes), (batch, targets) or (batch * targets,), (batch,), (batch,) -> () or (batch,)."""
    reduction = use.arg(5, "reduction", "mean")
    kinds = [use.kind(n) for n in use.node.args[:4]]
    if kinds[0] != Batched(1) or not all(isinstance(k, Batched) and k.dim == 0 for k in kinds[1:]):
        return use.mixed() if any(not isinstance(k, Shared) for k in kinds) else SHARED
    return reduced(use, reduction, Batched(0))
