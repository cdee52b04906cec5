"""Models that are built on the meta device, and the same ones initialised whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from toys import VOCABULARY, D

STEPS, ROWS, LENGTH, SEED = 3, 8, 6, 3
Seen = dict[str, Tensor]


class Scaled(nn.Module):
    """Initialises its own parameter, and that of a module below once more."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(D))
        self.linear = nn.Linear(D, D)
        self.register_buffer("offset", torch.empty(D), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.uniform_(self.scale, 0.5, 1.5)
        self.linear.weight.data.normal_(std=0.3)
        self.offset.copy_(torch.linspace(-1, 1, D))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x) * self.scale + self.offset)


class Custom(nn.Module):
    """BatchNorm, tied weights, a parameter on the root, and one that nothing reads."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, D)
        self.layers = nn.ModuleList(Scaled() for _ in range(4))
        self.norm = nn.BatchNorm1d(D)
        self.head = nn.Linear(D, VOCABULARY, bias=False)
        self.head.weight = self.words.weight
        self.shift = nn.Parameter(torch.empty(D))
        self.idle = nn.Parameter(torch.empty(2))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.shift, std=0.1)
        nn.init.ones_(self.idle)

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        h = self.words(input_ids[:, 0]) + self.shift
        for layer in self.layers:
            h = layer(h)
        return {"loss": F.cross_entropy(self.head(self.norm(h)), labels[:, 0])}


SIZES = {"vocab_size": VOCABULARY, "use_cache": False}


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_positions": 32, "n_embd": 16, "n_layer": 3, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
    drops = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
    return GPT2LMHeadModel(GPT2Config(**SIZES, **sizes, **drops))


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**SIZES, **sizes))


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0}
    return T5ForConditionalGeneration(T5Config(decoder_start_token_id=0, **SIZES, **sizes))


def mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_local_experts": 4}
    config = MixtralConfig(num_attention_heads=4, num_key_value_heads=2, **SIZES, **sizes)
    config._experts_implementation = "batched_mm"
    return MixtralForCausalLM(config)


MAKE: dict[str, Callable[[], nn.Module]] = {
    "gpt2": gpt2,
    "llama": llama,
    "custom": Custom,
    "t5": t5,
    "mixtral": mixtral,
}


def on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return make()


def initialized(make: Callable[[], nn.Module]) -> nn.Module:
    """The unsplit model, initialised as the documentation says. Buffers, which ``to_empty`` loses, are set anew."""
    model = on_meta(make).to_empty(device="cpu")
    torch.manual_seed(SEED)
    if hasattr(model, "init_weights"):
        model.init_weights()
    else:
        with torch.no_grad():
            model.apply(lambda module: module.reset_parameters() if hasattr(module, "reset_parameters") else None)
        model.head.weight = model.words.weight
    return model


def batch(step: int) -> dict[str, Tensor]:
    ids = torch.randint(VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(step))
    return {"input_ids": ids, "labels": ids}


def trained(pipe: Any) -> Seen:
    """The losses of three steps and all that this process has after them."""
    seen: Seen = {}
    pipe.pipeline.prepare(**batch(0))
    optimizer = torch.optim.AdamW([*pipe.parameters(), nn.Parameter(torch.zeros(()))], lr=1e-2)
    for step in range(STEPS):
        loss = pipe(**batch(step))["loss"]
        loss.backward()
        seen[f"step {step}: loss"] = loss.detach().clone()
        optimizer.step()
        optimizer.zero_grad()
    return seen | {name: tensor.clone() for name, tensor in pipe.state_dict().items()}
