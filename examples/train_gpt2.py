"""Trains GPT-2 over two devices, and the same model unsplit beside it: the losses are the same.

    python examples/train_gpt2.py --steps 40

A plain training script but for one line, ``pipecompile.compile``. With a network it takes GPT-2's weights and tokenizer
and WikiText; without one, the same twelve layers from the configuration, less wide, and the documentation that comes
with Python. Each batch is padded to its own longest text, so every step has another length.
"""

from __future__ import annotations

import argparse
import os
import time
import urllib.request
from collections.abc import Callable, Iterator
from copy import deepcopy
from pydoc_data.topics import topics
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import pipecompile

os.environ |= {"TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}
NO_DROPOUT = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
END = "<|endoftext|>"
console = Console(width=100)


def main() -> None:
    options = _options()
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    go_offline_unless_the_hub_answers()
    texts = load_texts()
    tokenizer = load_tokenizer(texts)
    model = load_model(tokenizer, options.width)
    unsplit = deepcopy(model)
    data = batches(texts, tokenizer, options.batch, options.steps)
    console.print("Padding has no labels: microbatches count unequally, the loss is the whole batch's.\n")

    pipe = pipecompile.compile(
        model, devices=options.devices, schedule=options.schedule, microbatches=options.microbatches
    )
    train_split = trainer(pipe, options.learning_rate)
    train_unsplit = trainer(unsplit, options.learning_rate)
    rows = []
    for step, batch in enumerate(data):
        rows.append((*train_split(batch), *train_unsplit(batch)))
        if step % 5 == 0 or step == options.steps - 1:
            report_step(step, batch, rows[-1][0], rows[-1][2])
    report_times(rows[1:], options)
    report_plan(pipe, data[0])


def trainer(
    model: Callable[..., Any], learning_rate: float
) -> Callable[[dict[str, torch.Tensor]], tuple[float, float]]:
    """The classic step, the same for a pipeline and a plain model; it returns the loss and its seconds."""
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)

    def step(batch: dict[str, torch.Tensor]) -> tuple[float, float]:
        start = time.perf_counter()
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        return loss.item(), time.perf_counter() - start

    return step


def go_offline_unless_the_hub_answers() -> None:
    """Spares the retries of a machine without a network; must run before transformers is imported."""
    try:
        urllib.request.urlopen("https://huggingface.co", timeout=5).close()
    except OSError:
        os.environ["HF_HUB_OFFLINE"] = "1"


def load_texts() -> list[str]:
    """Paragraphs of English."""
    from datasets import load_dataset

    try:
        texts = load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split="train")["text"]
        console.print("text: WikiText-2")
    except (OSError, ValueError):
        texts = [paragraph for topic in topics.values() for paragraph in topic.split("\n\n")]
        console.print("text: Python's own documentation, since the Hugging Face Hub cannot be reached")
    return [" ".join(text.split()) for text in texts if 20 < len(text.split()) < 90]


def load_tokenizer(texts: list[str]) -> Any:
    """GPT-2's tokenizer, or a byte-pair encoding learned from the texts."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        tokenizer = AutoTokenizer.from_pretrained("openai-community/gpt2")
        tokenizer.pad_token = tokenizer.eos_token
        console.print("tokenizer: GPT-2's")
    except OSError:
        from tokenizers import ByteLevelBPETokenizer

        pairs = ByteLevelBPETokenizer()
        pairs.train_from_iterator(texts, vocab_size=2048, special_tokens=[END], show_progress=False)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=pairs._tokenizer, eos_token=END, pad_token=END)
        console.print(f"tokenizer: {len(tokenizer)} byte pairs learned from the text")
    return tokenizer


def load_model(tokenizer: Any, width: int) -> torch.nn.Module:
    """GPT-2 with its weights, or one with as many layers and random weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    try:
        model = GPT2LMHeadModel.from_pretrained("openai-community/gpt2", **NO_DROPOUT)
        origin = "pretrained"
    except OSError:
        ends = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
        sizes = {"vocab_size": len(tokenizer), "n_embd": width, "n_head": width // 64}
        model = GPT2LMHeadModel(GPT2Config(**sizes, **ends, **NO_DROPOUT))
        origin = "random weights"
    size = sum(p.numel() for p in model.parameters()) / 1e6
    console.print(f"model: GPT-2, {model.config.n_layer} layers, {model.config.n_embd} wide, {size:.1f} M, {origin}")
    return model.train()


def batches(texts: list[str], tokenizer: Any, size: int, count: int) -> list[dict[str, torch.Tensor]]:
    """Batches of the texts in a random order, each padded to its longest text."""

    def draw() -> Iterator[dict[str, torch.Tensor]]:
        for rows in torch.randperm(len(texts))[: size * count].split(size):
            batch = tokenizer(
                [texts[i] for i in rows], padding=True, truncation=True, max_length=256, return_tensors="pt"
            )
            yield {
                "input_ids": batch["input_ids"],
                "attention_mask": batch["attention_mask"],
                "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100),
            }

    return list(draw())


def report_step(step: int, batch: dict[str, torch.Tensor], split: float, unsplit: float) -> None:
    length = batch["input_ids"].shape[1]
    difference = f"difference {abs(split - unsplit):.0e}"
    console.print(f"step {step:3d}   length {length:3d}   loss {split:.4f}   unsplit {unsplit:.4f}   {difference}")


def report_times(rows: list[tuple[float, float, float, float]], options: argparse.Namespace) -> None:
    """The medians of all steps but the first, in which the model is compiled."""
    split, unsplit = median(row[1] for row in rows), median(row[3] for row in rows)
    table = Table("", "seconds a step", "speed", title="\nStep time, one thread a device")
    table.add_row("unsplit, whole batch", f"{unsplit:.3f}", "1.00")
    table.add_row(f"{options.schedule} on {', '.join(options.devices)}", f"{split:.3f}", f"{unsplit / split:.2f}")
    console.print(table)


def report_plan(pipe: Any, batch: dict[str, torch.Tensor]) -> None:
    """The plan, and what it predicted for the batch that it was made for."""
    measured = []
    for _ in range(5):
        pipe(**batch).loss.backward()
        measured.append(pipe.pipeline.timeline.makespan)
    predicted = pipe.pipeline.predicted.makespan
    console.print(f"\n{pipe.pipeline.plan}\n")
    console.print(
        f"forward and backward of the first batch: predicted {predicted:.3f} s, measured {median(measured):.3f} s"
    )


def training_options(description: str | None, **defaults: int) -> argparse.ArgumentParser:
    """The options of a training, which has defaults of its own for the numbers of steps, rows and microbatches."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedule", default="1f1b", choices=["sequential", "gpipe", "1f1b"])
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--width", type=int, default=256, help="of the model without pretrained weights")
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--seed", type=int, default=0)
    return parser


def _options() -> argparse.Namespace:
    parser = training_options(__doc__, microbatches=4, batch=8, steps=40)
    parser.add_argument("--devices", nargs="+", default=["cpu", "cpu"])
    return parser.parse_args()


if __name__ == "__main__":
    main()
