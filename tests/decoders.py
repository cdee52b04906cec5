"""Small models of transformers that generate, with weights large enough that tokens depend on all that came before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

WORDS, LENGTH = 64, 6
SPECIAL: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "vocab_size": WORDS}
_HEADS: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
_LLAMA: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, **_HEADS, **SPECIAL}


def gpt2() -> nn.Module:
    off = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    config = transformers.GPT2Config(n_layer=2, n_embd=32, n_head=2, n_positions=64, **off, **SPECIAL)
    return transformers.GPT2LMHeadModel(config)


def llama() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**_LLAMA))


def mistral() -> nn.Module:
    """Each layer attends to the last 8 tokens only."""
    return transformers.MistralForCausalLM(transformers.MistralConfig(sliding_window=8, head_dim=8, **_LLAMA))


def mamba() -> nn.Module:
    """Has no keys and values, but a state of fixed size."""
    config = transformers.MambaConfig(hidden_size=32, num_hidden_layers=2, state_size=4, **SPECIAL)
    return transformers.MambaForCausalLM(config)


def t5() -> nn.Module:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
    config = transformers.T5Config(**sizes, decoder_start_token_id=0, **SPECIAL)
    return transformers.T5ForConditionalGeneration(config)


MODELS: dict[str, Callable[[], nn.Module]] = {make.__name__: make for make in (gpt2, llama, mistral, mamba, t5)}


def built(name: str) -> nn.Module:
    """A model for evaluation, in float64."""
    torch.manual_seed(0)
    model = MODELS[name]().double().eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data *= 3.0 if name == "t5" else 8.0
    return model


def prompts(rows: int = 4, padded: bool = False) -> dict[str, Tensor]:
    """Token ids and their mask; if padded, each row begins with its number of padding tokens."""
    ids = torch.randint(3, WORDS, (rows, LENGTH), generator=torch.Generator().manual_seed(rows))
    mask = (torch.arange(LENGTH) >= torch.arange(rows)[:, None] % LENGTH).long() if padded else torch.ones_like(ids)
    return {"input_ids": ids.where(mask.bool(), 2), "attention_mask": mask}
