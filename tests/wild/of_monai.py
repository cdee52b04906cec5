"""MONAI: every network of ``monai.networks.nets``, on small pictures in two dimensions where it takes them."""

# ruff: noqa: E501 - a table, one model a line

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from models import Draw, Inputs
from torch import nn

from wild.entry import Wild, alternating, wild

TWO = {"spatial_dims": 2}
IO = {"in_channels": 1, "out_channels": 2}
UNET = {**TWO, **IO, "channels": (4, 8, 16), "strides": (2, 2)}
KL = {
    **TWO, "in_channels": 1, "out_channels": 1, "channels": (8, 8), "latent_channels": 2, "num_res_blocks": (1, 1),
    "attention_levels": (False, True), "norm_num_groups": 4,
}  # fmt: skip
DIFFUSION = {
    **TWO, "in_channels": 1, "channels": (8, 8), "num_res_blocks": 1, "attention_levels": (False, True), "norm_num_groups": 4,
    "num_head_channels": 4,
}  # fmt: skip
VIT = {"img_size": (16, 16), "patch_size": (8, 8), "hidden_size": 16, "mlp_dim": 24, "num_heads": 2, "spatial_dims": 2}


def _image(size: int, channels: int = 1, dims: int = 2) -> Callable[[Draw], Inputs]:
    return lambda draw: ((draw.floats(channels, *(size,) * dims),), {})


def _any(draw: Draw) -> Inputs:
    return (draw.floats(1, draw.length, draw.length),), {}


def _timed(draw: Draw) -> Inputs:
    return (draw.floats(1, 16, 16), draw.ids(100)), {}


def _segmented(*rest: Any) -> Callable[[Draw], Inputs]:
    def sample(draw: Draw) -> Inputs:
        segments = nn.functional.one_hot(draw.ids(3, 16, 16), 3).movedim(-1, 1).double()
        return (draw.floats(1, 16, 16), *(draw.ids(100) for _ in rest), segments), {}

    return sample


def entries() -> tuple[Wild, ...]:
    import monai.networks.nets as nets

    def net(
        kind: str,
        sample: Callable[[Draw], Inputs] = _any,
        label: str = "",
        lengths: tuple[int, ...] = (16,),
        **config: Any,
    ) -> Wild:
        return wild("monai", label or kind, lambda: getattr(nets, kind)(**config), sample, lengths=lengths)

    any_size = {"lengths": (16, 32)}
    blocks = [
        {"name": "conv_0", "n_features": 4, "kernel_size": 3},
        {"name": "res_1", "n_features": 4, "kernels": (3, 3), "repeat": 1},
        {"name": "conv_2", "n_features": 8, "kernel_size": 1},
        {"name": "conv_3", "kernel_size": 1},
    ]
    return alternating([
        net("AttentionUnet", **UNET, **any_size),
        net("AutoEncoder", **{**UNET, "strides": (2, 2, 1)}, **any_size),
        wild("monai", "AutoencoderKL", lambda: _mean(nets.AutoencoderKL(**KL), "sampling"), _image(16), lengths=(16,)),
        net("BasicUNet", _image(32), **TWO, **IO, features=(4, 4, 8, 8, 8, 4)),
        net("BasicUNetPlusPlus", _image(32), **TWO, **IO, features=(4, 4, 8, 8, 8, 4), deep_supervision=True),
        net("Classifier", in_shape=(1, 16, 16), classes=5, channels=(4, 8), strides=(2, 2)),
        net("Discriminator", in_shape=(1, 16, 16), channels=(4, 8), strides=(2, 2), dropout=None),
        net("Critic", in_shape=(1, 16, 16), channels=(4, 8), strides=(2, 2), dropout=None),
        net("ControlNet", lambda draw: ((draw.floats(1, 16, 16), draw.ids(100), draw.floats(1, 16, 16)), {}), **TWO, in_channels=1, channels=(8, 8), num_res_blocks=(1, 1), attention_levels=(False, True), norm_num_groups=4, num_head_channels=4, conditioning_embedding_num_channels=(4,), conditioning_embedding_in_channels=1),
        net("DenseNet", _image(32), **TWO, in_channels=1, out_channels=3, init_features=4, growth_rate=4, block_config=(2, 2), norm="instance"),
        net("DiffusionModelUNet", _timed, out_channels=1, **DIFFUSION),
        net("DiffusionModelUNet", lambda draw: ((draw.floats(1, 16, 16), draw.ids(100), draw.floats(3, 6)), {}), "DiffusionModelUNet (conditioned)", out_channels=1, with_conditioning=True, cross_attention_dim=6, **DIFFUSION),
        net("DynUNet", **TWO, **IO, kernel_size=(3, 3, 3), strides=(1, 2, 2), upsample_kernel_size=(2, 2), filters=(4, 8, 8)),
        net("DynUNet", label="DynUNet (deep supervision)", **TWO, **IO, kernel_size=(3, 3, 3), strides=(1, 2, 2), upsample_kernel_size=(2, 2), filters=(4, 8, 8), deep_supervision=True, deep_supr_num=1, res_block=True),
        net("EfficientNetBN", _image(32), model_name="efficientnet-b0", pretrained=False, **TWO, in_channels=1, num_classes=5),
        net("FullyConnectedNet", lambda draw: ((draw.floats(10),), {}), in_channels=10, out_channels=3, hidden_channels=[8, 8]),
        wild("monai", "VarFullyConnectedNet", lambda: _mean(nets.VarFullyConnectedNet(in_channels=10, out_channels=3, latent_size=2, encode_channels=[8], decode_channels=[8]), "reparameterize"), lambda draw: ((draw.floats(10),), {}), lengths=(16,)),
        net("Generator", lambda draw: ((draw.floats(10),), {}), latent_shape=10, start_shape=(8, 4, 4), channels=(8, 4, 1), strides=(2, 2, 1)),
        net("HighResNet", **TWO, **IO, layer_params=blocks),
        net("MedNeXt", _image(32), **TWO, init_filters=4, in_channels=1, out_channels=2, kernel_size=3, blocks_down=(1, 1, 1, 1), blocks_bottleneck=1, blocks_up=(1, 1, 1, 1)),
        net("MedNeXt", _image(32), "MedNeXt (deep supervision)", **TWO, init_filters=4, in_channels=1, out_channels=2, kernel_size=3, blocks_down=(1, 1, 1, 1), blocks_bottleneck=1, blocks_up=(1, 1, 1, 1), deep_supervision=True, use_residual_connection=True),
        *(wild("monai", f"MILModel ({mode})", lambda mode=mode: nets.MILModel(num_classes=3, mil_mode=mode, pretrained=False, backbone=_backbone(), backbone_num_features=8, trans_blocks=1), lambda draw: ((draw.floats(3, 3, 16, 16),), {}), lengths=(16,)) for mode in ("mean", "max", "att", "att_trans")),
        wild("monai", "NaViT", lambda: nets.NaViT(image_size=16, patch_size=8, num_classes=3, hidden_size=16, mlp_dim=24, num_layers=2, num_heads=2, in_channels=1, dim_head=8, spatial_dims=2), lambda draw: (([[*draw.floats(1, 16, 16)[:2]], [*draw.floats(1, 16, 8)[:2]]],), {}), lengths=(16,), whole="pictures of several sizes, in a list"),
        net("PatchDiscriminator", _image(32), **TWO, channels=4, in_channels=1, num_layers_d=2),
        net("MultiScalePatchDiscriminator", _image(64), num_d=2, num_layers_d=2, **TWO, channels=4, in_channels=1, minimum_size_im=64),
        net("Quicknat", _image(32), num_classes=3, num_filters=4, se_block="CSE"),
        net("Regressor", in_shape=(1, 16, 16), out_shape=(2,), channels=(4, 8), strides=(2, 2)),
        net("RegUNet", **TWO, in_channels=2, num_channel_initial=4, depth=2, out_channels=2, sample=_image(16, 2)),
        net("GlobalNet", _image(16, 2), image_size=(16, 16), **TWO, in_channels=2, num_channel_initial=4, depth=2),
        net("LocalNet", _image(16, 2), **TWO, in_channels=2, num_channel_initial=4, extract_levels=(0, 1), out_channels=2),
        net("ResNet", _image(32), block="basic", layers=[1, 1, 1, 1], block_inplanes=[4, 8, 8, 16], **TWO, n_input_channels=1, num_classes=5),
        net("ResNet", _image(16, dims=3), "ResNet (3D, bottlenecks)", block="bottleneck", layers=[1, 1, 1, 1], block_inplanes=[4, 4, 8, 8], n_input_channels=1, num_classes=5),
        net("SegResNet", **TWO, **IO, init_filters=8, blocks_down=(1, 1, 1), blocks_up=(1, 1), **any_size),
        net("SegResNetVAE", vae_default_std=0.0, input_image_size=(16, 16), vae_nz=8, **TWO, **IO, init_filters=8, blocks_down=(1, 1, 1), blocks_up=(1, 1)),
        net("SegResNetDS", **TWO, **IO, init_filters=4, blocks_down=(1, 1, 1), dsdepth=2),
        net("SegResNetDS2", **TWO, **IO, init_filters=4, blocks_down=(1, 1, 1), dsdepth=1),
        wild("monai", "SPADEAutoencoderKL", lambda: _mean(nets.SPADEAutoencoderKL(label_nc=3, spade_intermediate_channels=4, **KL), "sampling"), _segmented(), lengths=(16,)),
        net("SPADEDiffusionModelUNet", _segmented(0), out_channels=1, label_nc=3, spade_intermediate_channels=4, **DIFFUSION),
        net("SwinUNETR", _image(64), in_channels=1, out_channels=2, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2), window_size=4, feature_size=12, **TWO),
        net("DecoderOnlyTransformer", lambda draw: ((draw.ids(20, draw.length),), {}), num_tokens=20, max_seq_len=16, attn_layers_dim=16, attn_layers_depth=2, attn_layers_heads=2, lengths=(8, 12)),
        net("DecoderOnlyTransformer", lambda draw: ((draw.ids(20, draw.length), draw.floats(5, 16)), {}), "DecoderOnlyTransformer (cross-attention)", num_tokens=20, max_seq_len=16, attn_layers_dim=16, attn_layers_depth=2, attn_layers_heads=2, with_cross_attention=True, lengths=(8, 12)),
        net("UNet", **UNET, num_res_units=1, **any_size),
        net("UNet", label="UNet (batch norm)", **UNET, norm="batch"),
        net("UNETR", _image(32), **IO, img_size=(32, 32), feature_size=4, hidden_size=16, mlp_dim=24, num_heads=2, **TWO),
        wild("monai", "VarAutoEncoder", lambda: _mean(nets.VarAutoEncoder(**TWO, in_shape=(1, 16, 16), out_channels=1, latent_size=4, channels=(4, 8), strides=(2, 2)), "reparameterize"), _image(16), lengths=(16,)),
        net("ViT", in_channels=1, num_layers=2, classification=True, num_classes=3, **VIT),
        net("ViTAutoEnc", in_channels=1, num_layers=2, **{**VIT, "patch_size": (4, 4)}),
        net("VoxelMorphUNet", _image(16, 2), **TWO, in_channels=2, unet_out_channels=4, channels=(4, 4, 4, 4), final_conv_channels=(4, 4)),
        wild("monai", "VoxelMorph", lambda: nets.VoxelMorph(nets.VoxelMorphUNet(**TWO, in_channels=2, unet_out_channels=4, channels=(4, 4, 4, 4), final_conv_channels=(4, 4)), integration_steps=2, spatial_dims=2), lambda draw: ((draw.floats(1, 16, 16), draw.floats(1, 16, 16)), {}), lengths=(16,)),
        net("VQVAE", **TWO, in_channels=1, out_channels=1, channels=(4, 8), num_res_channels=(4, 8), num_res_layers=1, downsample_parameters=((2, 4, 1, 1), (2, 4, 1, 1)), upsample_parameters=((2, 4, 1, 1, 0), (2, 4, 1, 1, 0)), num_embeddings=8, embedding_dim=4),
    ])  # fmt: skip


def _mean(model: nn.Module, method: str) -> nn.Module:
    """A model that takes one standard deviation in the place of random numbers."""
    setattr(model, method, lambda mean, deviation: mean + deviation)
    return model


def _backbone() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), _Head()
    )


class _Head(nn.Module):
    """What ends in the features themselves."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x
