"""Vision: classifiers and dense predictors of transformers."""

# ruff: noqa: E501 - a table, one model a line

from __future__ import annotations

from typing import Any

import torch
from models import Draw, Inputs

from zoo.entry import CLASSES, Entry, all_square, hugging_face, pictures

NORM = {"mixes": "batch norm"}
VIT = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16,
    "patch_size": 4, "num_labels": CLASSES, "problem_type": "single_label_classification",
}  # fmt: skip


def _entry(
    name: str, model: str, size: int = 16, sample: Any = None, facts: dict[str, Any] | None = None, **config: Any
) -> Entry:
    sample = sample or pictures(size)
    config = {**VIT, "image_size": size, **config}
    return hugging_face(name, model, sample, config, family="vision", **{"lengths": (size,), **(facts or {})})


def _convolutions(
    name: str, model: str, size: int = 32, sample: Any = None, facts: dict[str, Any] | None = None, **config: Any
) -> Entry:
    config = {"num_labels": CLASSES, "problem_type": "single_label_classification", **config}
    return hugging_face(
        name, model, sample or pictures(size), config, family="vision", **{"lengths": (size,), **(facts or {})}
    )


def _resized(draw: Draw) -> Inputs:
    """Pictures of the size that is asked for."""
    return (), {"pixel_values": draw.floats(3, draw.length, draw.length), "labels": draw.ids(CLASSES)}


def _segments(size: int) -> Any:
    def sample(draw: Draw) -> Inputs:
        return (), {"pixel_values": draw.floats(3, size, size), "labels": draw.ids(CLASSES, size, size)}

    return sample


def _clips(draw: Draw) -> Inputs:
    return (), {"pixel_values": draw.floats(4, 3, 16, 16), "labels": draw.ids(CLASSES)}


def _masked(draw: Draw) -> Inputs:
    """Pictures of which the first half of the patches are hidden."""
    hidden = torch.arange(16) < 8
    return (), {"pixel_values": draw.floats(3, 16, 16), "bool_masked_pos": hidden.expand(draw.batch, 16)}


def _depths(size: int) -> Any:
    def sample(draw: Draw) -> Inputs:
        return (), {"pixel_values": draw.floats(3, size, size)}

    return sample


def vision() -> tuple[Entry, ...]:
    sizes = {"lengths": (32, 48)}
    outside = {"loss": all_square, "inside": False}
    swin = {"embed_dim": 8, "depths": [1, 1], "num_heads": [2, 4], "window_size": 2}
    stages = {"hidden_sizes": [8, 12, 16, 24], "depths": [1, 1, 1, 1]}
    pyramid = {
        "hidden_sizes": [8, 8, 16, 16],
        "depths": [1, 1, 1, 1],
        "num_attention_heads": [1, 1, 2, 2],
        "sr_ratios": [4, 2, 1, 1],
        "mlp_ratios": [2, 2, 2, 2],
    }
    return (
        _entry("vit", "ViTForImageClassification"),
        _entry("vit_masked", "ViTForMaskedImageModeling", sample=_masked, encoder_stride=4, facts={"loss": lambda output: output.loss}),
        _entry("vit_msn", "ViTMSNForImageClassification"),
        _entry("deit", "DeiTForImageClassification"),
        _entry("beit", "BeitForImageClassification", use_relative_position_bias=True),
        _entry("data2vec_vision", "Data2VecVisionForImageClassification", use_relative_position_bias=True),
        _entry("dinov2", "Dinov2ForImageClassification", mlp_ratio=2),
        _entry("dinov2_registers", "Dinov2WithRegistersForImageClassification", mlp_ratio=2),
        _entry("ijepa", "IJepaForImageClassification"),
        _entry("siglip_vision", "SiglipForImageClassification", sample=pictures(16), vision_config=VIT, text_config={"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 24}),
        _entry("swin", "SwinForImageClassification", 32, **swin, num_hidden_layers=None, hidden_size=None, num_attention_heads=None),
        _entry("swinv2", "Swinv2ForImageClassification", 32, **swin, num_hidden_layers=None, hidden_size=None, num_attention_heads=None),
        _convolutions("convnext", "ConvNextForImageClassification", 32, _resized, **stages, facts=sizes),
        _convolutions("convnextv2", "ConvNextV2ForImageClassification", 32, _resized, **stages, facts=sizes),
        _convolutions("resnet", "ResNetForImageClassification", 32, _resized, **stages, embedding_size=8, layer_type="basic", facts={**NORM, **sizes}),
        _convolutions("regnet", "RegNetForImageClassification", 32, **stages, embedding_size=8, groups_width=4, facts=NORM),
        _convolutions("bit", "BitForImageClassification", 32, **stages, embedding_size=8, num_groups=4, layer_type="preactivation"),
        _convolutions("mobilenet_v1", "MobileNetV1ForImageClassification", 32, depth_multiplier=0.25, facts=NORM),
        _convolutions("mobilenet_v2", "MobileNetV2ForImageClassification", 32, depth_multiplier=0.25, facts=NORM),
        _entry("mobilevit", "MobileViTForImageClassification", 32, hidden_sizes=[8, 12, 16], neck_hidden_sizes=[4, 4, 8, 8, 12, 16, 24], patch_size=2, facts=NORM),
        _entry("mobilevitv2", "MobileViTV2ForImageClassification", 64, width_multiplier=0.25, n_attn_blocks=[1, 1, 1], base_attn_unit_dims=[32, 48, 64], patch_size=2, facts=NORM),
        _convolutions("poolformer", "PoolFormerForImageClassification", 32, **stages, mlp_ratio=2.0),
        _entry("pvt", "PvtForImageClassification", 32, **{**pyramid, "sequence_reduction_ratios": [4, 2, 1, 1]}),
        _entry("pvt_v2", "PvtV2ForImageClassification", 32, **pyramid),
        _entry("segformer", "SegformerForSemanticSegmentation", 32, _segments(32), **pyramid, decoder_hidden_size=8, facts=NORM),
        _convolutions("levit", "LevitForImageClassification", 64, image_size=64, hidden_sizes=[8, 12, 16], num_attention_heads=[1, 2, 2], depths=[1, 1, 1], key_dim=[4, 4, 4], mlp_ratio=[2, 2, 2], attention_ratio=[2, 2, 2], patch_size=16, facts=NORM),
        _convolutions("cvt", "CvtForImageClassification", 32, embed_dim=[8, 12, 16], num_heads=[1, 2, 2], depth=[1, 2, 3], drop_path_rate=[0.0, 0.0, 0.0], cls_token=[False, False, True], facts=NORM),
        _convolutions("efficientnet", "EfficientNetForImageClassification", 32, width_coefficient=0.25, depth_coefficient=0.25, hidden_dim=1280 // 4, facts=NORM),
        _convolutions("focalnet", "FocalNetForImageClassification", 32, embed_dim=8, depths=[1, 1], focal_levels=[2, 2], focal_windows=[3, 3]),
        _entry("hiera", "HieraForImageClassification", 32, embed_dim=8, image_size=[32, 32], patch_size=[7, 7], patch_stride=[4, 4], patch_padding=[3, 3], depths=[1, 1, 1], num_heads=[1, 2, 4], query_stride=[2, 2], masked_unit_size=[4, 4], num_query_pool=2, mlp_ratio=2.0),
        _convolutions("swiftformer", "SwiftFormerForImageClassification", 64, depths=[1, 1, 1, 1], embed_dims=[8, 8, 16, 16], mlp_ratio=2, facts=NORM),
        _entry("upernet", "UperNetForSemanticSegmentation", 32, _segments(32), backbone_config=_backbone(), hidden_size=8, pool_scales=[1, 2], auxiliary_in_channels=16, auxiliary_channels=8, facts=NORM),
        _entry("dpt", "DPTForSemanticSegmentation", 16, _segments(16), neck_hidden_sizes=[4, 8, 8, 8], backbone_out_indices=[0, 1, 2, 3], fusion_hidden_size=8, num_hidden_layers=4, use_batch_norm_in_fusion_residual=False, facts=NORM),
        _convolutions("glpn", "GLPNForDepthEstimation", 32, _depths(32), **{**pyramid, "decoder_hidden_size": 8}, facts={**outside, **NORM}),
        _entry("videomae", "VideoMAEForVideoClassification", 16, _clips, num_frames=4, tubelet_size=2),
        _entry("vivit", "VivitForVideoClassification", 16, _clips, num_frames=4, tubelet_size=[2, 4, 4]),
        _entry("timesformer", "TimesformerForVideoClassification", 16, _clips, num_frames=4),
    )  # fmt: skip


def _backbone() -> Any:
    from transformers import ConvNextConfig

    return ConvNextConfig(
        hidden_sizes=[4, 8, 16, 24], depths=[1, 1, 1, 1], out_features=["stage1", "stage2", "stage3", "stage4"]
    )
