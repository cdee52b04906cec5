"""Decoders: language models of many dense architectures."""

# ruff: noqa: E501 - a table, one model a line

from __future__ import annotations

from typing import Any

from zoo.entry import HEADS, SINGLE, TEXT, Entry, hugging_face, padded_text, text


def _entry(name: str, model: str, sample: Any = text, facts: dict[str, Any] | None = None, **config: Any) -> Entry:
    return hugging_face(name, model, sample, {**TEXT, **config}, family="decoder", **(facts or {}))


def _grouped(name: str, model: str, sample: Any = text, **config: Any) -> Entry:
    return _entry(name, model, sample, **{**HEADS, **config})


def decoders() -> tuple[Entry, ...]:
    windows = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
    return (
        _entry("gpt2", "GPT2LMHeadModel"),
        _entry("gpt2_padded", "GPT2LMHeadModel", padded_text),
        _entry("gpt_neo", "GPTNeoForCausalLM", num_layers=2, num_heads=4, window_size=4, attention_types=[[["global", "local"], 1]]),
        _entry("gpt_neox", "GPTNeoXForCausalLM"),
        _entry("gpt_neox_japanese", "GPTNeoXJapaneseForCausalLM", intermediate_multiple_size=2),
        _entry("gptj", "GPTJForCausalLM", rotary_dim=4),
        _entry("gpt_bigcode", "GPTBigCodeForCausalLM"),
        _entry("codegen", "CodeGenForCausalLM", rotary_dim=4),
        _entry("openai_gpt", "OpenAIGPTLMHeadModel"),
        _entry("opt", "OPTForCausalLM", ffn_dim=24, word_embed_proj_dim=16),
        _entry("bloom", "BloomForCausalLM"),
        _entry("mpt", "MptForCausalLM", d_model=16, n_heads=4, n_layers=2, max_seq_len=32, expansion_ratio=2),
        _entry("falcon", "FalconForCausalLM"),
        _entry("biogpt", "BioGptForCausalLM"),
        _entry("xglm", "XGLMForCausalLM", facts=SINGLE, d_model=16, num_layers=2, attention_heads=4, ffn_dim=24),
        _entry("ctrl", "CTRLLMHeadModel", n_embd=16, n_layer=2, n_head=4, dff=24, n_positions=32),
        _entry("xlnet", "XLNetLMHeadModel", max_position_embeddings=None, d_model=16, n_layer=2, n_head=4, d_inner=24),
        _entry("bert_generation", "BertGenerationDecoder", is_decoder=True),
        _entry("trocr", "TrOCRForCausalLM", d_model=16, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=24),
        _grouped("llama", "LlamaForCausalLM"),
        _grouped("llama_padded", "LlamaForCausalLM", padded_text),
        _grouped("llama_tied_eager", "LlamaForCausalLM", tie_word_embeddings=True, attn_implementation="eager"),
        _grouped("mistral", "MistralForCausalLM", sliding_window=4),
        _grouped("ministral", "MinistralForCausalLM", head_dim=4, **windows),
        _grouped("qwen2", "Qwen2ForCausalLM"),
        _grouped("qwen3", "Qwen3ForCausalLM", head_dim=4),
        _grouped("gemma", "GemmaForCausalLM", head_dim=4),
        _grouped("gemma2", "Gemma2ForCausalLM", head_dim=4, query_pre_attn_scalar=4, **windows),
        _grouped("gemma3", "Gemma3ForCausalLM", head_dim=4, query_pre_attn_scalar=4, **windows),
        _grouped("vaultgemma", "VaultGemmaForCausalLM", head_dim=4, query_pre_attn_scalar=4, **windows),
        _entry("phi", "PhiForCausalLM"),
        _grouped("phi3", "Phi3ForCausalLM"),
        _grouped("stablelm", "StableLmForCausalLM"),
        _grouped("starcoder2", "Starcoder2ForCausalLM"),
        _grouped("olmo", "OlmoForCausalLM"),
        _grouped("olmo2", "Olmo2ForCausalLM"),
        _grouped("olmo3", "Olmo3ForCausalLM", **windows),
        _grouped("cohere", "CohereForCausalLM"),
        _grouped("cohere2", "Cohere2ForCausalLM", **windows),
        _grouped("granite", "GraniteForCausalLM"),
        _entry("persimmon", "PersimmonForCausalLM"),
        _grouped("nemotron", "NemotronForCausalLM"),
        _grouped("glm", "GlmForCausalLM", head_dim=4),
        _grouped("glm4", "Glm4ForCausalLM", head_dim=4),
        _grouped("helium", "HeliumForCausalLM", head_dim=4),
        _grouped("smollm3", "SmolLM3ForCausalLM"),
        _grouped("ernie4_5", "Ernie4_5ForCausalLM", head_dim=4),
        _grouped("exaone4", "Exaone4ForCausalLM", **windows),
        _grouped("arcee", "ArceeForCausalLM"),
        _grouped("apertus", "ApertusForCausalLM"),
        _grouped("bitnet", "BitNetForCausalLM"),
        _grouped("diffllama", "DiffLlamaForCausalLM"),
        _grouped("doge", "DogeForCausalLM"),
        _entry("minicpm3", "MiniCPM3ForCausalLM", q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=4),
        _grouped("modernbert_decoder", "ModernBertDecoderForCausalLM"),
        _grouped("seed_oss", "SeedOssForCausalLM", head_dim=4),
        _grouped("nanochat", "NanoChatForCausalLM"),
        _grouped("hunyuan", "HunYuanDenseV1ForCausalLM", head_dim=4),
        _grouped("lfm2", "Lfm2ForCausalLM", layer_types=["conv", "full_attention"], block_multiple_of=8),
    )  # fmt: skip
