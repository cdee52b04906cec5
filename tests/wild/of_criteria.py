"""Losses of pytorch-metric-learning and lightly behind small networks, and quantized layers of brevitas."""

# ruff: noqa: E501 - a table, one model a line

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from models import Draw, Inputs
from torch import Tensor, nn

from wild.entry import Wild, alternating, itself, wild

CLASSES = 3


def entries() -> tuple[Wild, ...]:
    return alternating([*_metrics(), *_views(), *_quantized()])


def _class(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)


def _one(name: str, make: Callable[[], nn.Module], *shape: int, **facts: Any) -> Wild:
    return wild("criteria", name, make, lambda draw: ((draw.floats(*shape),), {}), lengths=(8,), **facts)


class Embedded(nn.Module):
    """A loss of embeddings and labels behind a small network."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.net, self.loss = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 4)), loss

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return self.loss(self.net(x), labels)  # type: ignore[no-any-return]


def _metrics() -> list[Wild]:
    def metric(kind: str, **config: Any) -> Wild:
        def sample(draw: Draw) -> Inputs:
            return (draw.floats(6), torch.arange(draw.batch) % 2), {}

        return wild(
            "criteria",
            f"metric-learning {kind}",
            lambda: Embedded(_class(f"pytorch_metric_learning.losses.{kind}")(**config)),
            sample,
            loss=itself,
            inside=True,
            lengths=(8,),
        )

    classes = {"num_classes": CLASSES, "embedding_size": 4}
    return [
        metric("ContrastiveLoss"), metric("TripletMarginLoss"), metric("NTXentLoss"), metric("SupConLoss"), metric("ArcFaceLoss", **classes),
        metric("CosFaceLoss", **classes), metric("ProxyAnchorLoss", **classes), metric("ProxyNCALoss", **classes), metric("SoftTripleLoss", **classes),
        metric("NormalizedSoftmaxLoss", **classes), metric("CircleLoss"), metric("MultiSimilarityLoss"), metric("FastAPLoss"), metric("AngularLoss"), metric("LiftedStructureLoss"),
    ]  # fmt: skip


class Views(nn.Module):
    """Projections of two views of a picture, and a loss of both."""

    def __init__(self, loss: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.net, self.head, self.loss = nn.Sequential(nn.Linear(6, 12), nn.Tanh()), head, loss

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        return self.loss(self.head(self.net(one)), self.head(self.net(other)))  # type: ignore[no-any-return]


def _views() -> list[Wild]:
    def views(kind: str, **config: Any) -> Wild:
        def make() -> nn.Module:
            head = _class("lightly.models.modules.heads.SimCLRProjectionHead")(12, 12, 4, batch_norm=False)
            views = Views(_class(f"lightly.loss.{kind}")(**config), head)
            for name, buffer in views.named_buffers():
                if name.endswith("bank_ptr"):
                    buffer.zero_()  # of torch.empty
            return views

        return wild(
            "criteria",
            f"lightly {kind}",
            make,
            lambda draw: ((draw.floats(6), draw.floats(6)), {}),
            loss=itself,
            inside=True,
            lengths=(8,),
            mixes="batch norm" if kind == "BarlowTwinsLoss" else "",
        )

    return [
        views("NTXentLoss"), views("NegativeCosineSimilarity"), views("BarlowTwinsLoss"), views("VICRegLoss"), views("DCLLoss"), views("DCLWLoss"),
    ]  # fmt: skip


def _quantized() -> list[Wild]:
    def brevitas(**config: Any) -> nn.Module:
        b = import_module("brevitas.nn")
        return nn.Sequential(
            b.QuantLinear(6, 12, True, **config),
            b.QuantReLU(bit_width=4),
            b.QuantLinear(12, 8, True, **config),
            nn.Tanh(),
            b.QuantLinear(8, 3, True, **config),
        )

    def convolutions() -> nn.Module:
        b = import_module("brevitas.nn")
        return nn.Sequential(
            b.QuantIdentity(),
            b.QuantConv2d(3, 6, 3, weight_bit_width=4),
            b.QuantReLU(),
            b.QuantConv2d(6, 4, 3, weight_bit_width=4),
            nn.Flatten(),
            b.QuantLinear(64, 3, True),
        )

    return [
        _one("brevitas QuantLinear", brevitas, 6), _one("brevitas QuantLinear (4 bits)", lambda: brevitas(weight_bit_width=4), 6), _one("brevitas QuantConv2d", convolutions, 3, 8, 8),
    ]  # fmt: skip
