"""sentence-transformers: its modules behind word embeddings, and its losses over two or three such sentences."""

# ruff: noqa: E501 - a table, one model a line

from __future__ import annotations

from typing import Any

import torch
from models import Draw, Inputs
from torch import Tensor, nn

from wild.entry import Wild, alternating, itself, wild

WORDS, WIDTH = 24, 8
LOSSES: dict[str, tuple[int, str, dict[str, Any]]] = {  # sentences a row, the label's kind, options
    "CosineSimilarityLoss": (2, "score", {}), "CoSENTLoss": (2, "score", {}), "AnglELoss": (2, "score", {}), "ContrastiveLoss": (2, "binary", {}),
    "OnlineContrastiveLoss": (2, "binary", {}), "MultipleNegativesRankingLoss": (2, "none", {}), "MultipleNegativesSymmetricRankingLoss": (2, "none", {}),
    "TripletLoss": (3, "none", {}), "SoftmaxLoss": (2, "class", {"sentence_embedding_dimension": WIDTH, "num_labels": 3}), "BatchAllTripletLoss": (1, "class", {}),
    "BatchHardTripletLoss": (1, "class", {}), "BatchHardSoftMarginTripletLoss": (1, "class", {}), "BatchSemiHardTripletLoss": (1, "class", {}), "MSELoss": (1, "vector", {}),
    "MarginMSELoss": (3, "score", {}), "MegaBatchMarginLoss": (2, "none", {"use_mini_batched_version": False}), "GlobalOrthogonalRegularizationLoss": (2, "none", {}), "DistillKLDivLoss": (3, "scores", {}),
}  # fmt: skip


def entries() -> tuple[Wild, ...]:
    from sentence_transformers import models

    def module(name: str, make: Any, sample: Any = None) -> Wild:
        return wild(
            "sentence_transformers",
            name,
            lambda: _Sentences(make()),
            sample or _words,
            loss=_embedding,
            lengths=(8, 12),
        )

    modes = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
    pooled = lambda: models.Pooling(WIDTH, "mean")  # noqa: E731
    made = [
        *(module(f"Pooling ({mode})", lambda mode=mode: [models.Pooling(WIDTH, mode)]) for mode in modes),
        module("Dense", lambda: [pooled(), models.Dense(WIDTH, 5)]),
        module("Normalize", lambda: [pooled(), models.Normalize(), models.Dense(WIDTH, 5)]),  # alone its square is 1
        module("LayerNorm", lambda: [pooled(), models.LayerNorm(WIDTH)]),
        module("Dropout", lambda: [pooled(), models.Dropout(0.0)]),
        module("CNN", lambda: [models.CNN(WIDTH, WIDTH, [1, 3]), models.Pooling(2 * WIDTH, "mean")]),
        module("LSTM", lambda: [models.LSTM(WIDTH, WIDTH // 2), pooled()]),
        module("WeightedLayerPooling", lambda: [_Layers(), models.WeightedLayerPooling(WIDTH, num_hidden_layers=2, layer_start=1), pooled()]),
    ]  # fmt: skip
    return alternating([*made, *(_loss(name, *facts) for name, facts in LOSSES.items())])


def _loss(name: str, sentences: int, label: str, options: dict[str, Any]) -> Wild:
    def make() -> nn.Module:
        from sentence_transformers import losses, models

        body = _Sentences([models.Pooling(WIDTH, "mean")])
        body.get_sentence_embedding_dimension = lambda: WIDTH  # type: ignore[assignment]
        return _Criterion(getattr(losses, name)(body, **options))

    def sample(draw: Draw) -> Inputs:
        features = [_words(draw)[0][0] for _ in range(sentences)]
        if label == "class":
            labels: Tensor | None = torch.arange(draw.batch) % 2 if "Batch" in name else draw.ids(5) - 2
        else:
            makers: dict[str, Any] = {
                "score": lambda: draw.floats().sigmoid(),
                "binary": lambda: torch.arange(draw.batch) % 2,
                "vector": lambda: draw.floats(WIDTH),
                "scores": lambda: draw.floats(2),
            }
            labels = makers[label]() if label in makers else None
        return (features, labels), {}

    return wild("sentence_transformers", name, make, sample, loss=itself, inside=True, lengths=(8,))


class _Sentences(nn.Module):
    """Word embeddings, and modules that hand one dict of features from each to the next."""

    def __init__(self, modules: list[nn.Module]) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.rest = nn.ModuleList(modules)

    @property
    def device(self) -> torch.device:
        return self.words.weight.device

    def forward(self, features: dict[str, Tensor]) -> dict[str, Any]:
        found: dict[str, Any] = {**features, "token_embeddings": self.words(features["input_ids"])}
        found["sentence_lengths"] = features["attention_mask"].sum(1)
        for module in self.rest:
            found = module(found)
        return found


class _Layers(nn.Module):
    """A stand-in for a transformer that gives all its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        hidden = [features["token_embeddings"]]
        for layer in self.layers:
            hidden.append(layer(hidden[-1]).tanh())
        return {**features, "all_layer_embeddings": tuple(hidden)}


class _Criterion(nn.Module):
    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, features: list[dict[str, Tensor]], labels: Tensor | None) -> Tensor:
        found = self.loss(features, labels)
        return sum(found.values()) if isinstance(found, dict) else found  # type: ignore[no-any-return]


def _words(draw: Draw) -> Inputs:
    return ({"input_ids": draw.ids(WORDS, draw.length), "attention_mask": draw.mask()},), {}


def _embedding(features: dict[str, Tensor]) -> Tensor:
    return features["sentence_embedding"].pow(2).mean()
