"""torchvision: convolutional and attention networks, with the width and the depth cut down."""

# ruff: noqa: E501 - a table, one model a line

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from models import Draw, Inputs
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.entry import CLASSES, Entry

NORM = "batch norm"


def _loss(output: Any) -> Tensor:
    """Cross entropy against the second class, of all heads."""
    heads = [
        t
        for t in (output.values() if isinstance(output, dict) else output if isinstance(output, tuple) else [output])
        if t is not None
    ]
    return sum(F.cross_entropy(head, torch.ones(len(head), dtype=torch.long)) for head in map(_pooled, heads))


def _pooled(head: Tensor) -> Tensor:
    return head.flatten(2).mean(dim=2) if head.ndim > 2 else head


def _entry(name: str, make: Callable[[Any], nn.Module], size: int = 32, mixes: str = NORM, **facts: Any) -> Entry:
    """``make`` receives ``torchvision.models``; ``size`` is the pictures'."""

    def build() -> nn.Module:
        import torchvision.models as models

        return make(models)

    def sample(draw: Draw) -> Inputs:
        return (draw.floats(3, draw.length, draw.length),), {}

    return Entry(
        "tv_" + name, build, sample, _loss, False, mixes=mixes, family="torchvision", **{"lengths": (size,), **facts}
    )


def photographs() -> tuple[Entry, ...]:
    classes = {"num_classes": CLASSES}
    return (
        _entry("resnet", lambda m: m.ResNet(m.resnet.Bottleneck, [1, 1, 1, 1], width_per_group=8, **classes), lengths=(32, 48)),
        _entry("densenet", lambda m: m.DenseNet(4, (2, 2, 2, 2), 8, **classes)),
        _entry("mobilenet_v2", lambda m: m.MobileNetV2(width_mult=0.25, dropout=0.0, **classes)),
        _entry("shufflenet_v2", lambda m: m.ShuffleNetV2([1, 1, 1], [8, 8, 16, 24, 32], **classes)),
        _entry("mnasnet", lambda m: m.MNASNet(0.25, dropout=0.0, **classes)),
        _entry("regnet", lambda m: m.RegNet(m.regnet.BlockParams([1, 1], [8, 16], [4, 4], [1.0, 1.0], [2, 2], 0.25), stem_width=8, **classes)),
        _entry("efficientnet", lambda m: m.EfficientNet([m.efficientnet.MBConvConfig(2, 3, 2, 8, 12, 2, 0.5, 1.0)], dropout=0.0, stochastic_depth_prob=0.0, **classes)),
        _entry("squeezenet", lambda m: m.SqueezeNet("1_1", dropout=0.0, **classes), mixes="", lengths=(32, 48)),
        _entry("vgg", lambda m: m.VGG(m.vgg.make_layers([8, "M", 16, "M"]), dropout=0.0, **classes).apply(_narrow), mixes=""),
        _entry("vision_transformer", lambda m: m.VisionTransformer(16, 4, 2, 4, 16, 24, **classes), 16, mixes=""),
        _entry("swin", lambda m: m.SwinTransformer([4, 4], 8, [1, 2], [2, 4], [2, 2], stochastic_depth_prob=0.0, **classes), mixes=""),
        _entry("convnext", lambda m: m.ConvNeXt([m.convnext.CNBlockConfig(8, 12, 1), m.convnext.CNBlockConfig(12, None, 1)], layer_scale=0.5, **classes), mixes="", lengths=(32, 48)),
        _entry("maxvit", lambda m: m.MaxVit((32, 32), 8, 2, [8, 12], [1, 1], 4, 0.0, **classes), 32),
        _entry("googlenet", lambda m: m.GoogLeNet(init_weights=True, dropout=0.0, dropout_aux=0.0, **classes), 64),
        _entry("lraspp", lambda m: m.segmentation.LRASPP(_Levels(), 8, 16, CLASSES, 4), lengths=(32, 48)),
    )  # fmt: skip


class _Levels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.low, self.high = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 16, 3, 2, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        low = self.low(x)
        return {"low": low, "high": self.high(low)}


def _narrow(module: nn.Module) -> None:
    """VGG's classifier with 16 features instead of 4096."""
    if isinstance(module, nn.Sequential) and len(module) == 7 and isinstance(module[0], nn.Linear):
        module[0], module[3], module[6] = nn.Linear(16 * 49, 16), nn.Linear(16, 16), nn.Linear(16, CLASSES)
