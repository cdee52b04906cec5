"""neuralforecast: every model of ``neuralforecast.models``, as the module that its trainer trains."""

from __future__ import annotations

from typing import Any

import torch
from models import Draw, Inputs

from wild.entry import Wild, alternating, wild

H, PAST, SERIES = 4, 16, 3
SMALL: dict[str, dict[str, Any]] = {
    "RNN": {"encoder_hidden_size": 8, "decoder_hidden_size": 8},
    "GRU": {"encoder_hidden_size": 8, "decoder_hidden_size": 8},
    "LSTM": {"encoder_hidden_size": 8, "decoder_hidden_size": 8},
    "TCN": {"encoder_hidden_size": 8, "decoder_hidden_size": 8},
    "DilatedRNN": {"encoder_hidden_size": 8, "decoder_hidden_size": 8, "dilations": [[1, 2]]},
    "DeepAR": {"lstm_hidden_size": 8, "decoder_hidden_layers": 1, "decoder_hidden_size": 8},
    "MLP": {"hidden_size": 16},
    "NHITS": {"mlp_units": [[16, 16]] * 3},
    "NBEATS": {"mlp_units": [[16, 16]] * 3},
    "NBEATSx": {"mlp_units": [[16, 16]] * 3},
    "DLinear": {"moving_avg_window": 5},
    "NLinear": {},
    "TFT": {"hidden_size": 8, "n_head": 2},
    "VanillaTransformer": {"hidden_size": 8, "n_head": 2, "conv_hidden_size": 8},
    "Autoformer": {"hidden_size": 8, "n_head": 2, "conv_hidden_size": 8, "MovingAvg_window": 3},
    "PatchTST": {"hidden_size": 8, "n_heads": 2, "linear_hidden_size": 8, "patch_len": 4, "stride": 2},
    "FEDformer": {"hidden_size": 8, "n_head": 8, "conv_hidden_size": 8, "MovingAvg_window": 3, "modes": 4},
    "StemGNN": {"n_series": SERIES, "n_stacks": 2, "multi_layer": 2},
    "TimesNet": {"hidden_size": 8, "conv_hidden_size": 8, "top_k": 2, "num_kernels": 2},
    "TSMixer": {"n_series": SERIES, "ff_dim": 8},
    "TSMixerx": {"n_series": SERIES, "ff_dim": 8},
    "MLPMultivariate": {"n_series": SERIES, "hidden_size": 16},
    "iTransformer": {"n_series": SERIES, "hidden_size": 8, "n_heads": 2, "d_ff": 8},
    "BiTCN": {"hidden_size": 8},
    "TiDE": {"hidden_size": 8, "decoder_output_dim": 8, "temporal_decoder_dim": 8},
    "DeepNPTS": {"hidden_size": 8},
    "TimeMixer": {"n_series": SERIES, "d_model": 8, "d_ff": 8, "top_k": 2, "moving_avg": 5},
    "KAN": {"hidden_size": 8},
    "RMoK": {"n_series": SERIES},
    "TimeXer": {"n_series": SERIES, "patch_len": 4, "hidden_size": 8, "n_heads": 2, "d_ff": 8},
    "XLinear": {"n_series": SERIES, "hidden_size": 8, "temporal_ff": 8, "channel_ff": 8},
}


def entries() -> tuple[Wild, ...]:
    import neuralforecast.models as models

    # Wrappers (of another of these, of a pretrained language model), models that draw random numbers beside dropout,
    # and one that needs a package of kernels.
    elsewhere = {"HINT", "TimeLLM", "Informer", "SOFTS", "SOFTSSharp", "xLSTM"}
    assert set(models.__all__) - elsewhere <= set(SMALL), set(models.__all__) - set(SMALL)
    return alternating([_entry(models, name) for name in SMALL])


def _entry(models: Any, name: str) -> Wild:
    kind, series = getattr(models, name), SMALL[name].get("n_series")
    config = {"h": H, "input_size": PAST, "max_steps": 1, "enable_progress_bar": False, "logger": False}
    return wild("neuralforecast", name, lambda: kind(**config, **SMALL[name]), _many if series else _one, lengths=(8,))


def _one(draw: Draw) -> Inputs:
    """A window of one series a row."""
    return ({**_windows(draw, 1), "hist_exog": None, "futr_exog": None, "stat_exog": None},), {}


def _many(draw: Draw) -> Inputs:
    """A window of all series a row."""
    return ({**_windows(draw, SERIES), "hist_exog": None, "futr_exog": None, "stat_exog": None},), {}


def _windows(draw: Draw, series: int) -> dict[str, Any]:
    mask = torch.ones(draw.batch, PAST, series, dtype=torch.float64)
    return {"insample_y": draw.floats(PAST, series), "insample_mask": mask, "outsample_y": None}
