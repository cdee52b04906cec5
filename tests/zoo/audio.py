"""Audio and time series: convolutions over samples, alignments, predictions of distributions."""

# ruff: noqa: E501 - a table, one model a line

from __future__ import annotations

from typing import Any

import torch
from models import Draw, Inputs

from zoo.entry import CLASSES, SINGLE, TEXT, VOCABULARY, Entry, all_square, hugging_face

NORM = {"mixes": "batch norm"}


def _entry(name: str, model: str, sample: Any, facts: dict[str, Any] | None = None, **config: Any) -> Entry:
    return hugging_face(name, model, sample, config, family="audio", **(facts or {}))


def _spoken(draw: Draw) -> Inputs:
    """Sound and its transcription; the sound is as long as it takes for ``length`` frames."""
    return (), {"input_values": draw.floats(draw.length * 20), "labels": draw.ids(VOCABULARY, 3)}


def _named(draw: Draw) -> Inputs:
    return (), {"input_values": draw.floats(draw.length * 20), "labels": draw.ids(CLASSES)}


def _spectrogram(draw: Draw) -> Inputs:
    return (), {"input_values": draw.floats(24, 16), "labels": draw.ids(CLASSES)}


def _whisper(draw: Draw) -> Inputs:
    return (), {"input_features": draw.floats(16, 24), "labels": draw.ids(VOCABULARY, draw.length)}


def _features(draw: Draw) -> Inputs:
    return (), {"input_features": draw.floats(draw.length * 4, 16), "labels": draw.ids(VOCABULARY, draw.length)}


def _moonshine(draw: Draw) -> Inputs:
    return (), {"input_values": draw.floats(2000), "labels": draw.ids(VOCABULARY, draw.length)}


def _series(draw: Draw) -> Inputs:
    return (), {"past_values": draw.floats(16, 3), "future_values": draw.floats(4, 3)}


def _past(length: int, future: int) -> Any:
    def sample(draw: Draw) -> Inputs:
        observed = {
            "past_values": draw.floats(length),
            "past_time_features": draw.floats(length, 2),
            "past_observed_mask": torch.ones(draw.batch, length, dtype=torch.float64),
        }
        return (), {**observed, "future_values": draw.floats(future), "future_time_features": draw.floats(future, 2)}

    return sample


def _codec(draw: Draw) -> Inputs:
    return (), {"input_values": draw.floats(1, draw.length * 16)}


def audio() -> tuple[Entry, ...]:
    wave = {
        **TEXT, "conv_dim": [8, 8], "conv_stride": [5, 2], "conv_kernel": [10, 3], "num_conv_pos_embeddings": 4,
        "num_conv_pos_embedding_groups": 2, "num_feat_extract_layers": 2, "ctc_loss_reduction": "mean", "ctc_zero_infinity": True,
        "layerdrop": 0.0, "apply_spec_augment": False, "classifier_proj_size": 8, "num_labels": CLASSES,
    }  # fmt: skip
    bart = {
        **TEXT, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
        "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "decoder_start_token_id": 2,
    }  # fmt: skip
    series = {
        "d_model": 16,
        "num_attention_heads": 4,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 24,
        "decoder_ffn_dim": 24,
        "prediction_length": 4,
        "context_length": 8,
        "lags_sequence": [1, 2],
        "num_time_features": 2,
        "scaling": "std",
    }
    one = {"lengths": (8,)}
    outside = {"loss": all_square, "inside": False}
    return (
        _entry("wav2vec2", "Wav2Vec2ForCTC", _spoken, **wave),
        _entry("wav2vec2_classifier", "Wav2Vec2ForSequenceClassification", _named, **wave),
        _entry("wav2vec2_conformer", "Wav2Vec2ConformerForCTC", _spoken, NORM, **wave, conv_depthwise_kernel_size=3),
        _entry("hubert", "HubertForCTC", _spoken, **wave),
        _entry("wavlm", "WavLMForSequenceClassification", _named, **wave, num_buckets=8, max_bucket_distance=16),
        _entry("sew", "SEWForSequenceClassification", _named, **wave, squeeze_factor=2),
        _entry("sew_d", "SEWDForSequenceClassification", _named, **wave, squeeze_factor=2, position_buckets=8),
        _entry("unispeech", "UniSpeechForSequenceClassification", _named, **wave),
        _entry("unispeech_sat", "UniSpeechSatForSequenceClassification", _named, **wave),
        _entry("data2vec_audio", "Data2VecAudioForCTC", _spoken, **{**wave, "num_conv_pos_embeddings": 2, "conv_pos_kernel_size": 3}),
        _entry("wav2vec2_bert", "Wav2Vec2BertForSequenceClassification", lambda draw: ((), {"input_features": draw.floats(draw.length, 16), "labels": draw.ids(CLASSES)}), **wave, feature_projection_input_dim=16, conv_depthwise_kernel_size=3, left_max_position_embeddings=4, right_max_position_embeddings=2),
        _entry("audio_spectrogram", "ASTForAudioClassification", _spectrogram, one, **{**TEXT, "num_labels": CLASSES, "patch_size": 4, "frequency_stride": 4, "time_stride": 4, "max_length": 24, "num_mel_bins": 16}),
        _entry("whisper", "WhisperForConditionalGeneration", _whisper, **{**bart, "num_mel_bins": 16, "max_source_positions": 12, "max_target_positions": 32}),
        _entry("speech_to_text", "Speech2TextForConditionalGeneration", _features, **bart, input_feat_per_channel=16, input_channels=1, conv_channels=8, max_source_positions=64, max_target_positions=32),
        _entry("moonshine", "MoonshineForConditionalGeneration", _moonshine, **{**bart, "encoder_num_hidden_layers": 2, "decoder_num_hidden_layers": 2, "encoder_num_attention_heads": 4, "decoder_num_attention_heads": 4}),
        _entry("encodec", "EncodecModel", _codec, {**outside, **SINGLE}, sampling_rate=16, target_bandwidths=[0.05], num_filters=4, upsampling_ratios=[2, 2], hidden_size=8, codebook_size=8, codebook_dim=8, num_lstm_layers=1, normalize=False),
        _entry("patchtst", "PatchTSTForPrediction", _series, {**one, **NORM}, d_model=16, num_hidden_layers=2, num_attention_heads=4, ffn_dim=24, num_input_channels=3, context_length=16, patch_length=4, patch_stride=4, prediction_length=4, loss="mse"),
        _entry("patchtsmixer", "PatchTSMixerForPrediction", _series, {**one, **NORM}, d_model=8, num_layers=2, num_input_channels=3, context_length=16, patch_length=4, patch_stride=4, prediction_length=4, loss="mse", norm_mlp="LayerNorm"),
        _entry("time_series_transformer", "TimeSeriesTransformerForPrediction", _past(10, 4), {**one}, **series),
        _entry("informer", "InformerForPrediction", _past(10, 4), {**one}, **series, attention_type="full", distil=False),
        _entry("autoformer", "AutoformerForPrediction", _past(10, 4), {**one, **SINGLE}, **{**series, "label_length": 2, "moving_average": 3}),
    )  # fmt: skip
