"""Packages of lucidrains: attentions of linear cost, quantizers, experts, diffusion, self-supervision."""

# ruff: noqa: E501 - a table, one model a line

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from models import Draw, Inputs
from torch import Tensor, nn

from wild.entry import Wild, alternating, wild

WORDS = 20
SIZE = {"dim": 16, "depth": 2, "heads": 2}


def entries() -> tuple[Wild, ...]:
    return alternating([*_attentions(), *_quantizers(), *_experts(), *_generative()])


def _attentions() -> list[Wild]:
    text = {"num_tokens": WORDS, "max_seq_len": 32, **SIZE, "dim_head": 8}
    pictures = {
        "num_freq_bands": 2,
        "max_freq": 4.0,
        "depth": 2,
        "num_latents": 4,
        "latent_dim": 16,
        "latent_heads": 2,
        "cross_dim_head": 8,
        "latent_dim_head": 8,
        "num_classes": 3,
    }
    return [
        _entry("Perceiver", "perceiver_pytorch", "Perceiver", pictures, _channels_last),
        _entry("Perceiver (tied)", "perceiver_pytorch", "Perceiver", pictures | {"weight_tie_layers": True, "self_per_cross_attn": 2}, _channels_last),
        _entry("PerceiverIO", "perceiver_pytorch", "PerceiverIO", {"depth": 2, "dim": 6, "queries_dim": 8, "logits_dim": 3, "num_latents": 4, "latent_dim": 16, "latent_heads": 2, "cross_dim_head": 8, "latent_dim_head": 8}, lambda draw: ((draw.floats(draw.length, 6),), {"queries": draw.floats(5, 8)})),
        _entry("PerceiverLM", "perceiver_pytorch", "PerceiverLM", {"dim": 16, "num_tokens": WORDS, "max_seq_len": 32, "depth": 2, "num_latents": 4, "latent_dim": 16, "latent_heads": 2, "cross_dim_head": 8, "latent_dim_head": 8}, lambda draw: ((draw.ids(WORDS, draw.length),), {})),
        _entry("PerformerLM", "performer_pytorch", "PerformerLM", text | {"nb_features": 8, "auto_check_redraw": False}),
        _entry("PerformerLM (redraws)", "performer_pytorch", "PerformerLM", text | {"nb_features": 8, "feature_redraw_interval": 100}, whole="a module kept whole counts microbatches"),
        _entry("PerformerLM (reversible)", "performer_pytorch", "PerformerLM", text | {"nb_features": 8, "reversible": True, "auto_check_redraw": False}),
        _entry("PerformerLM (ReLU, local)", "performer_pytorch", "PerformerLM", text | {"generalized_attention": True, "local_attn_heads": 1, "local_window_size": 4, "auto_check_redraw": False}, lengths=(8,)),
        _entry("PerformerLM (no projection)", "performer_pytorch", "PerformerLM", text | {"no_projection": True, "auto_check_redraw": False}),
        _entry("ReformerLM (full attention)", "reformer_pytorch", "ReformerLM", text | {"use_full_attn": True, "bucket_size": 4, "ff_chunks": 1, "causal": True}, lengths=(8,)),
        _entry("ReformerLM (full attention, reversible)", "reformer_pytorch", "ReformerLM", text | {"use_full_attn": True, "bucket_size": 4, "ff_chunks": 2, "causal": True, "reverse_thres": 4}, lengths=(8,)),
        _entry("ReformerLM (weights tied)", "reformer_pytorch", "ReformerLM", text | {"use_full_attn": True, "weight_tie": True, "weight_tie_embedding": True, "bucket_size": 4, "ff_glu": True}, lengths=(8,)),
        _entry("LinearAttentionTransformerLM", "linear_attention_transformer", "LinearAttentionTransformerLM", text | {"causal": True, "blindspot_size": 1}, lengths=(8,)),
        _entry("LinearAttentionTransformerLM (local)", "linear_attention_transformer", "LinearAttentionTransformerLM", text | {"n_local_attn_heads": 1, "local_attn_window_size": 4}, lengths=(8,)),
        _entry("LinearAttentionTransformerLM (reversible)", "linear_attention_transformer", "LinearAttentionTransformerLM", text | {"reversible": True, "shift_tokens": True}, lengths=(8,)),
        _entry("LinearAttentionTransformerLM (key memory)", "linear_attention_transformer", "LinearAttentionTransformerLM", text | {"pkm_layers": (1,), "pkm_num_keys": 4}, lengths=(8,)),
        _entry("LocalTransformer", "local_attention", "LocalTransformer", text | {"local_attn_window_size": 4}, lengths=(8,)),
        _entry("LocalTransformer (dynamic bias)", "local_attention", "LocalTransformer", text | {"local_attn_window_size": 4, "use_dynamic_pos_bias": True, "num_residual_streams": 1}),
        _entry("LocalTransformer (xpos, loss)", "local_attention", "LocalTransformer", text | {"local_attn_window_size": 4, "use_xpos": True}, lambda draw: ((draw.ids(WORDS, draw.length + 1),), {"return_loss": True}), loss=_first, lengths=(8,)),
    ]  # fmt: skip


def _quantizers() -> list[Wild]:
    return [
        _quantizer("VectorQuantize", codebook_size=8),
        _quantizer("VectorQuantize", "cosine", codebook_size=8, use_cosine_sim=True),
        _quantizer("VectorQuantize", "learnable", codebook_size=8, learnable_codebook=True, ema_update=False),
        _quantizer("VectorQuantize", "heads, low dimension", codebook_size=8, heads=2, codebook_dim=4, separate_codebook_per_head=True),
        _quantizer("VectorQuantize", "orthogonal", codebook_size=8, orthogonal_reg_weight=0.5),
        _quantizer("VectorQuantize", "affine", called=True, whole="its scale is the variance of the batch", codebook_size=8, affine_param=True),
        _quantizer("ResidualVQ", num_quantizers=2, codebook_size=8),
        _quantizer("ResidualVQ", "shared", num_quantizers=3, codebook_size=8, shared_codebook=True),
        _quantizer("GroupedResidualVQ", num_quantizers=2, groups=2, codebook_size=8),
        _quantizer("FSQ", levels=[5, 5, 3]),
        _quantizer("ResidualFSQ", levels=[5, 5, 3], num_quantizers=2),
        _quantizer("LFQ", codebook_size=16),
        _quantizer("ResidualLFQ", codebook_size=16, num_quantizers=2),
        _quantizer("SimVQ", codebook_size=8),
        _quantizer("ResidualSimVQ", num_quantizers=2, codebook_size=8),
        wild("lucidrains", "LatentQuantize", lambda: nn.Sequential(nn.Linear(6, 16), nn.Tanh(), _class("vector_quantize_pytorch", "LatentQuantize")(levels=[5, 5, 3], dim=16)), lambda draw: ((draw.floats(16, 6).mT.contiguous().mT,), {}), lengths=(8,)),
    ]  # fmt: skip


def _experts() -> list[Wild]:
    def sparse(**options: Any) -> nn.Module:
        import st_moe_pytorch as m

        return _between(
            m.SparseMoEBlock(
                m.MoE(dim=16, num_experts=4, expert_hidden_mult=2, threshold_train=0.0, **options), add_ff_before=True
            )
        )

    return [
        wild("lucidrains", "SparseMoEBlock", sparse, _series),
        wild("lucidrains", "SparseMoEBlock (top 3)", lambda: sparse(gating_top_n=3), _series),
        wild("lucidrains", "SoftMoE", lambda: _between(_class("soft_moe_pytorch", "SoftMoE")(16, seq_len=8, num_experts=4)), _series, lengths=(8,)),
        wild("lucidrains", "SoftMoE (GEGLU)", lambda: _between(_class("soft_moe_pytorch", "SoftMoE")(16, num_slots=2, num_experts=4, geglu=True)), _series),
        wild("lucidrains", "DynamicSlotsSoftMoE", lambda: _between(_class("soft_moe_pytorch", "DynamicSlotsSoftMoE")(16, num_experts=4)), _series),
    ]  # fmt: skip


def _generative() -> list[Wild]:
    unet = {"dim": 8, "dim_mults": (1, 2), "attn_dim_head": 8, "attn_heads": 2}
    karras = {
        "dim": 8,
        "dim_max": 16,
        "num_downsamples": 1,
        "num_blocks_per_stage": 1,
        "attn_res": (4,),
        "attn_dim_head": 8,
        "dropout": 0.0,
    }

    def noisy(*shape: int) -> Callable[[Draw], Inputs]:
        return lambda draw: ((draw.floats(*shape), draw.ids(100)), {})

    return [
        _entry("Unet", "denoising_diffusion_pytorch", "Unet", unet, noisy(3, 16, 16), lengths=(16,)),
        _entry("Unet (self-conditioned)", "denoising_diffusion_pytorch", "Unet", unet | {"self_condition": True, "learned_variance": True}, noisy(3, 16, 16), lengths=(16,)),
        _entry("Unet1D", "denoising_diffusion_pytorch", "Unet1D", unet | {"channels": 2}, noisy(2, 16), lengths=(16,)),
        _entry("KarrasUnet", "denoising_diffusion_pytorch", "KarrasUnet", karras | {"image_size": 8}, lambda draw: ((draw.floats(4, 8, 8), draw.floats().abs()), {}), lengths=(8,)),
        _entry("KarrasUnet1D", "denoising_diffusion_pytorch", "KarrasUnet1D", karras | {"seq_len": 8, "num_classes": 3}, lambda draw: ((draw.floats(4, 8), draw.floats().abs()), {"class_labels": draw.ids(3)}), lengths=(8,)),
        wild("lucidrains", "GaussianDiffusion", lambda: _Diffusion(_class("denoising_diffusion_pytorch", "GaussianDiffusion"), _class("denoising_diffusion_pytorch", "Unet")(**unet)), lambda draw: ((draw.floats(3, 16, 16), draw.ids(100), draw.floats(3, 16, 16)), {}), loss=_first, lengths=(16,)),
        wild("lucidrains", "BYOL", _byol, lambda draw: ((draw.floats(3, 16, 16),), {}), loss=_first, inside=True, whole="its batch normalization reads two views", lengths=(16,)),
    ]  # fmt: skip


class _Diffusion(nn.Module):
    """A step of a diffusion with the given times and noise."""

    def __init__(self, kind: Any, net: nn.Module) -> None:
        super().__init__()
        self.diffusion = kind(net, image_size=16, timesteps=100)

    def forward(self, pictures: Tensor, times: Tensor, noise: Tensor) -> Tensor:
        return self.diffusion.p_losses(pictures, times, noise)  # type: ignore[no-any-return]


class _Byol(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        net = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(392, 8), nn.Linear(8, 4))
        self.learner = _class("byol_pytorch", "BYOL")(net, image_size=16, projection_size=8, projection_hidden_size=16, augment_fn=nn.Identity(), augment_fn2=nn.Tanh(), use_simplicial_embeddings=False)  # fmt: skip

    def forward(self, pictures: Tensor) -> Tensor:
        return self.learner(pictures)  # type: ignore[no-any-return]


def _byol() -> nn.Module:
    return _Byol()


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _class(package: str, name: str) -> Any:
    return getattr(import_module(package), name)


def _entry(name: str, package: str, kind: str, config: dict[str, Any], sample: Callable[[Draw], Inputs] | None = None, **facts: Any) -> Wild:  # fmt: skip
    return wild("lucidrains", name, lambda: _class(package, kind)(**config), sample or _text, **facts)


def _quantizer(kind: str, how: str = "", called: bool = False, whole: str = "", **config: Any) -> Wild:
    """``called``: once before it is compiled, which gives its buffers their first tensors."""

    def make() -> nn.Module:
        layer = _class("vector_quantize_pytorch", kind)(dim=16, **config)
        if called:
            layer(torch.randn(4, 8, 16))
        return _between(layer)

    return wild("lucidrains", f"{kind} ({how})" if how else kind, make, _series, whole=whole)


def _between(layer: nn.Module) -> nn.Module:
    return Between(layer)


class Between(nn.Module):
    """A layer that may return more than its result, behind two linear ones and before one; all of it is returned."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.enter = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16))
        self.layer, self.leave = layer, nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Any:
        found = self.layer(torch.tanh(self.enter(x)))
        if not isinstance(found, tuple):
            return self.leave(found.to(x))
        tensors = [t for t in found[1:] if isinstance(t, Tensor) and t.is_floating_point() and t.requires_grad]
        return (self.leave(found[0].to(x)), *tensors)


def _text(draw: Draw) -> Inputs:
    return (draw.ids(WORDS, draw.length),), {}


def _series(draw: Draw) -> Inputs:
    return (draw.floats(draw.length, 6),), {}


def _channels_last(draw: Draw) -> Inputs:
    return (draw.floats(draw.length, draw.length, 3),), {}
