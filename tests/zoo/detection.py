"""Detection and segmentation: queries that read a picture, losses that match them to boxes."""

# ruff: noqa: E501 - a table, one model a line

from __future__ import annotations

from typing import Any

import torch
from models import Draw, Inputs

from zoo.entry import CLASSES, SINGLE, Entry, all_square, hugging_face
from zoo.vision import VIT

LIST = "labels are a list with a dict for each picture"
BOXES = 3


def _pictures(size: int) -> Any:
    return lambda draw: ((), {"pixel_values": draw.floats(3, size, size)})


def _boxes(size: int) -> Any:
    """Pictures with as many boxes each; a box is (centre, width, height) in shares of the picture."""

    def sample(draw: Draw) -> Inputs:
        classes, corners = draw.ids(CLASSES, BOXES), torch.sigmoid(draw.floats(BOXES, 4)) * 0.4 + 0.2
        labels = [{"class_labels": c, "boxes": b} for c, b in zip(classes, corners, strict=True)]
        return (), {"pixel_values": draw.floats(3, size, size), "labels": labels}

    return sample


def _resnet() -> Any:
    from transformers import ResNetConfig

    return ResNetConfig(
        embedding_size=4, hidden_sizes=[4, 8, 8, 8], depths=[1, 1, 1, 1], layer_type="basic", out_features=["stage4"]
    )


def _rt_resnet(stages: list[str]) -> Any:
    from transformers import RTDetrResNetConfig

    return RTDetrResNetConfig(
        embedding_size=4, hidden_sizes=[4, 8, 8, 8], depths=[1, 1, 1, 1], layer_type="basic", out_features=stages
    )


def _swin(stages: list[str]) -> Any:
    from transformers import SwinConfig

    return SwinConfig(
        image_size=32,
        patch_size=4,
        embed_dim=4,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=2,
        out_features=stages,
    )


def _entry(name: str, model: str, sample: Any, facts: dict[str, Any] | None = None, **config: Any) -> Entry:
    given = {key: value() if callable(value) else value for key, value in config.items()}
    return hugging_face(
        name, model, sample, {"num_labels": CLASSES, **given}, family="detection", **{"lengths": (32,), **(facts or {})}
    )


def detection() -> tuple[Entry, ...]:
    detr = {
        "d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
        "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "num_queries": 6, "use_pretrained_backbone": None,
    }  # fmt: skip
    outside = {"loss": all_square, "inside": False}
    listed = {**SINGLE, "whole": LIST, "needs": "scipy"}
    frozen = {"backbone_config": _resnet()}
    yolos = {**VIT, "image_size": [16, 16], "num_detection_tokens": 6}
    deformable = {
        **detr,
        "num_feature_levels": 2,
        "encoder_n_points": 2,
        "decoder_n_points": 2,
        "backbone_config": _rt_resnet(["stage3", "stage4"]),
    }
    rt = {
        **detr,
        "encoder_hidden_dim": 32,
        "encoder_in_channels": [8, 8, 8],
        "decoder_in_channels": [32, 32, 32],
        "num_denoising": 0,
        "backbone_config": _rt_resnet(["stage2", "stage3", "stage4"]),
    }
    masks = {"num_queries": 6, "use_auxiliary_loss": False, "mask_feature_size": 32}
    return (
        _entry("detr", "DetrForObjectDetection", _boxes(32), listed, **detr, **frozen),
        _entry("detr_outputs", "DetrForObjectDetection", _pictures(32), outside, **detr, **frozen),
        _entry("table_transformer", "TableTransformerForObjectDetection", _boxes(32), listed, **detr, **frozen),
        _entry("conditional_detr", "ConditionalDetrForObjectDetection", _boxes(32), listed, **detr, **frozen),
        _entry("conditional_detr_outputs", "ConditionalDetrForObjectDetection", _pictures(32), outside, **detr, **frozen),
        _entry("deformable_detr", "DeformableDetrForObjectDetection", _boxes(32), listed, **deformable),
        _entry("deformable_detr_outputs", "DeformableDetrForObjectDetection", _pictures(32), outside, **deformable),
        _entry("yolos", "YolosForObjectDetection", _boxes(16), listed, **yolos),
        _entry("yolos_outputs", "YolosForObjectDetection", _pictures(16), outside, **yolos),
        _entry("rt_detr_outputs", "RTDetrForObjectDetection", _pictures(32), {**outside, "mixes": "batch norm"}, **rt),
        _entry("maskformer_outputs", "MaskFormerForInstanceSegmentation", _pictures(32), outside, **masks, fpn_feature_size=32, backbone_config=_swin(["stage1", "stage2", "stage3", "stage4"]), decoder_config=_detr_decoder(detr)),
        _entry("mask2former_outputs", "Mask2FormerForUniversalSegmentation", _pictures(32), outside, **{**masks, "use_auxiliary_loss": True}, feature_size=32, hidden_dim=32, encoder_feedforward_dim=24, encoder_layers=1, decoder_layers=2, num_attention_heads=4, dim_feedforward=24, backbone_config=_swin(["stage1", "stage2", "stage3", "stage4"])),
    )  # fmt: skip


def _detr_decoder(sizes: dict[str, Any]) -> Any:
    from transformers import DetrConfig

    return DetrConfig(**{key: value for key, value in sizes.items() if value is not None}, backbone_config=_resnet())
