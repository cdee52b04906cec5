"""x-transformers: its wrappers, and one model for each group of options of its attention layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from models import Draw, Inputs
from torch import nn

from wild.entry import Wild, alternating, wild

WORDS = 20
SIZE = {"dim": 16, "depth": 2, "heads": 2, "attn_dim_head": 8}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "flash": {"attn_flash": True},
    "rotary": {"rotary_pos_emb": True},
    "rotary xpos": {"rotary_xpos": True, "rotary_pos_emb": True},
    "ALiBi": {"alibi_pos_bias": True},
    "T5 bias": {"rel_pos_bias": True},
    "dynamic bias": {"dynamic_pos_bias": True, "dynamic_pos_bias_log_distance": False},
    "RMS norm": {"use_rmsnorm": True},
    "simple RMS norm": {"use_simple_rmsnorm": True},
    "scale norm": {"use_scalenorm": True},
    "GLU, swish": {"ff_glu": True, "ff_swish": True, "ff_no_bias": True},
    "ReLU squared": {"ff_relu_squared": True},
    "ff post norm": {"ff_post_act_ln": True},
    "query-key norm": {"attn_qk_norm": True, "attn_qk_norm_dim_scale": True},
    "talking heads": {"attn_pre_talking_heads": True, "attn_post_talking_heads": True},
    "one key-value head": {"attn_one_kv_head": True},
    "grouped heads": {"attn_kv_heads": 1},
    "memory": {"attn_num_mem_kv": 4},
    "sparse top-k": {"attn_sparse_topk": 4},
    "gated values": {"attn_gate_values": True},
    "value residual": {"add_value_residual": True},
    "head scale": {"attn_head_scale": True},
    "on attention": {"attn_on_attn": True},
    "sandwich norm": {"sandwich_norm": True},
    "residual gates": {"gate_residual": True},
    "post norm": {"pre_norm": False},
    "macaron": {"macaron": True},
    "sandwich": {"sandwich_coef": 1},
    "residual scale": {"scale_residual": True},
    "shifted tokens": {"shift_tokens": 1},
    "hyper connections": {"num_residual_streams": 2},
    "softclamp": {"attn_softclamp_logits": True},
    "sigmoid": {"attn_sigmoid": True},
    "DynamicTanh": {"use_dynamic_tanh": True},
}


def entries() -> tuple[Wild, ...]:
    import x_transformers as x

    def decoder(**options: Any) -> nn.Module:
        layers = x.Decoder(**SIZE, **options)
        return x.TransformerWrapper(num_tokens=WORDS, max_seq_len=32, attn_layers=layers)  # type: ignore[no-any-return]

    def both() -> nn.Module:
        sides = {f"{side}_{key}": value for side in ("enc", "dec") for key, value in
                 {"num_tokens": WORDS, "depth": 1, "heads": 2, "max_seq_len": 32}.items()}  # fmt: skip
        return x.XTransformer(dim=16, **sides)  # type: ignore[no-any-return]

    def vision() -> nn.Module:
        return x.ViTransformerWrapper(image_size=16, patch_size=8, num_classes=3, attn_layers=x.Encoder(**SIZE))  # type: ignore[no-any-return]

    def series() -> nn.Module:
        return x.ContinuousTransformerWrapper(dim_in=6, dim_out=5, max_seq_len=32, attn_layers=x.Encoder(**SIZE))  # type: ignore[no-any-return]

    def autoregressive() -> nn.Module:
        return x.AutoregressiveWrapper(decoder(rotary_pos_emb=True))  # type: ignore[no-any-return]

    def non_causal() -> nn.Module:
        layers = x.Encoder(**SIZE)
        return x.TransformerWrapper(num_tokens=WORDS, max_seq_len=32, attn_layers=layers, num_memory_tokens=3)  # type: ignore[no-any-return]

    made = [_entry(f"decoder ({name})", lambda options=options: decoder(**options), _text)
            for name, options in OPTIONS.items()]  # fmt: skip
    return alternating([
        *made,
        _entry("encoder (memory tokens)", non_causal, _text),
        _entry("XTransformer", both, lambda d: ((d.ids(WORDS, d.length), d.ids(WORDS, 6)), {}), loss=lambda out: out),
        _entry("ViTransformerWrapper", vision, lambda d: ((d.floats(3, 16, 16),), {}), lengths=(8,)),
        _entry("ContinuousTransformerWrapper", series, lambda d: ((d.floats(d.length, 6),), {})),
        _entry("AutoregressiveWrapper", autoregressive, _text, loss=lambda out: out),
    ])  # fmt: skip


def _entry(name: str, make: Callable[[], nn.Module], sample: Callable[[Draw], Inputs], **facts: Any) -> Wild:
    return wild("x_transformers", name, make, sample, **facts)


def _text(draw: Draw) -> Inputs:
    return (draw.ids(WORDS, draw.length),), {}
