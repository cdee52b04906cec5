"""torchaudio: every model of ``torchaudio.models``, made small."""

# ruff: noqa: E501 - a table, one model a line

from __future__ import annotations

from typing import Any

import torch
from models import Draw, Inputs
from torch import Tensor, nn

from wild.entry import Wild, alternating, wild

WAVE = {
    "extractor_mode": "group_norm", "extractor_conv_layer_config": [(8, 10, 5), (8, 3, 2)], "extractor_conv_bias": False, "encoder_embed_dim": 16,
    "encoder_projection_dropout": 0.0, "encoder_pos_conv_kernel": 4, "encoder_pos_conv_groups": 2, "encoder_num_layers": 2, "encoder_num_heads": 2,
    "encoder_attention_dropout": 0.0, "encoder_ff_interm_features": 24, "encoder_ff_interm_dropout": 0.0, "encoder_dropout": 0.0,
    "encoder_layer_norm_first": False, "encoder_layer_drop": 0.0,
}  # fmt: skip
RNNT = {
    "input_dim": 8, "encoding_dim": 16, "num_symbols": 12, "segment_length": 4, "right_context_length": 1, "time_reduction_input_dim": 4, "time_reduction_stride": 2,
    "transformer_num_heads": 2, "transformer_ffn_dim": 16, "transformer_num_layers": 1, "transformer_dropout": 0.0, "transformer_activation": "gelu",
    "transformer_left_context_length": 4, "transformer_max_memory_size": 0, "transformer_weight_init_scale_strategy": "depthwise", "transformer_tanh_on_mem": True,
    "symbol_embedding_dim": 8, "num_lstm_layers": 1, "lstm_layer_norm": True, "lstm_layer_norm_epsilon": 1e-3, "lstm_dropout": 0.0,
}  # fmt: skip


def _sound(draw: Draw) -> Inputs:
    return (draw.floats(draw.length * 20),), {}


def _lengths(draw: Draw, longest: int) -> Tensor:
    lengths = torch.full((draw.batch,), longest)
    lengths[1::2] -= 2  # so that each microbatch has a longest row
    return lengths


def _frames(draw: Draw) -> Inputs:
    return (draw.floats(draw.length, 16), _lengths(draw, draw.length)), {}


def _transduced(draw: Draw) -> Inputs:
    return (draw.floats(9, 8), _lengths(draw, 8), draw.ids(12, 5).int(), _lengths(draw, 5)), {}


def entries() -> tuple[Wild, ...]:
    import torchaudio.models as audio

    def model(kind: str, sample: Any, label: str = "", lengths: tuple[int, ...] = (8, 12), **config: Any) -> Wild:
        return wild("torchaudio", label or kind, lambda: getattr(audio, kind)(**config), sample, lengths=lengths)

    mono = lambda draw: ((draw.floats(1, draw.length * 20),), {})  # noqa: E731
    return alternating([
        model("Conformer", _frames, input_dim=16, num_heads=2, ffn_dim=24, num_layers=2, depthwise_conv_kernel_size=3),
        model("Conformer", _frames, "Conformer (group norm)", input_dim=16, num_heads=2, ffn_dim=24, num_layers=2, depthwise_conv_kernel_size=3, use_group_norm=True, convolution_first=True),
        model("ConvTasNet", mono, num_sources=2, enc_kernel_size=16, enc_num_feats=8, msk_num_feats=8, msk_num_hidden_feats=8, msk_num_layers=2, msk_num_stacks=1),
        model("DeepSpeech", lambda draw: ((draw.floats(1, draw.length, 16),), {}), n_feature=16, n_hidden=16, n_class=8),
        model("Emformer", _emformer, lengths=(8,), input_dim=16, num_heads=2, ffn_dim=24, num_layers=2, segment_length=4, right_context_length=1, left_context_length=4),
        model("Emformer", _emformer, "Emformer (memory)", lengths=(8,), input_dim=16, num_heads=2, ffn_dim=24, num_layers=2, segment_length=4, right_context_length=1, left_context_length=4, max_memory_size=2),
        model("emformer_rnnt_model", _transduced, lengths=(8,), **RNNT),
        model("HDemucs", lambda draw: ((draw.floats(1, 4096),), {}), lengths=(8,), sources=["a", "b"], audio_channels=1, channels=4, nfft=256, depth=4, dconv_depth=1),
        model("squim_objective_model", lambda draw: ((draw.floats(200),), {}), lengths=(8,), feat_dim=8, win_len=16, d_model=8, nhead=2, hidden_dim=8, num_blocks=2, rnn_type="LSTM", chunk_size=4),
        wild("torchaudio", "squim_subjective_model", lambda: _subjective(audio), lambda draw: ((draw.floats(200), draw.floats(200)), {}), lengths=(8,)),
        model("wav2vec2_model", _sound, **WAVE, aux_num_out=8),
        model("wav2vec2_model", lambda draw: ((draw.floats(160), torch.arange(160, 160 - 4 * draw.batch, -4)), {}), "wav2vec2_model (lengths)", lengths=(8,), **{**WAVE, "extractor_mode": "layer_norm", "encoder_layer_norm_first": True}, aux_num_out=8),
        model("wavlm_model", _sound, **WAVE, encoder_num_buckets=8, encoder_max_distance=16, aux_num_out=8),
        model("WaveRNN", lambda draw: ((draw.floats(1, 24), draw.floats(1, 16, 10)), {}), lengths=(8,), upsample_scales=[2, 2], n_classes=8, hop_length=4, n_res_block=1, n_rnn=8, n_fc=8, kernel_size=5, n_freq=16, n_hidden=8, n_output=8),
    ])  # fmt: skip


def _emformer(draw: Draw) -> Inputs:
    return (draw.floats(draw.length + 1, 16), _lengths(draw, draw.length)), {}


def _subjective(audio: Any) -> nn.Module:
    ssl = audio.wav2vec2_model(**WAVE, aux_num_out=None)
    projector, predictor = nn.Linear(16, 4), audio.squim.subjective.Predictor(8, 5)
    model: nn.Module = audio.SquimSubjective(ssl, projector, predictor)
    return model
