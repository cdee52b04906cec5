"""Mixtures of experts: which expert works for a token depends on the token."""

# ruff: noqa: E501 - a table, one model a line

from __future__ import annotations

from typing import Any

import torch

from zoo.entry import HEADS, SINGLE, TEXT, Entry, hugging_face, text, translation

DOUBLE = {"dtype": torch.float64}
SIZES = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
}


def _entry(name: str, model: str, sample: Any = text, facts: dict[str, Any] | None = None, **config: Any) -> Entry:
    config = {**TEXT, **HEADS, **SIZES, **config}
    return hugging_face(name, model, sample, config, family="experts", **{**SINGLE, **(facts or {})})


def experts() -> tuple[Entry, ...]:
    latent = {
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_nope_head_dim": 4,
        "qk_rope_head_dim": 4,
        "v_head_dim": 4,
        "num_key_value_heads": 4,
    }
    groups = {"n_group": 2, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1}
    encoder_decoder = {
        "d_model": 16,
        "d_kv": 4,
        "d_ff": 24,
        "num_heads": 4,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "decoder_start_token_id": 0,
    }
    return (
        _entry("mixtral", "MixtralForCausalLM"),
        _entry("mixtral_router_loss", "MixtralForCausalLM", output_router_logits=True),
        _entry("mixtral_eager", "MixtralForCausalLM", experts_implementation="eager", facts=DOUBLE),
        _entry("qwen2_moe", "Qwen2MoeForCausalLM", shared_expert_intermediate_size=12),
        _entry("qwen3_moe", "Qwen3MoeForCausalLM", head_dim=4),
        _entry("deepseek_v2", "DeepseekV2ForCausalLM", **latent, **groups, topk_method="group_limited_greedy"),
        _entry("deepseek_v3", "DeepseekV3ForCausalLM", **latent, **groups),
        _entry("olmoe", "OlmoeForCausalLM"),
        _entry("phimoe", "PhimoeForCausalLM", router_jitter_noise=0.0, input_jitter_noise=0.0),
        _entry("granitemoe", "GraniteMoeForCausalLM"),
        _entry("granitemoeshared", "GraniteMoeSharedForCausalLM", shared_intermediate_size=12),
        _entry("dbrx", "DbrxForCausalLM", d_model=16, n_heads=4, n_layers=2, max_seq_len=32, attn_config={"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}, ffn_config={"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2}),
        _entry("jetmoe", "JetMoeForCausalLM", kv_channels=4, facts=DOUBLE),
        _entry("gpt_oss", "GptOssForCausalLM", head_dim=4, sliding_window=4),
        _entry("ernie4_5_moe", "Ernie4_5_MoeForCausalLM", moe_num_experts=4, moe_k=2, moe_num_shared_experts=1, moe_layer_start_index=1),
        _entry("glm4_moe", "Glm4MoeForCausalLM", head_dim=4, **groups),
        _entry("dots1", "Dots1ForCausalLM", head_dim=4, **groups),
        _entry("minimax", "MiniMaxForCausalLM", head_dim=4, block_size=4),
        _entry("hunyuan_moe", "HunYuanMoEV1ForCausalLM", head_dim=4, moe_topk=[2, 2]),
        _entry("flex_olmo", "FlexOlmoForCausalLM"),
        _entry("llama4", "Llama4ForCausalLM", head_dim=4, intermediate_size_mlp=24, attention_chunk_size=4, num_experts_per_tok=1, facts=DOUBLE),
        _entry("longcat_flash", "LongcatFlashForCausalLM", **latent, head_dim=4, num_layers=2, ffn_hidden_size=24, expert_ffn_hidden_size=12, zero_expert_num=2, moe_topk=2),
        _entry("switch_transformers", "SwitchTransformersForConditionalGeneration", translation, **encoder_decoder, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, router_jitter_noise=0.0, facts=DOUBLE),
        _entry("nllb_moe", "NllbMoeForConditionalGeneration", translation, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=24, decoder_ffn_dim=24, encoder_sparse_step=2, decoder_sparse_step=2, decoder_start_token_id=0, facts=DOUBLE),
    )  # fmt: skip
