"""Plans a Llama of 70 billion parameters for devices that are not here: plan, memory and a predicted step, timed.

    python benchmarks/llama70b.py --cluster 64xH100
    pipecompile plan benchmarks/llama70b.py:model --cluster 64xH100 --dtype bfloat16     the same, step by step

Weights are on the meta device. Seconds are those of the devices' peak figures, which nobody reaches.
"""

from __future__ import annotations

import argparse
import time

import torch
from capture import MODELS
from rich.console import Console
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import pipecompile
from pipecompile.ir.cluster import Cluster
from pipecompile.ir.units import seconds_text
from pipecompile.render.table import memory_table


class Loss(nn.Module):
    """A language model's loss alone: the logits of all microbatches together would fill a device."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        loss: Tensor = self.inner(input_ids=input_ids, labels=labels).loss
        return loss


def model(layers: int = 80, length: int = 2048, rows: int = 1) -> tuple[nn.Module, dict[str, Tensor]]:
    """Llama 3's 70-billion-parameter config in bfloat16, and rows of tokens."""
    config = MODELS["llama-70b"]()
    config.num_hidden_layers = layers
    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    ids = torch.randint(1000, (rows, length))
    return Loss(made), {"input_ids": ids, "labels": ids}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cluster", default="8xH100")
    parser.add_argument("--microbatches", type=int, default=32)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--optimizer-state", type=float, default=2.0)
    options = parser.parse_args()
    cluster = Cluster.from_name(options.cluster)
    start, cpu = time.perf_counter(), time.process_time()
    it, call = model(length=options.length, rows=options.microbatches)
    pipe = pipecompile.compile(
        it,
        ["cpu"] * len(cluster),
        cluster=cluster,
        microbatches=options.microbatches,
        example_inputs=call,
        plan=pipecompile.PlanOptions(optimizer_state=options.optimizer_state),
    )
    console = Console(width=140)
    console.print(memory_table(pipe.pipeline.memory, pipe.pipeline.plan, cluster))
    step = pipe.pipeline.predicted
    console.print(
        f"a step of {options.microbatches} microbatches: {seconds_text(step.makespan)}, bubble {step.bubble:.1%}"
    )
    console.print(f"{time.perf_counter() - start:.1f} s, {time.process_time() - cpu:.1f} s of them on the CPU")


if __name__ == "__main__":
    main()
