"""litgpt: one configuration of each kind of architecture in its list, made small."""

# ruff: noqa: E501 - a table

from __future__ import annotations

from typing import Any

from models import Draw, Inputs
from torch import nn

from wild.entry import Wild, alternating, wild

SMALL: dict[str, Any] = {
    "n_layer": 2, "n_head": 4, "n_embd": 16, "vocab_size": 24, "padded_vocab_size": 24, "block_size": 32, "intermediate_size": 24, "head_size": 4,
}  # fmt: skip


def entries() -> tuple[Wild, ...]:
    from litgpt.config import configs

    seen: dict[tuple[Any, ...], str] = {}
    for config in configs:
        seen.setdefault(_kind(config), str(config["name"]))
    return alternating([_entry(name) for name in seen.values()])


def _kind(config: dict[str, Any]) -> tuple[Any, ...]:
    """What makes a configuration another architecture than the ones before."""
    switches = ("norm_class_name", "mlp_class_name", "parallel_residual", "shared_attention_norm", "bias", "post_mlp_norm",
                "norm_qk", "scale_embeddings")  # fmt: skip
    grouped = config.get("n_query_groups") is not None
    return (*(config.get(s) for s in switches), grouped, config.get("sliding_window_size") is not None)


def _entry(name: str) -> Wild:
    def make() -> nn.Module:
        from litgpt import GPT, Config

        original = Config.from_name(name)
        groups = {"n_query_groups": 2} if original.n_query_groups not in (original.n_head, 1) else {}
        few = {"n_query_groups": 1} if original.n_query_groups == 1 else {}
        experts = {"n_expert": 4, "n_expert_per_token": 2} if original.n_expert else {}
        if getattr(original, "moe_intermediate_size", None):
            experts["moe_intermediate_size"] = 8
        window = {"sliding_window_size": 4} if original.sliding_window_size else {}
        indices = {"sliding_window_indices": [1, 0]} if original.sliding_window_indices else {}
        rope = {"rope_indices": [1, 0]} if getattr(original, "rope_indices", None) else {}
        everything = {
            **SMALL,
            "n_query_groups": SMALL["n_head"],
            **groups,
            **few,
            **experts,
            **window,
            **indices,
            **rope,
        }
        return GPT(Config.from_name(name, **everything))

    return wild("litgpt", name, make, _text)


def _text(draw: Draw) -> Inputs:
    return (draw.ids(24, draw.length),), {}
