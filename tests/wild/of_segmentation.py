"""segmentation-models-pytorch: every architecture, over a small encoder of each kind."""

from __future__ import annotations

from typing import Any

from models import Draw, Inputs
from torch import nn

from wild.entry import Wild, alternating, wild

ENCODERS = ("tu-test_resnet", "mobilenet_v2", "tu-test_efficientnet", "mit_b0")
OTHERS = {"linknet": 0, "unetplusplus": 0, "pan": 2, "deeplabv3": 0, "deeplabv3plus": 2}  # do not take every encoder


def entries() -> tuple[Wild, ...]:
    import segmentation_models_pytorch as smp

    kinds = sorted(smp.MODEL_ARCHITECTURES_MAPPING)
    return alternating([_entry(smp, kind, ENCODERS[OTHERS.get(kind, i % 4)]) for i, kind in enumerate(kinds)])


def _entry(smp: Any, kind: str, encoder: str) -> Wild:
    given: dict[str, Any] = {}
    if kind in ("unet", "unetplusplus", "manet"):
        given = {"decoder_channels": (32, 24, 16, 16, 8)}
    if kind in ("deeplabv3", "deeplabv3plus", "upernet"):
        given = {"decoder_channels": 16}
    if kind == "dpt":
        encoder, given = (
            "tu-test_vit",
            {"dynamic_img_size": True, "decoder_intermediate_channels": (8, 8, 16, 16), "decoder_fusion_channels": 16},
        )

    def make() -> nn.Module:
        return smp.create_model(kind, encoder, encoder_weights=None, in_channels=3, classes=3, **given)  # type: ignore[no-any-return]

    return wild("segmentation", f"{kind} ({encoder})", make, _pictures, lengths=(128,) if kind == "pan" else (32, 64))


def _pictures(draw: Draw) -> Inputs:
    return (draw.floats(3, draw.length, draw.length),), {}
