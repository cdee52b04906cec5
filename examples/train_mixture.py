"""Trains a mixture of experts over two devices, with its balancing loss.

    python examples/train_mixture.py --steps 10

The balancing loss of Mixtral counts how many tokens of the whole batch each expert gets, so it mixes samples;
pipecompile computes it once from the joined logits of the routers. Which expert a token goes to depends on activations:
its Python is kept whole inside a stage, as the report says. With a network it reads the configuration of Mixtral, and
makes it small; without one, the sizes are here.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from beside import options, report, train
from train_gpt2 import batches, go_offline_unless_the_hub_answers, load_texts, load_tokenizer

import pipecompile


def load_model(tokenizer: Any) -> Any:
    from transformers import AutoConfig, MixtralConfig, MixtralForCausalLM

    try:
        config = AutoConfig.from_pretrained("mistralai/Mixtral-8x7B-v0.1")
    except OSError:
        print("model: a Mixtral with the configuration of this script")
        config = MixtralConfig(num_experts_per_tok=2)
    small = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
    small |= {"num_key_value_heads": 2, "head_dim": 32, "num_local_experts": 4, "vocab_size": len(tokenizer)}
    ends = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
    for name, value in {**small, **ends, "output_router_logits": True, "use_cache": False}.items():
        setattr(config, name, value)
    return MixtralForCausalLM(config)


def main() -> None:
    chosen = options(__doc__).parse_args()
    go_offline_unless_the_hub_answers()
    texts = load_texts()
    tokenizer = load_tokenizer(texts)
    model = load_model(tokenizer).train()
    data = batches(texts, tokenizer, chosen.batch, chosen.steps)
    twin = deepcopy(model)
    pipe = pipecompile.compile(model, devices=["cpu"] * chosen.stages, microbatches=chosen.microbatches)
    split = train(pipe, torch.optim.Adam(pipe.parameters(), lr=1e-3), data)
    report(pipe, split, train(twin, torch.optim.Adam(twin.parameters(), lr=1e-3), data))
    print(*pipe.pipeline.report.notes, *pipe.pipeline.report.microbatches, sep="\n")


if __name__ == "__main__":
    main()
