"""Encoder-decoders: the encoder's last value is read by every layer of the decoder."""

# ruff: noqa: E501 - a table, one model a line

from __future__ import annotations

from typing import Any

from models import Draw, Inputs
from torch import nn

from zoo.entry import SINGLE, TEXT, VOCABULARY, Entry, hugging_face, quiet, text, translation


def _entry(
    name: str, model: str, sample: Any = translation, facts: dict[str, Any] | None = None, **config: Any
) -> Entry:
    return hugging_face(name, model, sample, {**TEXT, **config}, family="encoder-decoder", **(facts or {}))


def _masked(draw: Draw) -> Inputs:
    return (), {**translation(draw)[1], "attention_mask": draw.mask()}


def _bert_to_bert() -> nn.Module:
    from transformers import BertConfig, EncoderDecoderConfig, EncoderDecoderModel

    parts = BertConfig(**TEXT), BertConfig(**TEXT, is_decoder=True, add_cross_attention=True)
    config = EncoderDecoderConfig.from_encoder_decoder_configs(*parts)
    config.decoder_start_token_id = config.pad_token_id = 0
    return EncoderDecoderModel(quiet(config))


def translators() -> tuple[Entry, ...]:
    t5 = {
        "d_model": 16,
        "d_kv": 4,
        "d_ff": 24,
        "num_heads": 4,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "decoder_start_token_id": 0,
    }
    bart = {
        "d_model": 16,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 24,
        "decoder_ffn_dim": 24,
        "decoder_start_token_id": 0,
    }
    sides = {
        side: {
            **TEXT,
            "bos_token_id": 2,
            "num_key_value_heads": 2,
            "head_dim": 4,
            "query_pre_attn_scalar": 4,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention"],
        }
        for side in ("encoder", "decoder")
    }
    sides["decoder"] = {**sides["decoder"], "is_decoder": True, "cross_attention_hidden_size": 16}
    return (
        _entry("t5", "T5ForConditionalGeneration", **t5),
        _entry("t5_masked", "T5ForConditionalGeneration", _masked, **t5),
        _entry("mt5", "MT5ForConditionalGeneration", **t5),
        _entry("umt5", "UMT5ForConditionalGeneration", **t5),
        _entry("longt5", "LongT5ForConditionalGeneration", **t5, local_radius=3),
        _entry("longt5_global", "LongT5ForConditionalGeneration", **t5, local_radius=3, encoder_attention_type="transient-global", global_block_size=2),
        _entry("t5gemma", "T5GemmaForConditionalGeneration", **sides, vocab_size=VOCABULARY, bos_token_id=2, decoder_start_token_id=2),
        _entry("bart", "BartForConditionalGeneration", _masked, **bart),
        _entry("mbart", "MBartForConditionalGeneration", **bart),
        _entry("mvp", "MvpForConditionalGeneration", **bart),
        _entry("plbart", "PLBartForConditionalGeneration", **bart),
        _entry("marian", "MarianMTModel", **bart),
        _entry("pegasus", "PegasusForConditionalGeneration", **bart),
        _entry("pegasus_x", "PegasusXForConditionalGeneration", **bart, block_size=4, num_global_tokens=2),
        _entry("bigbird_pegasus", "BigBirdPegasusForConditionalGeneration", **bart, attention_type="original_full"),
        _entry("blenderbot", "BlenderbotForConditionalGeneration", **bart),
        _entry("blenderbot_small", "BlenderbotSmallForConditionalGeneration", **bart),
        _entry("m2m_100", "M2M100ForConditionalGeneration", **bart),
        _entry("led", "LEDForConditionalGeneration", **bart, attention_window=4, max_encoder_position_embeddings=32, max_decoder_position_embeddings=32),
        _entry("fsmt", "FSMTForConditionalGeneration", text, facts=SINGLE, **bart, src_vocab_size=VOCABULARY, tgt_vocab_size=VOCABULARY),
        _entry("prophetnet", "ProphetNetForConditionalGeneration", num_hidden_layers=None, intermediate_size=None, num_attention_heads=None, encoder_ffn_dim=24, decoder_ffn_dim=24, num_encoder_layers=2, num_decoder_layers=2, num_encoder_attention_heads=4, num_decoder_attention_heads=4, decoder_start_token_id=0),
        Entry("bert_to_bert", _bert_to_bert, translation, family="encoder-decoder"),
    )  # fmt: skip
