"""speechbrain: the models of its lobes that need no other package, made small."""

# ruff: noqa: E501 - a table, one model a line

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from models import Draw, Inputs
from torch import Tensor, nn

from wild.entry import Wild, alternating, wild


def _lobe(path: str) -> Any:
    module, name = path.rsplit(".", 1)
    return getattr(import_module(f"speechbrain.lobes.models.{module}"), name)


def _frames(width: int, **rest: Any) -> Callable[[Draw], Inputs]:
    return lambda draw: ((draw.floats(draw.length, width),), rest)


def _with_lengths(width: int) -> Callable[[Draw], Inputs]:
    def sample(draw: Draw) -> Inputs:
        lengths = torch.ones(draw.batch, dtype=torch.float64)
        lengths[1::2] = 0.75
        return (draw.floats(draw.length, width), lengths), {}

    return sample


def _wave(draw: Draw) -> Inputs:
    return (draw.floats(draw.length * 20),), {}


class Transposed(nn.Module):
    """A block whose samples lie in the second dimension, between layers that have them in the first."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x.transpose(0, 1)).transpose(0, 1)


def entries() -> tuple[Wild, ...]:
    def lobe(
        path: str,
        sample: Callable[[Draw], Inputs],
        label: str = "",
        lengths: tuple[int, ...] = (8, 12),
        whole: str = "",
        **config: Any,
    ) -> Wild:
        name = label or path.split(".")[-1]
        return wild("speechbrain", name, lambda: made(path, config), sample, whole=whole, lengths=lengths)

    def made(path: str, config: dict[str, Any]) -> nn.Module:
        model = _lobe(path)(**config)
        for module in model.modules():
            if hasattr(module, "_get_gauss_noise"):  # a little noise, always: no model to compare with
                module._get_gauss_noise = lambda shape, device="cpu": torch.zeros(shape, device=device)
        return Transposed(model) if path == "dual_path.DPTNetBlock" else model

    long = {"lengths": (24, 32)}
    transformer = {
        "d_model": 16,
        "nhead": 2,
        "num_encoder_layers": 2,
        "num_decoder_layers": 1,
        "d_ffn": 24,
        "dropout": 0.0,
    }
    speech = lambda draw: ((draw.floats(draw.length, 16), draw.ids(12, 5)), {})  # noqa: E731
    tokens = lambda draw: ((draw.ids(12, draw.length),), {})  # noqa: E731
    return alternating([
        lobe("CRDNN.CRDNN", _frames(12), whole="its batch normalization reads both directions", **long, input_shape=[None, None, 12], cnn_blocks=1, cnn_channels=[4], inter_layer_pooling_size=[2], rnn_layers=1, rnn_neurons=8, dnn_blocks=1, dnn_neurons=8, dropout=0.0),
        lobe("CRDNN.CRDNN", _frames(12), "CRDNN (LSTM)", **long, input_shape=[None, None, 12], cnn_blocks=1, cnn_channels=[4], inter_layer_pooling_size=[2], rnn_class=_rnn("LSTM"), rnn_layers=1, rnn_neurons=8, dnn_blocks=1, dnn_neurons=8, dropout=0.0),
        lobe("ECAPA_TDNN.ECAPA_TDNN", _with_lengths(12), input_size=12, channels=[16, 16, 16, 16, 24], attention_channels=8, lin_neurons=8, se_channels=8, res2net_scale=4),
        lobe("ECAPA_TDNN.Classifier", lambda draw: ((draw.floats(1, 8),), {}), "ECAPA Classifier", lengths=(8,), input_size=8, lin_blocks=1, lin_neurons=8, out_neurons=5),
        lobe("ESPnetVGG.ESPnetVGG", _frames(12), **long, input_shape=[None, None, 12], cnn_channels=[4, 4], rnn_layers=1, rnn_neurons=8, projection_neurons=8, dropout=0.0),
        lobe("GatedNN.GatedNN", _frames(12), input_shape=[None, None, 12], blocks=2, neurons=8),
        lobe("MetricGAN.MetricDiscriminator", lambda draw: ((draw.floats(2, 24, 24),), {}), lengths=(8,), base_channels=4),
        lobe("RNNLM.RNNLM", tokens, output_neurons=12, embedding_dim=8, rnn_layers=1, rnn_neurons=8, dnn_blocks=1, dnn_neurons=8, dropout=0.0),
        lobe("ResNet.ResNet", _frames(16), "ResNet", lengths=(16, 24), input_size=16, channels=[4, 4, 8, 8], block_sizes=[1, 1, 1, 1], lin_neurons=8),
        lobe("VanillaNN.VanillaNN", _frames(12), input_shape=[None, None, 12], dnn_blocks=2, dnn_neurons=8),
        lobe("Xvector.Xvector", _with_lengths(12), lengths=(16, 24), in_channels=12, tdnn_blocks=2, tdnn_channels=[8, 8], tdnn_kernel_sizes=[3, 1], tdnn_dilations=[1, 1], lin_neurons=8),
        lobe("Xvector.Classifier", lambda draw: ((draw.floats(1, 8),), {}), "Xvector Classifier", lengths=(8,), input_shape=[None, None, 8], lin_blocks=1, lin_neurons=8, out_neurons=5),
        lobe("conv_tasnet.MaskNet", lambda draw: ((draw.floats(8, draw.length),), {}), N=8, B=8, H=8, P=3, X=2, R=1, C=2),
        lobe("convolution.ConvolutionFrontEnd", _frames(12), input_shape=[None, None, 12], num_blocks=2, num_layers_per_block=1, out_channels=[4, 4], kernel_sizes=[3, 3], strides=[1, 2], dilations=[1, 1], residuals=[True, True], dropout=0.0),
        lobe("convolution.ConvolutionalSpatialGatingUnit", _frames(12), input_size=12, kernel_size=3),
        lobe("dual_path.SepformerWrapper", _wave, encoder_kernel_size=4, encoder_out_nchannels=8, masknet_chunksize=8, masknet_numlayers=1, intra_numlayers=1, inter_numlayers=1, intra_nhead=2, inter_nhead=2, intra_dffn=8, inter_dffn=8),
        wild("speechbrain", "SBRNNBlock", lambda: nn.Sequential(*(_lobe("dual_path.SBRNNBlock")(input_size=size, hidden_channels=8, num_layers=1) for size in (8, 16, 16))), _frames(8)),
        lobe("dual_path.DPTNetBlock", _frames(8), "DPTNetBlock", d_model=8, nhead=2, dim_feedforward=8),
        lobe("wav2vec.W2VLatentExtractor", _wave, "W2VLatentExtractor", lengths=(16, 24), out_channels=[8, 8], kernel_sizes=[5, 3], strides=[3, 2]),
        *(lobe("transformer.TransformerASR.TransformerASR", speech, f"TransformerASR ({name})", tgt_vocab=12, input_size=16, **transformer, **extra) for name, extra in {
            "transformer": {}, "conformer": {"encoder_module": "conformer", "normalize_before": True, "attention_type": "RelPosMHAXL", "kernel_size": 3}, "branchformer": {"encoder_module": "branchformer", "attention_type": "RelPosMHAXL", "kernel_size": 3, "csgu_linear_units": 16},
            "RoPE": {"encoder_module": "conformer", "normalize_before": True, "attention_type": "RoPEMHA", "kernel_size": 3}, "causal": {"causal": True}, "hyper-mixing": {"encoder_module": "conformer", "normalize_before": True, "attention_type": "hypermixing", "kernel_size": 3, "causal": False}}.items()),
        lobe("transformer.TransformerLM.TransformerLM", tokens, vocab=12, d_model=16, nhead=2, num_encoder_layers=2, d_ffn=24, dropout=0.0),
        lobe("transformer.TransformerSE.CNNTransformerSE", _frames(16), d_model=16, output_size=9, nhead=2, num_layers=2, d_ffn=24, dropout=0.0),
        wild("speechbrain", "TransformerEncoder", lambda: _Encoder(), _frames(16)),
    ])  # fmt: skip


def _rnn(name: str) -> Any:
    return getattr(import_module("speechbrain.nnet.RNN"), name)


class _Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = _lobe("transformer.Transformer.TransformerEncoder")(num_layers=2, nhead=2, d_ffn=24, d_model=16)

    def forward(self, x: Tensor) -> Any:
        return self.encoder(x)
