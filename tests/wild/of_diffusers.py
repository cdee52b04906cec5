"""diffusers: the classes of ``diffusers.models`` that can be made from a tiny configuration."""

# ruff: noqa: E501 - a table, one model a line

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from models import Draw, Inputs
from torch import Tensor
from zoo.entry import mean_square

from wild.entry import Wild, alternating, wild

TEXT = 6  # tokens of a prompt
WIDTH = 16  # of a prompt's tokens
UNET: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 1,
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
}
CROSS: dict[str, Any] = {
    **UNET,
    "cross_attention_dim": WIDTH,
    "attention_head_dim": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
HEADS: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2}
KL: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (4, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "latent_channels": 4,
    "norm_num_groups": 2,
}


def _times(draw: Draw) -> Tensor:
    return draw.ids(1000)


def _noisy(
    channels: int = 4, size: int = 8, *rest: Callable[[Draw], Any], **named: Callable[[Draw], Any]
) -> Callable[[Draw], Inputs]:
    """A picture, its time, and what else there is."""
    return lambda draw: (
        (draw.floats(channels, size, size), _times(draw), *(f(draw) for f in rest)),
        {name: f(draw) for name, f in named.items()},
    )


def _prompt(draw: Draw) -> Tensor:
    return draw.floats(TEXT, WIDTH)


def _pooled(draw: Draw) -> Tensor:
    return draw.floats(WIDTH)


def _latent(channels: int, *shape: int, **named: Callable[[Draw], Any]) -> Callable[[Draw], Inputs]:
    """Latents of one shape by name, so that each model's order of arguments does not matter."""
    return lambda draw: (
        (),
        {"hidden_states": draw.floats(channels, *shape), **{name: f(draw) for name, f in named.items()}},
    )


def _positions(count: int) -> Callable[[Draw], Tensor]:
    return lambda draw: torch.arange(count * 3).reshape(count, 3).remainder(5).double()


def _mask(draw: Draw) -> Tensor:
    return torch.ones(draw.batch, TEXT, dtype=torch.long)


def entries() -> tuple[Wild, ...]:
    import diffusers

    def model(kind: str, sample: Callable[[Draw], Inputs], label: str = "", **config: Any) -> Wild:
        return wild(
            "diffusers", label or kind, lambda: getattr(diffusers, kind)(**config), sample, loss=_first, lengths=(8,)
        )

    image = lambda draw: ((draw.floats(3, 16, 16),), {})  # noqa: E731
    video = lambda channels: _latent(channels, 2, 4, 4, timestep=_times, encoder_hidden_states=_prompt)  # noqa: E731
    flux = {"img_ids": _positions(16), "txt_ids": _positions(TEXT)}

    def tokens(channels: int, **named: Callable[[Draw], Any]) -> Callable[[Draw], Inputs]:
        rest = {"timestep": lambda draw: draw.floats().sigmoid(), **named}
        return lambda draw: ((), {"hidden_states": draw.floats(16, channels), **{n: f(draw) for n, f in rest.items()}})

    return alternating([
        model("UNet2DModel", _noisy(), **UNET, attention_head_dim=4, down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D")),
        model("UNet2DModel", lambda draw: ((draw.floats(4, 8, 8), _times(draw)), {"class_labels": draw.ids(5)}), "UNet2DModel (classes)", **UNET, attention_head_dim=4, num_class_embeds=5, down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D")),
        model("UNet2DConditionModel", _noisy(4, 8, _prompt), **CROSS),
        model("UNet2DConditionModel", _noisy(4, 8, _prompt, added_cond_kwargs=lambda draw: {"text_embeds": draw.floats(8), "time_ids": draw.ids(9, 3)}), "UNet2DConditionModel (SDXL)", **CROSS, use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=20, transformer_layers_per_block=1),
        model("UNet3DConditionModel", lambda draw: ((draw.floats(4, 2, 8, 8), _times(draw), _prompt(draw)), {}), **{**CROSS, "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"), "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D")}),
        model("UNetSpatioTemporalConditionModel", lambda draw: ((draw.floats(2, 8, 8, 8), _times(draw), draw.floats(1, WIDTH), draw.floats(3)), {}), sample_size=8, in_channels=8, out_channels=4, block_out_channels=(32, 32), addition_time_embed_dim=4, projection_class_embeddings_input_dim=12, layers_per_block=1, cross_attention_dim=WIDTH, num_attention_heads=2, num_frames=2, down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"), up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal")),
        model("UVit2DModel", lambda draw: ((draw.ids(20, 4, 4), _prompt(draw), _pooled(draw), draw.floats(5)), {}), hidden_size=16, cond_embed_dim=WIDTH, micro_cond_encode_dim=4, micro_cond_embed_dim=20, encoder_hidden_size=WIDTH, vocab_size=24, codebook_size=20, in_channels=16, block_out_channels=16, num_res_blocks=1, block_num_heads=2, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, sample_size=4),
        model("StableCascadeUNet", lambda draw: ((draw.floats(4, 8, 8), draw.floats().sigmoid(), draw.floats(1, WIDTH)), {}), in_channels=4, out_channels=4, timestep_ratio_embedding_dim=8, patch_size=1, conditioning_dim=16, block_out_channels=(16, 16), num_attention_heads=(2, 2), down_num_layers_per_block=(1, 1), up_num_layers_per_block=(1, 1), clip_text_pooled_in_channels=WIDTH, clip_seq=2, dropout=(0.0, 0.0)),
        model("ControlNetModel", _noisy(4, 8, _prompt, lambda draw: draw.floats(3, 16, 16)), **{k: v for k, v in CROSS.items() if k not in ("sample_size", "out_channels", "up_block_types")}, conditioning_embedding_out_channels=(8, 8)),
        model("T2IAdapter", image, in_channels=3, channels=[8, 16], num_res_blocks=1, downscale_factor=4),
        model("AutoencoderKL", image, **KL, sample_size=16),
        model("AsymmetricAutoencoderKL", image, in_channels=3, out_channels=3, down_block_types=("DownEncoderBlock2D",) * 2, down_block_out_channels=(4, 8), layers_per_down_block=1, up_block_types=("UpDecoderBlock2D",) * 2, up_block_out_channels=(4, 8), layers_per_up_block=1, latent_channels=4, norm_num_groups=2),
        model("AutoencoderTiny", image, in_channels=3, out_channels=3, encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1), latent_channels=4),
        model("AutoencoderDC", image, in_channels=3, latent_channels=4, attention_head_dim=4, encoder_block_types=("ResBlock", "EfficientViTBlock"), decoder_block_types=("ResBlock", "EfficientViTBlock"), encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1), encoder_qkv_multiscales=((), (5,)), decoder_qkv_multiscales=((), (5,)), downsample_block_type="Conv", decoder_norm_types="rms_norm", decoder_act_fns="silu"),
        model("VQModel", image, in_channels=3, out_channels=3, block_out_channels=(4, 8), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=3, num_vq_embeddings=8, norm_num_groups=2),
        model("AutoencoderOobleck", lambda draw: ((draw.floats(2, 64),), {}), encoder_hidden_size=8, downsampling_ratios=[2, 2], channel_multiples=[1, 2], decoder_channels=4, decoder_input_channels=4, audio_channels=2),
        model("AutoencoderKLWan", lambda draw: ((draw.floats(3, 1, 16, 16),), {}), base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]),
        model("AutoencoderKLCogVideoX", lambda draw: ((draw.floats(3, 1, 16, 16),), {}), in_channels=3, out_channels=3, down_block_types=("CogVideoXDownBlock3D",) * 2, up_block_types=("CogVideoXUpBlock3D",) * 2, block_out_channels=(8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2, temporal_compression_ratio=2),
        model("AutoencoderKLLTXVideo", lambda draw: ((draw.floats(3, 1, 16, 16),), {}), in_channels=3, out_channels=3, latent_channels=8, block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8), layers_per_block=(1, 1, 1, 1, 1), decoder_layers_per_block=(1, 1, 1, 1, 1), spatio_temporal_scaling=(True, True, False, False), decoder_spatio_temporal_scaling=(True, True, False, False), decoder_inject_noise=(False,) * 5, upsample_residual=(False,) * 4, upsample_factor=(1,) * 4, patch_size=1, patch_size_t=1, encoder_causal=True, decoder_causal=False),
        model("DiTTransformer2DModel", _latent(4, 8, 8, timestep=_times, class_labels=lambda draw: draw.ids(7)), **HEADS, in_channels=4, out_channels=8, sample_size=8, patch_size=2, num_embeds_ada_norm=8),
        model("Transformer2DModel", lambda draw: ((draw.floats(8, 4, 4), _prompt(draw)), {}), **HEADS, in_channels=8, norm_num_groups=4, cross_attention_dim=WIDTH),
        model("PixArtTransformer2DModel", _latent(4, 8, 8, timestep=_times, encoder_hidden_states=_prompt), **HEADS, in_channels=4, out_channels=8, cross_attention_dim=16, caption_channels=WIDTH, sample_size=8, use_additional_conditions=False),
        model("SD3Transformer2DModel", _latent(4, 8, 8, timestep=_times, encoder_hidden_states=_prompt, pooled_projections=_pooled), **HEADS, sample_size=8, in_channels=4, out_channels=4, joint_attention_dim=WIDTH, caption_projection_dim=16, pooled_projection_dim=WIDTH, pos_embed_max_size=8),
        model("AuraFlowTransformer2DModel", _latent(4, 8, 8, timestep=lambda draw: draw.floats(), encoder_hidden_states=_prompt), sample_size=8, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=WIDTH, caption_projection_dim=16, pos_embed_max_size=64),
        model("FluxTransformer2DModel", tokens(4, encoder_hidden_states=_prompt, pooled_projections=_pooled, **flux), **{**HEADS, "num_layers": 1}, num_single_layers=1, in_channels=4, joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, axes_dims_rope=(2, 2, 4)),
        model("Flux2Transformer2DModel", tokens(4, encoder_hidden_states=_prompt, img_ids=lambda draw: torch.arange(64).reshape(16, 4).remainder(5).double(), txt_ids=lambda draw: torch.arange(24).reshape(6, 4).remainder(5).double()), **{**HEADS, "num_layers": 1}, num_single_layers=1, in_channels=4, joint_attention_dim=WIDTH, timestep_guidance_channels=16, axes_dims_rope=(2, 2, 2, 2), guidance_embeds=False),
        model("ChromaTransformer2DModel", tokens(4, encoder_hidden_states=_prompt, **flux), **{**HEADS, "num_layers": 1}, num_single_layers=1, in_channels=4, joint_attention_dim=WIDTH, axes_dims_rope=(2, 2, 4), approximator_num_channels=8, approximator_hidden_dim=8, approximator_layers=1),
        model("CogVideoXTransformer3DModel", _latent(2, 4, 8, 8, timestep=_times, encoder_hidden_states=_prompt), **HEADS, in_channels=4, out_channels=4, time_embed_dim=4, text_embed_dim=WIDTH, sample_width=8, sample_height=8, sample_frames=5, max_text_seq_length=TEXT),
        model("CogView3PlusTransformer2DModel", _latent(4, 8, 8, timestep=_times, encoder_hidden_states=_prompt, original_size=lambda draw: draw.ids(9, 2).double(), target_size=lambda draw: draw.ids(9, 2).double(), crop_coords=lambda draw: draw.ids(9, 2).double()), **HEADS, in_channels=4, out_channels=4, text_embed_dim=WIDTH, time_embed_dim=8, condition_dim=4, pos_embed_max_size=8, sample_size=8),
        model("CogView4Transformer2DModel", _latent(4, 8, 8, timestep=_times, encoder_hidden_states=_prompt, original_size=lambda draw: draw.ids(9, 2).double(), target_size=lambda draw: draw.ids(9, 2).double(), crop_coords=lambda draw: draw.ids(9, 2).double()), **HEADS, in_channels=4, out_channels=4, text_embed_dim=WIDTH, time_embed_dim=8, condition_dim=4, sample_size=8, rope_axes_dim=(8, 8)),
        model("Lumina2Transformer2DModel", _latent(4, 8, 8, timestep=lambda draw: draw.floats().sigmoid(), encoder_hidden_states=_prompt, encoder_attention_mask=_mask), sample_size=8, patch_size=2, in_channels=4, hidden_size=16, num_layers=2, num_refiner_layers=1, num_attention_heads=2, num_kv_heads=1, multiple_of=8, axes_dim_rope=(4, 2, 2), axes_lens=(32, 32, 32), cap_feat_dim=WIDTH),
        model("SanaTransformer2DModel", _latent(4, 8, 8, timestep=_times, encoder_hidden_states=_prompt), **HEADS, in_channels=4, out_channels=4, num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=WIDTH, sample_size=8, patch_size=1),
        model("HunyuanVideoTransformer3DModel", _latent(4, 1, 4, 4, timestep=_times, encoder_hidden_states=_prompt, encoder_attention_mask=_mask, pooled_projections=_pooled, guidance=lambda draw: draw.floats()), in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=1, num_single_layers=1, num_refiner_layers=1, patch_size=1, patch_size_t=1, guidance_embeds=True, text_embed_dim=WIDTH, pooled_projection_dim=WIDTH, rope_axes_dim=(2, 4, 4)),
        model("LatteTransformer3DModel", _latent(4, 2, 8, 8, timestep=_times, encoder_hidden_states=_prompt), **HEADS, in_channels=4, out_channels=4, cross_attention_dim=16, sample_size=8, patch_size=2, caption_channels=WIDTH, video_length=2, num_embeds_ada_norm=8, norm_type="ada_norm_single", norm_elementwise_affine=False),
        model("AllegroTransformer3DModel", _allegro, **{**HEADS, "attention_head_dim": 12}, in_channels=4, out_channels=4, cross_attention_dim=24, sample_width=4, sample_height=4, sample_frames=2, caption_channels=WIDTH),
        model("LTXVideoTransformer3DModel", _ltx, in_channels=4, out_channels=4, **HEADS, cross_attention_dim=16, caption_channels=WIDTH),
        model("MochiTransformer3DModel", _latent(4, 2, 4, 4, timestep=_times, encoder_hidden_states=_prompt, encoder_attention_mask=lambda draw: _mask(draw).bool()), patch_size=2, **HEADS, pooled_projection_dim=8, in_channels=4, text_embed_dim=WIDTH, time_embed_dim=4, max_sequence_length=TEXT),
        model("WanTransformer3DModel", video(4), patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=WIDTH, freq_dim=8, ffn_dim=24, num_layers=2, rope_max_seq_len=32),
        model("SkyReelsV2Transformer3DModel", video(4), patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=WIDTH, freq_dim=8, ffn_dim=24, num_layers=2, rope_max_seq_len=32),
        model("CosmosTransformer3DModel", _latent(4, 1, 4, 4, timestep=_times, encoder_hidden_states=_prompt), in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=2, mlp_ratio=2, text_embed_dim=WIDTH, adaln_lora_dim=4, max_size=(4, 8, 8), patch_size=(1, 2, 2), concat_padding_mask=False, extra_pos_embed_type="learnable"),
        model("QwenImageTransformer2DModel", _qwen, patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=WIDTH, axes_dims_rope=(4, 2, 2)),
        model("PriorTransformer", lambda draw: ((draw.floats(8), _times(draw)), {"proj_embedding": draw.floats(8), "encoder_hidden_states": draw.floats(5, 8)}), num_attention_heads=2, attention_head_dim=4, num_layers=2, embedding_dim=8, num_embeddings=5, additional_embeddings=4),
        model("StableAudioDiTModel", lambda draw: ((draw.floats(4, 8),), {"timestep": draw.floats().sigmoid(), "encoder_hidden_states": _prompt(draw), "global_hidden_states": draw.floats(1, WIDTH), "rotary_embedding": _rotary(9, 4)}), sample_size=8, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2, num_key_value_attention_heads=2, out_channels=4, cross_attention_dim=16, cross_attention_input_dim=WIDTH, time_proj_dim=8, global_states_input_dim=WIDTH),
        model("T5FilmDecoder", lambda draw: (([(draw.floats(TEXT, 16), torch.ones(draw.batch, TEXT))], draw.floats(8, 8), draw.floats().sigmoid()), {}), input_dims=8, targets_length=8, d_model=16, num_layers=2, num_heads=2, d_kv=8, d_ff=24, dropout_rate=0.0),
        model("PRXTransformer2DModel", _latent(4, 8, 8, timestep=lambda draw: draw.floats().sigmoid(), encoder_hidden_states=_prompt), in_channels=4, patch_size=2, context_in_dim=WIDTH, hidden_size=16, mlp_ratio=2.0, num_heads=2, depth=2, axes_dim=[4, 4]),
        model("BriaTransformer2DModel", tokens(4, encoder_hidden_states=_prompt, **flux), **{**HEADS, "num_layers": 1}, num_single_layers=1, in_channels=4, joint_attention_dim=WIDTH, pooled_projection_dim=None, axes_dims_rope=[2, 2, 4]),
        model("OvisImageTransformer2DModel", tokens(4, encoder_hidden_states=_prompt, **flux), **{**HEADS, "num_layers": 1}, num_single_layers=1, in_channels=4, out_channels=4, joint_attention_dim=WIDTH, axes_dims_rope=(2, 2, 4)),
    ])  # fmt: skip


def _first(output: Any) -> Tensor:
    """The mean square of a model's sample, whatever it is called."""
    first = output if isinstance(output, Tensor | list | tuple) else next(iter(output.values()))
    tensors = [first] if isinstance(first, Tensor) else list(first)
    return torch.stack([mean_square(tensor) for tensor in tensors]).sum()


def _rotary(length: int, dims: int) -> tuple[Tensor, Tensor]:
    angles = torch.arange(length).double()[:, None] * torch.arange(1, dims // 2 + 1).double() / 7
    angles = angles.repeat_interleave(2, 1)
    return angles.cos(), angles.sin()


def _allegro(draw: Draw) -> Inputs:
    return (draw.floats(4, 2, 4, 4), _prompt(draw), _times(draw)), {
        "attention_mask": torch.ones(draw.batch, 2, 4, 4),
        "encoder_attention_mask": torch.ones(draw.batch, TEXT),
    }


def _ltx(draw: Draw) -> Inputs:
    return (), {
        "hidden_states": draw.floats(16, 4),
        "encoder_hidden_states": _prompt(draw),
        "timestep": _times(draw),
        "encoder_attention_mask": _mask(draw),
        "num_frames": 1,
        "height": 4,
        "width": 4,
    }


def _qwen(draw: Draw) -> Inputs:
    return (), {
        "hidden_states": draw.floats(16, 16),
        "encoder_hidden_states": _prompt(draw),
        "encoder_hidden_states_mask": _mask(draw),
        "timestep": draw.floats().sigmoid(),
        "img_shapes": [(1, 4, 4)],
    }
