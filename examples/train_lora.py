"""Tunes GPT-2 with PEFT's LoRA over two devices: an adapter on a model, then split; its weights are saved by PEFT.

    pip install peft
    python examples/train_lora.py --steps 10

``get_peft_model(pipe, ...)`` after compile works too. Text, tokenizer and weights are those of train_gpt2.py, with the
same replacements where the Hugging Face Hub cannot be reached.
"""

from __future__ import annotations

import tempfile
from copy import deepcopy
from pathlib import Path

import torch
from beside import options, report, train
from train_gpt2 import batches, go_offline_unless_the_hub_answers, load_model, load_texts, load_tokenizer

import pipecompile


def main() -> None:
    chosen = options(__doc__).parse_args()
    go_offline_unless_the_hub_answers()
    from peft import LoraConfig, get_peft_model

    texts = load_texts()
    tokenizer = load_tokenizer(texts)
    model = get_peft_model(
        load_model(tokenizer, width=128),
        LoraConfig(r=8, lora_dropout=0.0, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM"),
    )
    model.print_trainable_parameters()
    data = batches(texts, tokenizer, chosen.batch, chosen.steps)
    twin = deepcopy(model)
    pipe = pipecompile.compile(model, devices=["cpu"] * chosen.stages, microbatches=chosen.microbatches)
    split = train(pipe, torch.optim.AdamW(pipe.parameters(), lr=1e-3), data)
    report(pipe, split, train(twin, torch.optim.AdamW(twin.parameters(), lr=1e-3), data))
    with tempfile.TemporaryDirectory() as folder:
        pipe.save_pretrained(folder)
        print("saved:", *sorted(f"{file.name} ({file.stat().st_size:,} B)" for file in Path(folder).iterdir()))


if __name__ == "__main__":
    main()
