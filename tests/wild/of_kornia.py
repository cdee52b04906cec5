"""kornia: losses of ``kornia.losses`` behind a small model, its own networks, and differentiable operations."""

# ruff: noqa: E501 - a table, one model a line

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from models import Draw, Inputs
from torch import Tensor, nn

from wild.entry import Wild, all_square, alternating, itself, wild

CLASSES = 3


def entries() -> tuple[Wild, ...]:
    import kornia
    from kornia import losses

    def loss(name: str, *args: Any, target: str = "picture", **config: Any) -> Wild:
        channels = CLASSES if target in ("classes", "channel") else 1
        sample = {"picture": _pictures, "classes": _classes, "binary": _binary, "hinge": _hinge, "channel": _channel}[
            target
        ]
        return wild(
            "kornia",
            name,
            lambda: Criterion(getattr(losses, name)(*args, **config), channels),
            sample,
            loss=itself,
            inside=True,
            lengths=(16,),
        )

    def net(
        name: str,
        make: Callable[[], nn.Module],
        sample: Callable[[Draw], Inputs] | None = None,
        lengths: tuple[int, ...] = (32,),
        loss: Callable[[Any], Tensor] = all_square,
    ) -> Wild:
        return wild(
            "kornia",
            name,
            make,
            sample or (lambda draw: ((draw.floats(3, draw.length, draw.length),), {})),
            loss=loss,
            lengths=lengths,
        )

    def op(name: str, module: Callable[[], nn.Module]) -> Wild:
        return net(
            name,
            lambda: nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.Sigmoid(), module(), _Flat()),
            lengths=(16, 20),
        )

    mean = {"reduction": "mean"}
    nets = [
        net("ViT", lambda: nn.Sequential(import_module("kornia.models.vit").VisionTransformer(image_size=32, patch_size=16, embed_dim=16, depth=2, num_heads=2, dropout_rate=0.0, dropout_attn=0.0))),
        net("TinyViT", lambda: kornia.contrib.TinyViT(img_size=32, num_classes=3, embed_dims=[8, 16, 16, 16], depths=[1, 1, 1, 1], num_heads=[1, 2, 2, 2], window_sizes=[4, 4, 4, 4], drop_path_rate=0.0)),
        net("RRDBNet", lambda: kornia.models.RRDBNet(3, 3, 4, 8, 1, 4), lengths=(16, 20)),
        net("HardNet", lambda: kornia.feature.HardNet(pretrained=False), lambda draw: ((draw.floats(1, 32, 32),), {}), loss=_of_unit_length),
        net("SOSNet", lambda: kornia.feature.SOSNet(pretrained=False), lambda draw: ((draw.floats(1, 32, 32),), {}), loss=_of_unit_length),
        net("TFeat", lambda: kornia.feature.TFeat(pretrained=False), lambda draw: ((draw.floats(1, 32, 32),), {})),
        net("HyNet", lambda: kornia.feature.HyNet(pretrained=False), lambda draw: ((draw.floats(1, 32, 32),), {}), loss=_of_unit_length),
        net("SIFTDescriptor", lambda: nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), kornia.feature.SIFTDescriptor(32)), lambda draw: ((draw.floats(1, 32, 32),), {}), loss=_of_unit_length),
        op("GaussianBlur2d", lambda: kornia.filters.GaussianBlur2d((3, 3), (1.0, 1.0))),
        op("Sobel", kornia.filters.Sobel), op("Laplacian", lambda: kornia.filters.Laplacian(3)), op("MedianBlur", lambda: kornia.filters.MedianBlur(3)),
        op("UnsharpMask", lambda: kornia.filters.UnsharpMask((3, 3), (1.0, 1.0))),
        op("BilateralBlur", lambda: kornia.filters.BilateralBlur((3, 3), 0.5, (1.0, 1.0))),
        op("RgbToHsv", kornia.color.RgbToHsv), op("RgbToLab", kornia.color.RgbToLab), op("RgbToYcbcr", kornia.color.RgbToYcbcr), op("RgbToGrayscale", kornia.color.RgbToGrayscale),
        op("MaxBlurPool2D", lambda: kornia.filters.MaxBlurPool2D(3)), op("Rescale", lambda: kornia.geometry.Rescale(2.0)), op("Hflip", kornia.geometry.Hflip), op("PyrDown", kornia.geometry.PyrDown),
        op("SpatialSoftArgmax2d", lambda: kornia.geometry.SpatialSoftArgmax2d()), op("DistanceTransform", kornia.contrib.DistanceTransform), op("ExtractTensorPatches", lambda: kornia.contrib.ExtractTensorPatches(8, 8)),
        op("Normalize", lambda: kornia.enhance.Normalize(0.5, 0.2)), op("AdjustGamma", lambda: kornia.enhance.AdjustGamma(1.3)), op("AdjustContrast", lambda: kornia.enhance.AdjustContrast(0.8)),
    ]  # fmt: skip
    return alternating([
        loss("CauchyLoss", **mean), loss("CharbonnierLoss", **mean), loss("GemanMcclureLoss", **mean), loss("WelschLoss", **mean),
        loss("DiceLoss", target="classes"), loss("TverskyLoss", 0.4, 0.4, target="classes"), loss("FocalLoss", 0.5, target="classes", **mean),
        loss("BinaryFocalLossWithLogits", 0.5, target="binary", **mean), loss("LovaszHingeLoss", target="hinge"), loss("LovaszSoftmaxLoss", target="classes"),
        loss("SSIMLoss", 5), loss("MS_SSIMLoss", sigmas=[0.5, 1.0]), loss("PSNRLoss", 1.0), loss("HausdorffERLoss", target="channel"), loss("InverseDepthSmoothnessLoss"),
                *nets,
    ])  # fmt: skip


def _of_unit_length(output: Tensor) -> Tensor:
    """A loss of vectors whose mean square is a constant."""
    return (output.square() * torch.linspace(0, 1, output.shape[-1]).to(output)).mean()


class Criterion(nn.Module):
    """A small network for pictures, and a loss of its output and a target."""

    def __init__(self, loss: nn.Module, channels: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, channels, 3, padding=1))
        self.loss = loss

    def forward(self, pictures: Tensor, target: Tensor) -> Tensor:
        return self.loss(self.net(pictures), target)  # type: ignore[no-any-return]


class _Flat(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)


def _pictures(draw: Draw) -> Inputs:
    return (draw.floats(3, 16, 16), draw.floats(1, 16, 16)), {}


def _classes(draw: Draw) -> Inputs:
    return (draw.floats(3, 16, 16), draw.ids(CLASSES + 2, 16, 16) - 2), {}


def _binary(draw: Draw) -> Inputs:
    return (draw.floats(3, 16, 16), draw.ids(4, 1, 16, 16) - 2), {}


def _hinge(draw: Draw) -> Inputs:
    return (draw.floats(3, 16, 16), draw.ids(4, 16, 16) - 2), {}


def _channel(draw: Draw) -> Inputs:
    return (draw.floats(3, 16, 16), draw.ids(CLASSES + 2, 1, 16, 16) - 2), {}
