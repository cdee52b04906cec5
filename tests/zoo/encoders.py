"""Encoders: masked language models and classifiers."""

# ruff: noqa: E501 - a table, one model a line

from __future__ import annotations

from typing import Any

import torch
from models import Draw, Inputs

from zoo.entry import CLASSES, HEADS, SINGLE, TEXT, VOCABULARY, Entry, classified_text, hugging_face, padded_text, text


def _entry(name: str, model: str, sample: Any = text, facts: dict[str, Any] | None = None, **config: Any) -> Entry:
    return hugging_face(name, model, sample, {**TEXT, **config}, family="encoder", **(facts or {}))


def _boxed(draw: Draw) -> Inputs:
    """Text with a box on the page for each word."""
    low = draw.ids(10, draw.length, 2)
    return (), {**text(draw)[1], "bbox": torch.cat([low, low + 5], dim=-1)}


def _boxed_tags(draw: Draw) -> Inputs:
    return (), {**_boxed(draw)[1], "labels": draw.ids(CLASSES, draw.length)}


def _characters(draw: Draw) -> Inputs:
    return (), {"input_ids": draw.ids(1000, draw.length), "labels": draw.ids(CLASSES)}


def _answers(draw: Draw) -> Inputs:
    return (), {
        "input_ids": draw.ids(VOCABULARY, draw.length),
        "start_positions": draw.ids(5),
        "end_positions": draw.ids(5),
    }


def encoders() -> tuple[Entry, ...]:
    page = {"max_2d_position_embeddings": 32, "num_labels": CLASSES}
    classes = {"num_labels": CLASSES, "problem_type": "single_label_classification"}
    two = {"n_layers": 2, "n_heads": 4, "dim": 16, "hidden_dim": 24}
    return (
        _entry("bert", "BertForMaskedLM", padded_text),
        _entry("bert_classifier", "BertForSequenceClassification", classified_text, num_labels=CLASSES),
        _entry("bert_answers", "BertForQuestionAnswering", _answers),
        _entry("roberta", "RobertaForMaskedLM", max_position_embeddings=34),
        _entry("roberta_prelayernorm", "RobertaPreLayerNormForMaskedLM", max_position_embeddings=34),
        _entry("xlm_roberta", "XLMRobertaForMaskedLM", padded_text, max_position_embeddings=34),
        _entry("xlm_roberta_xl", "XLMRobertaXLForMaskedLM", max_position_embeddings=34),
        _entry("camembert", "CamembertForMaskedLM", max_position_embeddings=34),
        _entry("distilbert", "DistilBertForMaskedLM", **two),
        _entry("albert", "AlbertForMaskedLM", embedding_size=8),
        _entry("electra", "ElectraForMaskedLM", embedding_size=8),
        _entry("deberta", "DebertaForMaskedLM", relative_attention=True, pos_att_type=["c2p", "p2c"]),
        _entry("deberta_v2", "DebertaV2ForMaskedLM", relative_attention=True, pos_att_type=["c2p", "p2c"], position_buckets=8),
        _entry("mpnet", "MPNetForMaskedLM", max_position_embeddings=34),
        _entry("mobilebert", "MobileBertForMaskedLM", embedding_size=16, intra_bottleneck_size=16, true_hidden_size=16),
        _entry("squeezebert", "SqueezeBertForMaskedLM", embedding_size=16, q_groups=2, k_groups=2, v_groups=2, post_attention_groups=1, intermediate_groups=2, output_groups=2),
        _entry("funnel", "FunnelForMaskedLM", num_hidden_layers=None, d_model=16, d_head=4, n_head=4, d_inner=24, block_sizes=[1, 1], num_decoder_layers=1),
        _entry("roformer", "RoFormerForMaskedLM"),
        _entry("rembert", "RemBertForMaskedLM", input_embedding_size=8, output_embedding_size=8),
        _entry("nystromformer", "NystromformerForMaskedLM", num_landmarks=8, segment_means_seq_len=8, facts={"lengths": (8,)}),
        _entry("fnet", "FNetForMaskedLM"),
        _entry("convbert", "ConvBertForMaskedLM", embedding_size=16, head_ratio=2, conv_kernel_size=3),
        _entry("ernie", "ErnieForMaskedLM"),
        _entry("esm", "EsmForMaskedLM", mask_token_id=2, token_dropout=False, max_position_embeddings=34),
        _entry("ibert", "IBertForMaskedLM", facts={"mixes": "modules kept whole keep the extremes of each microbatch"}, max_position_embeddings=34),
        _entry("lilt", "LiltForTokenClassification", _boxed_tags, **page, channel_shrink_ratio=2, hidden_size=24, max_position_embeddings=34),
        _entry("layoutlm", "LayoutLMForMaskedLM", _boxed, **page),
        _entry("longformer", "LongformerForMaskedLM", attention_window=4, max_position_embeddings=34),
        _entry("big_bird", "BigBirdForMaskedLM", attention_type="original_full"),
        _entry("big_bird_sparse", "BigBirdForMaskedLM", attention_type="block_sparse", block_size=2, num_random_blocks=1, max_position_embeddings=64, facts={"lengths": (16, 24)}),
        _entry("canine", "CanineForSequenceClassification", _characters, **classes, num_hash_buckets=50, local_transformer_stride=8, max_position_embeddings=64, facts={"lengths": (16, 24), **SINGLE}),
        _entry("megatron_bert", "MegatronBertForMaskedLM"),
        _entry("modernbert", "ModernBertForMaskedLM", padded_text, local_attention=4, cls_token_id=0, sep_token_id=1),
        _entry("eurobert", "EuroBertForMaskedLM", **HEADS),
        _entry("xlm", "XLMWithLMHeadModel", emb_dim=16, n_layers=2, n_heads=4),
        _entry("flaubert", "FlaubertWithLMHeadModel", emb_dim=16, n_layers=2, n_heads=4),
        _entry("yoso", "YosoForMaskedLM", use_expectation=True),
        _entry("mra", "MraForMaskedLM", facts=SINGLE),
        _entry("xmod", "XmodForMaskedLM", default_language="en_XX", languages=["en_XX", "de_DE"], max_position_embeddings=34),
        _entry("nomic_bert", "NomicBertForMaskedLM"),
        _entry("reformer", "ReformerForMaskedLM", is_decoder=False, attention_head_size=4, attn_layers=["local", "local"], local_attn_chunk_length=4, axial_pos_embds=False, feed_forward_size=24),
        _entry("perceiver", "PerceiverForMaskedLM", facts={"lengths": (12,)}, max_position_embeddings=12, num_latents=6, d_latents=16, d_model=16, num_blocks=1, num_self_attends_per_block=2, num_self_attention_heads=4, num_cross_attention_heads=4, qk_channels=16, v_channels=16),
    )  # fmt: skip
