"""Predicted peak memory of each device beside the peak that the allocator counts, on virtual accelerators.

    python benchmarks/device_memory.py
    python benchmarks/device_memory.py --models T5 --schedules 1f1b,gpipe

Two stages train with Adam, which updates all parameters at once. The prediction is ``pipe.pipeline.memory``; the figure
beside it is the allocator's peak in the third step. Shares are measured over predicted.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import torch
import transformers
import virtual_device as vd
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from unet import UNet

import pipecompile
from pipecompile import PlanOptions

ROWS, LENGTH, MICROBATCHES, STATE = 16, 64, 8, 2.0
LIMIT = 4 << 30
Inputs = dict[str, Tensor]
ADAM = {"foreach": True, "lr": 1e-4}


def gpt2(tied: bool) -> tuple[nn.Module, Inputs]:
    config = transformers.GPT2Config(
        n_layer=6, n_embd=192, n_head=6, vocab_size=2048, n_positions=LENGTH, tie_word_embeddings=tied
    )
    ids = torch.randint(0, 2048, (ROWS, LENGTH))
    return transformers.GPT2LMHeadModel(config), {"input_ids": ids, "labels": ids}


def t5(tied: bool) -> tuple[nn.Module, Inputs]:
    config = transformers.T5Config(
        num_layers=3,
        d_model=192,
        d_kv=32,
        d_ff=512,
        num_heads=6,
        vocab_size=2048,
        decoder_start_token_id=0,
        tie_word_embeddings=tied,
    )
    ids = torch.randint(1, 2048, (ROWS, LENGTH))
    return transformers.T5ForConditionalGeneration(config), {"input_ids": ids, "labels": ids}


def unet(tied: bool) -> tuple[nn.Module, Inputs]:
    model = UNet(width=32, factors=(1, 2, 3), blocks=1)
    return model, {"images": torch.randn(ROWS, 3, 32, 32), "noise": torch.randn(ROWS, 3, 32, 32)}


MODELS: dict[str, Callable[[bool], tuple[nn.Module, Inputs]]] = {"GPT-2": gpt2, "U-Net": unet, "T5": t5}
SCHEDULES = ("sequential", "gpipe", "1f1b", "pipedream")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--schedules", default=",".join(SCHEDULES))
    given = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(2)
    vd.run("late")
    table = Table("model", "schedule", "recompute", "predicted, MiB", "measured, MiB", "measured / predicted")
    shares = []
    for name in given.models.split(","):
        for schedule in given.schedules.split(","):
            for recompute in ("never", "always"):
                try:
                    predicted, measured = _row(MODELS[name], schedule, recompute)
                except pipecompile.PlanError:  # PipeDream and weights tied across stages
                    table.add_row(name, schedule, recompute, "refused", "", "")
                    continue
                share = [m / p for m, p in zip(measured, predicted, strict=True)]
                shares += share
                print(name, schedule, recompute, *(f"{s:.3f}" for s in share), file=sys.stderr, flush=True)
                table.add_row(
                    name, schedule, recompute, _mib(predicted), _mib(measured), ", ".join(f"{s:.3f}" for s in share)
                )
    Console(width=120).print(table)
    inside = sum(abs(share - 1) <= 0.1 for share in shares)
    print(f"{inside} of {len(shares)} devices within 10% of the prediction")


def _row(
    build: Callable[[bool], tuple[nn.Module, Inputs]], schedule: str, recompute: Any
) -> tuple[list[int], list[int]]:
    gc.collect()  # the pipeline before
    torch.manual_seed(0)
    model, inputs = build(schedule != "pipedream")  # which refuses weights tied across stages
    for device in range(2):
        vd.limit(device, LIMIT)
    inside = schedule == "pipedream"
    pipe = pipecompile.compile(
        model, [0, 1], schedule=schedule, microbatches=MICROBATCHES, costs="count", verify="never",
        plan=PlanOptions(recompute=recompute, optimizer_state=STATE),
        optimizer=(lambda parameters: torch.optim.Adam(parameters, **ADAM)) if inside else None,
    )  # fmt: skip
    optimizer = None if inside else torch.optim.Adam(pipe.parameters(), **ADAM)
    for step in range(3):
        if step == 2:
            gc.collect()
            for device in range(2):
                torch.accelerator.synchronize(device)
                torch.accelerator.reset_peak_memory_stats(device)
        out = pipe(**inputs)
        if optimizer is not None:
            (out if isinstance(out, Tensor) else out.loss).backward()
            optimizer.step()
            optimizer.zero_grad()
        del out
    predicted = list(pipe.pipeline.memory.ranks)
    measured = [torch.accelerator.max_memory_allocated(device) for device in range(2)]
    pipe.pipeline.close()
    return predicted, measured


def _mib(sizes: list[int]) -> str:
    return ", ".join(f"{size / 2**20:.1f}" for size in sizes)


if __name__ == "__main__":
    main()
