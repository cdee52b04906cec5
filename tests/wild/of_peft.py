"""peft: every method of its registry around a tiny GPT-2, and some around a tiny T5 and a tiny BERT."""

from __future__ import annotations

from typing import Any

from models import Draw, Inputs
from torch import nn
from zoo.entry import VOCABULARY, quiet

from wild.entry import Wild, wild

LINEAR = ["c_attn", "c_proj", "c_fc"]
CAUSAL: dict[str, dict[str, Any]] = {
    "LoraConfig": {"r": 2, "target_modules": LINEAR, "fan_in_fan_out": True},
    "AdaLoraConfig": {"init_r": 3, "target_r": 2, "target_modules": LINEAR, "fan_in_fan_out": True, "total_step": 10},
    "IA3Config": {"target_modules": ["c_attn", "c_proj"], "feedforward_modules": ["c_proj"], "fan_in_fan_out": True},
    "PrefixTuningConfig": {"num_virtual_tokens": 3},
    "PromptTuningConfig": {"num_virtual_tokens": 3},
    "PromptEncoderConfig": {"num_virtual_tokens": 3, "encoder_hidden_size": 8},
    "LNTuningConfig": {"target_modules": ["ln_1", "ln_2"]},
}
ENCODER: dict[str, dict[str, Any]] = {
    "LoraConfig": {"r": 2, "target_modules": ["query", "value"]},
    "LoHaConfig": {"r": 2, "target_modules": ["query", "value"]},
    "LoKrConfig": {"r": 2, "target_modules": ["query", "value"]},
    "OFTConfig": {"oft_block_size": 4, "target_modules": ["query", "value"]},
    "BOFTConfig": {"boft_block_size": 4, "target_modules": ["query", "value"]},
    "VeraConfig": {"r": 2, "target_modules": ["query", "value"]},
    "FourierFTConfig": {"n_frequency": 8, "target_modules": ["query", "value"]},
    "HRAConfig": {"r": 2, "target_modules": ["query", "value"]},
    "VBLoRAConfig": {"r": 2, "num_vectors": 8, "vector_length": 4, "topk": 2, "target_modules": ["query", "value"]},
    "MissConfig": {"r": 2, "target_modules": ["query", "value"]},
    "RandLoraConfig": {"r": 2, "target_modules": ["query", "value"]},
    "ShiraConfig": {"r": 2, "target_modules": ["query", "value"]},
    "C3AConfig": {"block_size": 4, "target_modules": ["query", "value"]},
    "RoadConfig": {"group_size": 8, "target_modules": ["query", "value"]},
    "DeloraConfig": {"r": 2, "target_modules": ["query", "value"]},
    "WaveFTConfig": {"n_frequency": 8, "target_modules": ["query", "value"]},
    "GraloraConfig": {"r": 4, "gralora_k": 2, "target_modules": ["query", "value"]},
}
PAIRS: dict[str, dict[str, Any]] = {
    "LoraConfig": {"r": 2, "target_modules": ["q", "v"]},
    "IA3Config": {"target_modules": ["k", "v", "wo"], "feedforward_modules": ["wo"]},
    "PrefixTuningConfig": {"num_virtual_tokens": 3},
}


def entries() -> tuple[Wild, ...]:
    dora = {"LoraConfig (DoRA)": {**CAUSAL["LoraConfig"], "use_dora": True}}
    return (
        *(_entry("GPT-2", name, _gpt2, "CAUSAL_LM", given, _text) for name, given in {**CAUSAL, **dora}.items()),
        *(_entry("BERT", name, _bert, None, given, _text) for name, given in ENCODER.items()),
        *(_entry("T5", name, _t5, "SEQ_2_SEQ_LM", given, _translation) for name, given in PAIRS.items()),
    )


def _entry(base: str, name: str, make: Any, task: str | None, given: dict[str, Any], sample: Any) -> Wild:
    def made() -> nn.Module:
        import peft

        config = getattr(peft, name.split(" ")[0])(task_type=task, **given)
        return peft.get_peft_model(make(), config)  # type: ignore[no-any-return]

    label = name.replace("Config", "")
    return wild("peft", f"{label} on {base}", made, sample, loss=lambda output: output.loss)


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=VOCABULARY, n_positions=32, n_embd=16, n_layer=2, n_head=2)
    return GPT2LMHeadModel(quiet(config))


def _bert() -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return BertForMaskedLM(quiet(BertConfig(vocab_size=VOCABULARY, max_position_embeddings=32, **sizes)))


def _t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_heads": 2, "num_layers": 2}
    config = T5Config(vocab_size=VOCABULARY, dropout_rate=0.0, decoder_start_token_id=0, **sizes)
    return T5ForConditionalGeneration(quiet(config))


def _text(draw: Draw) -> Inputs:
    ids = draw.ids(VOCABULARY, draw.length)
    return (), {"input_ids": ids, "labels": ids}


def _translation(draw: Draw) -> Inputs:
    return (), {"input_ids": draw.ids(VOCABULARY, draw.length), "labels": draw.ids(VOCABULARY, 6)}
