"""open_clip: the kinds of architecture among its configurations, made small; with CLIP's, SigLIP's and CoCa's losses."""

# ruff: noqa: E501 - a table, one model a line

from __future__ import annotations

from typing import Any

from models import Draw, Inputs
from torch import Tensor, nn

from wild.entry import Wild, itself, wild

VISION: dict[str, Any] = {"image_size": 16, "layers": 2, "width": 16, "head_width": 8, "patch_size": 8}
TEXT: dict[str, Any] = {"context_length": 8, "vocab_size": 24, "width": 16, "heads": 2, "layers": 2}
KINDS: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "ViT": ("CLIP", {}, {}, {}),
    "ViT, quick GELU": ("CLIP", {}, {}, {"quick_gelu": True}),
    "ViT, patch dropout off, average pooling": ("CLIP", {"pool_type": "avg", "final_ln_after_pool": True}, {}, {}),
    "ViT, attentional pooling": ("CLIP", {"attentional_pool": True, "attn_pooler_queries": 4, "attn_pooler_heads": 2}, {}, {}),
    "ViT, no class token in text": ("CustomTextCLIP", {}, {"embed_cls": True, "pool_type": "last"}, {}),
    "ResNet": ("CLIP", {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32, "patch_size": None}, {}, {}),
    "timm ViT": ("CLIP", {"timm_model_name": "test_vit", "timm_model_pretrained": False, "timm_pool": "token", "timm_proj": "linear", "image_size": 32}, {}, {}),
    "timm ConvNeXt": ("CustomTextCLIP", {"timm_model_name": "test_convnext", "timm_model_pretrained": False, "timm_pool": "avg", "timm_proj": "mlp", "image_size": 32}, {}, {}),
    "SigLIP": ("CustomTextCLIP", {"no_ln_pre": True, "pool_type": "avg"}, {"no_causal_mask": True, "pool_type": "last", "proj_bias": True}, {"init_logit_bias": -10.0}),
    "CoCa": ("CoCa", {"attentional_pool": True, "attn_pooler_heads": 2, "attn_pooler_queries": 4, "output_tokens": True}, {"embed_cls": True, "output_tokens": True}, {"multimodal_cfg": {"context_length": 8, "vocab_size": 24, "width": 16, "heads": 2, "layers": 1, "attn_pooler_heads": 2}}),
}  # fmt: skip


def entries() -> tuple[Wild, ...]:
    made = []
    for name, (kind, vision, text, rest) in KINDS.items():
        size = vision.get("image_size", 16)
        sample = _pairs(size)
        make = _maker(kind, {**VISION, **vision}, {**TEXT, **text}, rest)
        made.append(wild("open_clip", name, make, sample, lengths=(8,)))
        if kind != "CoCa":
            loss = "SigLipLoss" if "logit_bias" in str(rest) else "ClipLoss"
            made.append(
                wild(
                    "open_clip",
                    f"{name}, {loss}",
                    lambda make=make, loss=loss: _Trained(make(), loss),
                    sample,
                    loss=itself,
                    inside=True,
                    lengths=(8,),
                )
            )
    return tuple(made)


def _maker(kind: str, vision: dict[str, Any], text: dict[str, Any], rest: dict[str, Any]) -> Any:
    def make() -> nn.Module:
        import open_clip

        model: nn.Module = getattr(open_clip, kind)(embed_dim=16, vision_cfg=vision, text_cfg=text, **rest)
        if kind == "CoCa":  # which leaves parameters uninitialised
            for parameter in model.parameters():
                nn.init.normal_(parameter, std=0.1)
        return model

    return make


class _Trained(nn.Module):
    """A model with its contrastive loss, as open_clip's trainer puts them together."""

    def __init__(self, model: nn.Module, loss: str) -> None:
        import open_clip

        super().__init__()
        self.model, self.loss = model, getattr(open_clip.loss, loss)()

    def forward(self, images: Tensor, text: Tensor) -> Tensor:
        found = self.model(images, text)
        return self.loss(*(found if isinstance(found, tuple) else found.values()))  # type: ignore[no-any-return]


def _pairs(size: int) -> Any:
    def sample(draw: Draw) -> Inputs:
        return (draw.floats(3, size, size), draw.ids(24, 8)), {}

    return sample
