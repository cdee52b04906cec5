"""Fine-tunes T5 over two devices to repair sentences whose words were reversed.

    python examples/train_t5.py --steps 10

Encoder and decoder share a table of words, so the stages sum its gradients. Targets are padded: microbatches have
different numbers of valid labels, and the loss is still the mean over all of the batch. With a network it takes
t5-small; without one, a small T5 from a configuration, and a tokenizer learned from the text.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from beside import options, report, train
from train_gpt2 import go_offline_unless_the_hub_answers, load_texts, load_tokenizer

import pipecompile


def load_model() -> tuple[Any, Any]:
    from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

    name = "google-t5/t5-small"
    try:
        return T5ForConditionalGeneration.from_pretrained(name, dropout_rate=0.0), AutoTokenizer.from_pretrained(name)
    except OSError:
        print("model: a T5 with random weights, since t5-small cannot be reached")
        tokenizer = load_tokenizer(load_texts())
        ends = {"pad_token_id": tokenizer.pad_token_id, "decoder_start_token_id": tokenizer.pad_token_id}
        sizes = {"vocab_size": len(tokenizer), "d_model": 128, "d_kv": 32, "d_ff": 256, "num_layers": 3, "num_heads": 4}
        return T5ForConditionalGeneration(T5Config(**sizes, **ends, dropout_rate=0.0)), tokenizer


def batches(tokenizer: Any, count: int, size: int) -> list[dict[str, torch.Tensor]]:
    texts = [text for text in load_texts() if len(text.split()) < 30]
    found = []
    for rows in torch.randperm(len(texts))[: count * size].split(size):
        right = [texts[i] for i in rows]
        wrong = [" ".join(reversed(text.split())) for text in right]
        batch = tokenizer(wrong, padding=True, return_tensors="pt")
        target = tokenizer(right, padding=True, return_tensors="pt")
        labels = target["input_ids"].masked_fill(target["attention_mask"] == 0, -100)
        found.append({"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels})
    return found


def main() -> None:
    chosen = options(__doc__).parse_args()
    go_offline_unless_the_hub_answers()
    model, tokenizer = load_model()
    data = batches(tokenizer, chosen.steps, chosen.batch)
    twin = deepcopy(model.train())
    pipe = pipecompile.compile(model, devices=["cpu"] * chosen.stages, microbatches=chosen.microbatches)
    split = train(pipe, torch.optim.Adam(pipe.parameters(), lr=1e-3), data)
    report(pipe, split, train(twin, torch.optim.Adam(twin.parameters(), lr=1e-3), data))


if __name__ == "__main__":
    main()
