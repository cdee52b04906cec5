"""The measured models: GPT-2-like, from a ``Setting``; one written as an ``nn.Sequential``, one from transformers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Setting:
    layers: int
    width: int
    vocabulary: int
    length: int
    batch: int
    microbatches: int

    def tokens(self) -> tuple[Tensor, Tensor]:
        """Inputs and labels of one batch, always the same."""
        generator = torch.Generator().manual_seed(0)
        return torch.randint(self.vocabulary, (2, self.batch, self.length), generator=generator).unbind()


class Embedding(nn.Module):
    def __init__(self, setting: Setting) -> None:
        super().__init__()
        self.tokens = nn.Embedding(setting.vocabulary, setting.width)
        self.positions = nn.Embedding(setting.length, setting.width)

    def forward(self, ids: Tensor) -> Tensor:
        return self.tokens(ids) + self.positions.weight[: ids.shape[1]]


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = max(1, width // 64)
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))

    def forward(self, h: Tensor) -> Tensor:
        heads = self.qkv(self.before_attention(h)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attention = F.scaled_dot_product_attention(heads[0], heads[1], heads[2], is_causal=True)
        h = h + self.project(attention.transpose(1, 2).flatten(2))
        return h + self.mlp(self.before_mlp(h))


class WithLoss(nn.Module):
    """A model of logits with its loss inside, as transformers' models have it."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(self.body(input_ids), labels)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def sequential(setting: Setting) -> nn.Sequential:
    torch.manual_seed(0)
    head = nn.Sequential(nn.LayerNorm(setting.width), nn.Linear(setting.width, setting.vocabulary, bias=False))
    return nn.Sequential(Embedding(setting), *(Block(setting.width) for _ in range(setting.layers)), head)


def hugging_face(setting: Setting, **options: Any) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"n_layer": setting.layers, "n_embd": setting.width, "n_head": max(1, setting.width // 64)}
    off = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
    sizes |= {"vocab_size": setting.vocabulary, "n_positions": setting.length}
    config = GPT2Config(use_cache=False, **sizes, **off, **options)
    return GPT2LMHeadModel(config)
