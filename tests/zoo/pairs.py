"""Multi-modal models: pictures and text meet in a loss, in attention, or in one sequence."""

# ruff: noqa: E501 - a table, one model a line

from __future__ import annotations

from typing import Any

import torch
from models import Draw, Inputs
from torch import nn

from zoo.entry import CLASSES, HEADS, SINGLE, TEXT, VOCABULARY, Entry, all_square, hugging_face, quiet
from zoo.vision import VIT

WORDS = {**TEXT, "eos_token_id": VOCABULARY - 1, "projection_dim": 16}


def _pair(draw: Draw, size: int = 16) -> Inputs:
    return (), {"input_ids": draw.ids(VOCABULARY - 1, draw.length), "pixel_values": draw.floats(3, size, size)}


def _pair_with_loss(draw: Draw) -> Inputs:
    return (), {**_pair(draw)[1], "return_loss": True}


def _captioned(draw: Draw) -> Inputs:
    kwargs = _pair(draw)[1]
    return (), {**kwargs, "labels": kwargs["input_ids"]}


def _prompt(tokens: int, token: int) -> Any:
    """Text that begins with the places of the picture's features."""

    def sample(draw: Draw) -> Inputs:
        places = torch.full((draw.batch, tokens), token)
        ids = torch.cat([places, draw.ids(token, draw.length)], dim=1)
        labels = torch.where(ids == token, -100, ids)
        return (), {"input_ids": ids, "pixel_values": draw.floats(3, 16, 16), "labels": labels}

    return sample


def _question(draw: Draw) -> Inputs:
    kwargs = {**_pair(draw)[1], "pixel_mask": torch.ones(draw.batch, 16, 16, dtype=torch.long)}
    return (), {**kwargs, "labels": torch.softmax(draw.floats(CLASSES), dim=-1)}


def _regions(draw: Draw) -> Inputs:
    return (), {
        "input_ids": draw.ids(VOCABULARY, draw.length),
        "visual_embeds": draw.floats(5, 12),
        "labels": draw.ids(CLASSES),
    }


def _objects(draw: Draw) -> Inputs:
    boxes = torch.sigmoid(draw.floats(5, 4))
    return (), {
        "input_ids": draw.ids(VOCABULARY, draw.length),
        "visual_feats": draw.floats(5, 12),
        "visual_pos": boxes,
        "labels": draw.ids(CLASSES),
    }


def _page(draw: Draw) -> Inputs:
    low = draw.ids(10, draw.length, 2)
    kwargs = {**_pair(draw)[1], "bbox": torch.cat([low, low + 5], dim=-1)}
    return (), {**kwargs, "labels": draw.ids(CLASSES, draw.length)}


def _towers() -> nn.Module:
    from transformers import BertConfig, VisionTextDualEncoderConfig, VisionTextDualEncoderModel, ViTConfig

    config = VisionTextDualEncoderConfig.from_vision_text_configs(
        ViTConfig(**VIT), BertConfig(**TEXT), projection_dim=16
    )
    return VisionTextDualEncoderModel(quiet(config))


def _captioner() -> nn.Module:
    from transformers import GPT2Config, VisionEncoderDecoderConfig, VisionEncoderDecoderModel, ViTConfig

    text = GPT2Config(**TEXT, is_decoder=True, add_cross_attention=True)
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(ViTConfig(**VIT), text)
    config.decoder_start_token_id = config.pad_token_id = 0
    return VisionEncoderDecoderModel(quiet(config))


def _caption(draw: Draw) -> Inputs:
    return (), {"pixel_values": draw.floats(3, 16, 16), "labels": draw.ids(VOCABULARY, draw.length)}


def _entry(name: str, model: str, sample: Any, facts: dict[str, Any] | None = None, **config: Any) -> Entry:
    return hugging_face(name, model, sample, config, family="multi-modal", **(facts or {}))


def pairs() -> tuple[Entry, ...]:
    two = {"text_config": WORDS, "vision_config": {**VIT, "projection_dim": 16}, "projection_dim": 16}
    llama = {**TEXT, **HEADS, "model_type": "llama"}
    clip = {**VIT, "model_type": "clip_vision_model"}
    siglip = {**VIT, "model_type": "siglip_vision_model"}
    flat = {**TEXT, **VIT}
    place = VOCABULARY - 1
    outside = {"loss": all_square, "inside": False}
    return (
        _entry("clip", "CLIPModel", _pair_with_loss, **two),
        _entry("clip_outputs", "CLIPTextModelWithProjection", lambda draw: ((), {"input_ids": _pair(draw)[1]["input_ids"]}), outside, **WORDS),
        _entry("siglip", "SiglipModel", _pair_with_loss, **two),
        _entry("blip", "BlipModel", _pair_with_loss, **two),
        _entry("blip_caption", "BlipForConditionalGeneration", _captioned, **{**two, "text_config": {**WORDS, "encoder_hidden_size": 16, "label_smoothing": 0.0}}),
        _entry("altclip", "AltCLIPModel", _pair_with_loss, **{**two, "text_config": {**WORDS, "max_position_embeddings": 34, "project_dim": 16}}),
        _entry("chinese_clip", "ChineseCLIPModel", _pair_with_loss, **two),
        _entry("owlvit", "OwlViTModel", _pair_with_loss, **two),
        _entry("clipseg", "CLIPSegForImageSegmentation", lambda draw: ((), {**_pair(draw)[1], "labels": draw.floats(16, 16).sigmoid()}), **two, reduce_dim=8, extract_layers=[0, 1], decoder_num_attention_heads=2, decoder_intermediate_size=16),
        _entry("flava", "FlavaModel", _pair, outside, text_config=WORDS, image_config=VIT, multimodal_config={k: v for k, v in TEXT.items() if k != "vocab_size"}, projection_dim=16, hidden_size=16),
        _entry("bridgetower", "BridgeTowerForImageAndTextRetrieval", lambda draw: ((), {**_pair(draw)[1], "labels": draw.ids(4) - 2}), hidden_size=16, num_hidden_layers=2, num_attention_heads=4, text_config={**WORDS, "max_position_embeddings": 34}, vision_config={**VIT, "hidden_size": 64}),
        _entry("vilt", "ViltForQuestionAnswering", _question, **{**flat, "max_image_length": -1}),
        _entry("visual_bert", "VisualBertForVisualReasoning", _regions, **TEXT, visual_embedding_dim=12, num_labels=CLASSES),
        _entry("lxmert", "LxmertForQuestionAnswering", _objects, **{**TEXT, "num_hidden_layers": None}, l_layers=2, x_layers=1, r_layers=1, visual_feat_dim=12, num_qa_labels=CLASSES),
        _entry("git", "GitForCausalLM", _captioned, **TEXT, vision_config=VIT),
        Entry("dual_encoder", _towers, _pair_with_loss, family="multi-modal"),
        Entry("captioner", _captioner, _caption, family="multi-modal"),
        _entry("layoutlmv3", "LayoutLMv3ForTokenClassification", _page, **{**flat, "input_size": 16, "max_2d_position_embeddings": 32, "coordinate_size": 2, "shape_size": 4, "max_position_embeddings": 34}),
        _entry("llava", "LlavaForConditionalGeneration", _prompt(16, place), vision_config=clip, text_config=llama, image_token_id=place, image_token_index=place, vision_feature_layer=-1),
        _entry("paligemma", "PaliGemmaForConditionalGeneration", _prompt(16, place), vision_config=siglip, text_config={**TEXT, **HEADS, "model_type": "gemma", "head_dim": 4}, image_token_index=place, image_token_id=place, projection_dim=16, hidden_size=16),
        _entry("kosmos2", "Kosmos2ForConditionalGeneration", _kosmos, SINGLE, text_config={"vocab_size": VOCABULARY, "max_position_embeddings": 64, "embed_dim": 16, "layers": 2, "ffn_dim": 24, "attention_heads": 4}, vision_config=VIT, latent_query_num=4),
        _entry("idefics3", "Idefics3ForConditionalGeneration", _idefics, vision_config=VIT, text_config=llama, image_token_id=place, scale_factor=2),
        _entry("blip_2", "Blip2ForConditionalGeneration", _prompt(4, place), vision_config=VIT, qformer_config={**TEXT, "encoder_hidden_size": 16}, text_config={**TEXT, "model_type": "opt", "ffn_dim": 24, "word_embed_proj_dim": 16}, num_query_tokens=4, image_token_index=place),
    )  # fmt: skip


def _kosmos(draw: Draw) -> Inputs:
    kwargs = _captioned(draw)[1]
    places = torch.arange(draw.length) < 4
    return (), {**kwargs, "image_embeds_position_mask": places.expand(draw.batch, draw.length)}


def _idefics(draw: Draw) -> Inputs:
    """One picture a sample, of which four features stay after pixel shuffle."""
    args, kwargs = _prompt(4, VOCABULARY - 1)(draw)
    return args, {**kwargs, "pixel_values": kwargs["pixel_values"].unsqueeze(1)}
