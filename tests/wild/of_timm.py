"""timm: of each file of models the smallest variant, made smaller where the model takes it.

The files left out have no variant of fewer than eight million parameters.
"""

from __future__ import annotations

from typing import Any

import torch
from models import Draw, Inputs
from torch import Tensor, nn
from zoo.entry import CLASSES, all_square

from wild.entry import Wild, alternating, wild

# name: size of a picture, whether the model is told, what makes it smaller
VARIANTS: dict[str, tuple[int, bool, dict[str, Any]]] = {
    "beit_base_patch16_224": (32, True, {"embed_dim": 32, "depth": 2, "num_heads": 2}),
    "cait_xxs24_224": (32, True, {"embed_dim": 32, "depth": 2, "num_heads": 2}),
    "convit_tiny": (32, True, {"embed_dim": 32, "depth": 2, "num_heads": 2}),
    "cpubone_nano": (32, False, {}),
    "cs3darknet_s": (32, False, {}),
    "cspnext_tiny": (32, False, {"depths": (1, 1, 1, 1)}),
    "davit_tiny": (32, False, {"depths": (1, 1, 1, 1), "embed_dims": (16, 32, 48, 64), "num_heads": (1, 2, 3, 4)}),
    "deepseek_vit_412m": (224, True, {"embed_dim": 32, "depth": 2, "num_heads": 2}),
    "deit_tiny_patch16_224": (32, True, {"embed_dim": 32, "depth": 2, "num_heads": 2}),
    "densenet121": (32, False, {}),
    "dla46_c": (32, False, {}),
    "edgenext_xx_small": (32, False, {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}),
    "efficientformer_l1": (224, True, {"depths": (1, 1, 1, 1), "embed_dims": (16, 32, 48, 64)}),
    "efficientformerv2_s0": (32, True, {"depths": (1, 1, 1, 1), "embed_dims": (16, 32, 48, 64)}),
    "efficientvim_m1": (32, False, {"depths": (1, 1, 1)}),
    "efficientvit_b0": (32, False, {"depths": (1, 1, 1, 1)}),
    "efficientvit_m0": (32, True, {}),
    "ese_vovnet19b_slim": (32, False, {}),
    "eva02_tiny_patch14_224": (32, True, {"embed_dim": 32, "depth": 2, "num_heads": 2}),
    "fasternet_t0": (32, False, {"embed_dim": 16, "depths": (1, 1, 1, 1)}),
    "fastvit_s12": (32, False, {"layers": (1, 1, 1, 1)}),
    "gemma4_vit_167m": (32, True, {"embed_dim": 32, "depth": 2, "num_heads": 2}),
    "ghostnet_050": (32, False, {}),
    "hardcorenas_b": (32, False, {}),
    "hiera_tiny_224": (32, True, {"embed_dim": 16, "num_heads": 1, "stages": (1, 1, 1, 1)}),
    "iformer_s": (32, False, {}),
    "inception_next_atto": (32, False, {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}),
    "lcnetv2_small": (32, False, {"depths": (1, 1, 1, 1)}),
    "legacy_seresnet18": (32, False, {"layers": (1, 1, 1, 1)}),
    "levit_128s": (32, True, {"embed_dim": (32, 48, 64), "num_heads": (2, 3, 4), "depth": (1, 1, 1)}),
    "mobilevit_xxs": (32, True, {}),
    "naflexvit_base_patch16_siglip": (32, True, {"embed_dim": 32, "depth": 2, "num_heads": 2}),
    "pit_xs_224": (32, True, {"base_dims": (16, 16, 16), "depth": (1, 1, 1), "heads": (1, 2, 4)}),
    "pvt_v2_b0": (32, False, {"depths": (1, 1, 1, 1)}),
    "qwen3_vit_88m": (32, True, {"embed_dim": 32, "depth": 2, "num_heads": 2}),
    "regnetx_002": (32, False, {}),
    "repghostnet_050": (32, False, {}),
    "repvit_m0_9": (32, False, {"embed_dim": (8, 16, 32, 48), "depth": (1, 1, 1, 1)}),
    "res2net50_14w_8s": (32, False, {"layers": (1, 1, 1, 1)}),
    "resnest14d": (32, False, {"layers": (1, 1, 1, 1), "base_width": 8}),
    "resnetv2_18": (32, False, {"layers": (1, 1, 1, 1)}),
    "rexnet_100": (32, False, {}),
    "samvit_base_patch16": (32, True, {"embed_dim": 32, "depth": 2, "num_heads": 2}),
    "sequencer2d_s": (32, True, {"layers": (1, 1, 1, 1)}),
    "shvit_s1": (32, False, {}),
    "skresnet18": (32, False, {"layers": (1, 1, 1, 1)}),
    "starnet_s1": (32, False, {"depths": (1, 1, 1, 1)}),
    "swiftformer_xs": (32, True, {"layers": (1, 1, 1, 1)}),
    "swin_s3_tiny_224": (32, True, {"depths": (1, 1, 1, 1), "embed_dim": 16, "num_heads": (1, 2, 2, 4)}),
    "swinv2_cr_tiny_224": (32, True, {"depths": (1, 1, 1, 1), "embed_dim": 16, "num_heads": (1, 2, 2, 4)}),
    "swinv2_tiny_window8_256": (32, True, {"depths": (1, 1, 1, 1), "embed_dim": 16, "num_heads": (1, 2, 2, 4)}),
    "test_byobnet": (32, True, {}),
    "test_convnext": (32, False, {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}),
    "test_efficientnet": (32, False, {}),
    "test_mambaout": (32, False, {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}),
    "test_maxvit": (32, True, {"depths": (1, 1, 1, 1)}),
    "test_nfnet": (32, False, {"depths": (1, 1, 1, 1)}),
    "test_resnet": (32, False, {"layers": (1, 1, 1, 1)}),
    "test_vit": (32, True, {"embed_dim": 32, "depth": 2, "num_heads": 2}),
    "test_vit_relpos": (32, True, {"embed_dim": 32, "depth": 2, "num_heads": 2}),
    "tf_mobilenetv3_large_minimal_100": (32, False, {}),
    "tiny_vit_5m_224": (32, False, {"depths": (1, 1, 1, 1)}),
    "tnt_s_patch16_224": (32, True, {"depth": 2}),
    "twins_svt_small": (32, True, {"embed_dims": (16, 32, 48, 64), "num_heads": (1, 2, 2, 4), "depths": (1, 1, 1, 1)}),
    "visformer_tiny": (32, True, {"embed_dim": 32, "depth": 2, "num_heads": 2}),
    "vit_tiny_r_s16_p8_224": (32, True, {"embed_dim": 32, "depth": 2, "num_heads": 2}),
    "vitamin_small_224": (32, True, {"depth": 2}),
    "xcit_nano_12_p8_224": (32, True, {"embed_dim": 32, "depth": 2, "num_heads": 2}),
}
ANY_SIZE = {"test_convnext", "test_resnet", "test_efficientnet", "ghostnet_050", "pvt_v2_b0"}


def entries() -> tuple[Wild, ...]:
    import timm

    listed = set(timm.list_models())
    assert set(VARIANTS) <= listed, set(VARIANTS) - listed
    return alternating([_entry(name, *facts) for name, facts in VARIANTS.items()])


def _entry(name: str, size: int, told: bool, smaller: dict[str, Any]) -> Wild:
    def make() -> nn.Module:
        import timm

        sized = {"img_size": size} if told else {}
        return timm.create_model(name, num_classes=CLASSES, **sized, **smaller)  # type: ignore[no-any-return]

    lengths = (size, size + 32) if name in ANY_SIZE else (size,)
    return wild("timm", name, make, _pictures, loss=_loss, lengths=lengths)


def _pictures(draw: Draw) -> Inputs:
    return (draw.floats(3, draw.length, draw.length),), {}


def _loss(output: Any) -> Tensor:
    """Cross entropy against classes by row; the mean squares of an output that is no logits."""
    if isinstance(output, Tensor) and output.ndim == 2:
        return nn.functional.cross_entropy(output, torch.zeros(len(output), dtype=torch.long, device=output.device))
    return all_square(output)
