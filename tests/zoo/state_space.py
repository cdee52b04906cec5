"""State-space, recurrent and hybrid models: scans over time, many of them loops in Python."""

# ruff: noqa: E501 - a table, one model a line

from __future__ import annotations

from typing import Any

from zoo.entry import HEADS, SINGLE, TEXT, Entry, hugging_face, text


def _entry(name: str, model: str, facts: dict[str, Any] | None = None, **config: Any) -> Entry:
    return hugging_face(name, model, text, {**TEXT, **config}, family="state space", **(facts or {}))


def state_space() -> tuple[Entry, ...]:
    scan = {"state_size": 4, "conv_kernel": 3, "time_step_rank": 2, "expand": 2}
    heads = {
        "mamba_d_state": 4,
        "mamba_d_conv": 3,
        "mamba_expand": 2,
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "mamba_n_groups": 1,
        "mamba_chunk_size": 4,
        "mamba_dt_rank": 2,
    }
    linear = {
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 4,
        "linear_value_head_dim": 4,
        "linear_conv_kernel_dim": 3,
        "head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"],
    }
    few = {
        "num_experts": 4,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 12,
        "shared_expert_intermediate_size": 12,
    }
    return (
        _entry("mamba", "MambaForCausalLM", **scan),
        _entry("falcon_mamba", "FalconMambaForCausalLM", **scan),
        _entry("mamba2", "Mamba2ForCausalLM", state_size=4, conv_kernel=3, expand=2, num_heads=4, head_dim=8, n_groups=1, chunk_size=4),
        _entry("rwkv", "RwkvForCausalLM", attention_hidden_size=16, context_length=32),
        _entry("recurrent_gemma", "RecurrentGemmaForCausalLM", **HEADS, lru_width=16, attention_window_size=4, conv1d_width=3, block_types=["recurrent", "attention"]),
        _entry("jamba", "JambaForCausalLM", SINGLE, **HEADS, **heads, **few, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1, use_mamba_kernels=False),
        _entry("bamba", "BambaForCausalLM", **HEADS, **heads, attn_layer_indices=[1]),
        _entry("zamba2", "Zamba2ForCausalLM", **heads, mamba_ngroups=1, n_mamba_heads=4, num_mem_blocks=1, layers_block_type=["mamba", "hybrid"], chunk_size=4, use_mem_rope=True, adapter_rank=4),
        _entry("falcon_h1", "FalconH1ForCausalLM", **HEADS, **heads, mamba_d_ssm=32, head_dim=4),
        _entry("nemotron_h", "NemotronHForCausalLM", SINGLE, **HEADS, **few, layers_block_type=["mamba", "attention", "moe"], num_hidden_layers=3, ssm_state_size=4, mamba_num_heads=4, mamba_head_dim=8, n_groups=1, chunk_size=4, conv_kernel=3, head_dim=4, n_routed_experts=4, moe_shared_expert_intermediate_size=12),
        _entry("granitemoehybrid", "GraniteMoeHybridForCausalLM", SINGLE, **HEADS, **heads, **few, shared_intermediate_size=12, layer_types=["mamba", "attention"]),
        _entry("qwen3_next", "Qwen3NextForCausalLM", SINGLE, **HEADS, **linear, **few),
        _entry("qwen3_5", "Qwen3_5ForCausalLM", **HEADS, **linear),
        _entry("xlstm", "xLSTMForCausalLM", num_heads=2, num_blocks=2, chunk_size=4, embedding_dim=16, mode="train"),
    )  # fmt: skip
