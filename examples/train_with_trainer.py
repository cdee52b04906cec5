"""Trains GPT-2 with transformers' Trainer over two devices: the Trainer is given the pipe as its model.

    python examples/train_with_trainer.py --steps 10

Label smoothing, clipping, accumulation, evaluation and saving are the Trainer's own. The same Trainer trains the
unsplit model afterwards, from the same weights on the same rows. Text, tokenizer and weights are those of
train_gpt2.py, with the same replacements where the Hugging Face Hub cannot be reached.
"""

from __future__ import annotations

import tempfile
from copy import deepcopy
from typing import Any

from beside import options
from train_gpt2 import go_offline_unless_the_hub_answers, load_model, load_texts, load_tokenizer

import pipecompile


def train(model: Any, rows: list[Any], tokenizer: Any, chosen: Any, folder: str) -> tuple[list[float], float]:
    """The loss at each step, and that of the evaluation at the end."""
    from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=chosen.steps,
        per_device_train_batch_size=chosen.batch,
        per_device_eval_batch_size=chosen.batch,
        gradient_accumulation_steps=2,
        label_smoothing_factor=0.1,
        max_grad_norm=1.0,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=rows[chosen.batch :],
        eval_dataset=rows[: chosen.batch],
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    trainer.train()
    trainer.save_model(folder)  # config.json and safetensors, as from_pretrained reads them
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], trainer.evaluate()["eval_loss"]


def main() -> None:
    chosen = options(__doc__).parse_args()
    go_offline_unless_the_hub_answers()
    texts = load_texts()
    tokenizer = load_tokenizer(texts)
    model = load_model(tokenizer, width=128)
    twin = deepcopy(model)
    rows = [tokenizer(text, truncation=True, max_length=64) for text in texts[: (2 * chosen.steps + 1) * chosen.batch]]
    pipe = pipecompile.compile(model, devices=["cpu"] * chosen.stages, microbatches=chosen.microbatches)
    with tempfile.TemporaryDirectory() as folder:
        split, evaluated = train(pipe, rows, tokenizer, chosen, f"{folder}/split")
        unsplit, evaluated_unsplit = train(twin, rows, tokenizer, chosen, f"{folder}/unsplit")
        again = type(model).from_pretrained(f"{folder}/split")
    for step, (ours, theirs) in enumerate(zip(split, unsplit, strict=True), 1):
        print(f"step {step:3d}   loss {float(ours):.4f}   unsplit {float(theirs):.4f}")
    print(f"evaluation   {evaluated:.4f}   unsplit {evaluated_unsplit:.4f}")
    print(f"saved and read again: {type(again).__name__}, {sum(p.numel() for p in again.parameters()) / 1e6:.1f} M")


if __name__ == "__main__":
    main()
