"""Models of tables: rtdl_revisiting_models, rtdl_num_embeddings and pytorch-tabnet."""

# ruff: noqa: E501 - a table, one model a line

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from models import Draw, Inputs
from torch import Tensor, nn

from wild.entry import Wild, alternating, wild

COLUMNS = 5
WORDS = (3, 4)
ROWS = 96  # of a table whose quantiles are bins


def entries() -> tuple[Wild, ...]:
    def bins() -> list[Tensor]:
        table = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))
        return list(_class("rtdl_num_embeddings", "compute_bins")(table, n_bins=6))

    transformer = {
        "n_cont_features": COLUMNS,
        "cat_cardinalities": list(WORDS),
        "d_out": 2,
        "n_blocks": 2,
        "d_block": 16,
        "attention_n_heads": 2,
        "attention_dropout": 0.0,
        "ffn_d_hidden_multiplier": 1.5,
        "ffn_dropout": 0.0,
        "residual_dropout": 0.0,
    }
    tabnet = {
        "input_dim": COLUMNS,
        "output_dim": 3,
        "n_d": 4,
        "n_a": 4,
        "n_steps": 2,
        "virtual_batch_size": 64,
        "group_attention_matrix": torch.eye(COLUMNS),
    }
    numbers = "rtdl_num_embeddings"
    return alternating([
        _entry("MLP", "rtdl_revisiting_models", {"d_in": COLUMNS, "d_out": 2, "n_blocks": 3, "d_block": 12, "dropout": 0.0}),
        _entry("ResNet", "rtdl_revisiting_models", {"d_in": COLUMNS, "d_out": 2, "n_blocks": 3, "d_block": 12, "d_hidden_multiplier": 2.0, "dropout1": 0.0, "dropout2": 0.0}),
        _entry("FTTransformer", "rtdl_revisiting_models", transformer, _mixed),
        _entry("FTTransformer (Linformer)", "rtdl_revisiting_models", transformer | {"linformer_kv_compression_ratio": 0.5, "linformer_kv_compression_sharing": "headwise"}, _mixed, kind="FTTransformer"),
        _embedded("LinearEmbeddings", lambda: _class(numbers, "LinearEmbeddings")(COLUMNS, 4)),
        _embedded("LinearReLUEmbeddings", lambda: _class(numbers, "LinearReLUEmbeddings")(COLUMNS, 4)),
        _embedded("PeriodicEmbeddings", lambda: _class(numbers, "PeriodicEmbeddings")(COLUMNS, 4, n_frequencies=6, lite=False)),
        _embedded("PeriodicEmbeddings (lite)", lambda: _class(numbers, "PeriodicEmbeddings")(COLUMNS, 4, n_frequencies=6, lite=True)),
        _embedded("PiecewiseLinearEmbeddings", lambda: _class(numbers, "PiecewiseLinearEmbeddings")(bins(), 4, activation=True, version="A")),
        _embedded("PiecewiseLinearEmbeddings (B)", lambda: _class(numbers, "PiecewiseLinearEmbeddings")(bins(), 4, activation=False, version="B")),
        _embedded("PiecewiseLinearEncoding", lambda: nn.Sequential(_class(numbers, "PiecewiseLinearEncoding")(bins()), nn.Linear(30, 20))),
        _entry("TabNet", "pytorch_tabnet.tab_network", tabnet),
        _entry("TabNet (entmax, one batch)", "pytorch_tabnet.tab_network", tabnet | {"mask_type": "entmax"}, kind="TabNet", mixes="batch norm"),
        _entry("TabNet (categories)", "pytorch_tabnet.tab_network", tabnet | {"cat_idxs": [0, 3], "cat_dims": [4, 5], "cat_emb_dim": [2, 2], "group_attention_matrix": torch.eye(COLUMNS)}, _coded, kind="TabNet"),
    ])  # fmt: skip


def _class(package: str, name: str) -> Any:
    return getattr(import_module(package), name)


def _numbers(draw: Draw) -> Inputs:
    return (draw.floats(COLUMNS),), {}


def _mixed(draw: Draw) -> Inputs:
    return (draw.floats(COLUMNS), torch.stack([draw.ids(words + 2) - 2 for words in WORDS], 1)), {}


def _coded(draw: Draw) -> Inputs:
    table = draw.floats(COLUMNS)
    table[:, 0], table[:, 3] = draw.ids(4), draw.ids(5)
    return (table,), {}


def _entry(name: str, package: str, config: dict[str, Any], sample: Callable[[Draw], Inputs] = _numbers, kind: str = "", **facts: Any) -> Wild:  # fmt: skip
    return wild("tabular", name, lambda: _class(package, kind or name)(**config), sample, lengths=(8,), **facts)


def _embedded(name: str, make: Callable[[], nn.Module]) -> Wild:
    def model() -> nn.Module:
        return nn.Sequential(make(), nn.Flatten(), nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 2))

    return wild("tabular", name, model, _numbers, lengths=(8,))
