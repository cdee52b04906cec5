"""How long capturing and planning takes, up to a Llama of 70 billion parameters, on weights without memory.

    python benchmarks/capture.py
    python benchmarks/capture.py --models llama-70b --stages 8 --repeats 3

Seconds are CPU seconds of this process, the least of the repeats; a tiny model has been captured before. ``static`` is
a trace with all sizes fixed, ``symbolic`` one with the batch and the lengths as symbols, which ``compile`` takes first.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from time import process_time
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import nn

from pipecompile.capture import Call, Captured, read_call, summarize
from pipecompile.capture.captured import SymbolicSizes
from pipecompile.capture.state.reachable import reach_of
from pipecompile.capture.trace import Trace
from pipecompile.ir.cluster import Cluster
from pipecompile.ir.graph import Graph
from pipecompile.partition import partition
from pipecompile.profile import profile

GPT2, LLAMA = transformers.GPT2Config, transformers.LlamaConfig
MODELS: dict[str, Callable[[], transformers.PretrainedConfig]] = {
    "gpt2": lambda: GPT2(),
    "gpt2-xl": lambda: GPT2(n_layer=48, n_embd=1600, n_head=25),
    "llama-70b": lambda: LLAMA(
        num_hidden_layers=80,
        hidden_size=8192,
        num_attention_heads=64,
        num_key_value_heads=8,
        intermediate_size=28672,
        vocab_size=128256,
    ),
}
BATCH, LENGTH = 2, 128


def built(config: transformers.PretrainedConfig) -> tuple[nn.Module, Call]:
    """The model of a config on the meta device, and a call of it."""
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    ids = torch.randint(1000, (BATCH, LENGTH))
    return model, read_call(model.forward, (), {"input_ids": ids, "labels": ids})


def traced(model: nn.Module, call: Call, symbolic: SymbolicSizes) -> Captured:
    return Trace(model, call, (BATCH,), model, symbolic, {}, reach_of(model)).run([])


class Stopwatch:
    """CPU seconds of what it runs, the least of the repeats."""

    def __init__(self, repeats: int) -> None:
        self.repeats = repeats

    def __call__(self, run: Callable[[], Any]) -> tuple[float, Any]:
        times = []
        for _ in range(self.repeats):
            start = process_time()
            result = run()
            times.append(process_time() - start)
        return min(times), result


def planned(captured: Captured, stages: int, watch: Stopwatch) -> tuple[Graph, float, float, float]:
    """The graph, and the seconds of reading it, profiling it and cutting it into stages."""
    reading, graph = watch(lambda: summarize(captured))
    profiling, costed = watch(lambda: profile(captured, graph, "count"))
    cutting, _ = watch(lambda: partition(costed, stages, Cluster.of(["cpu"] * stages)))
    return graph, reading, profiling, cutting


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS), help=f"some of {', '.join(MODELS)}")
    parser.add_argument("--stages", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    traced(*built(GPT2(n_layer=1, n_embd=8, n_head=1)), SymbolicSizes.BATCH | SymbolicSizes.LENGTHS)
    watch = Stopwatch(args.repeats)
    headings = ("static", "ms / node", "symbolic", "ms / node", "graph", "profile", f"{args.stages} stages")
    table = Table("model", "parameters", "nodes", *headings, title="CPU seconds")
    for name in args.models.split(","):
        model, call = built(MODELS[name]())
        static, _ = watch(lambda model=model, call=call: traced(model, call, SymbolicSizes.NONE))
        symbolic, captured = watch(
            lambda model=model, call=call: traced(model, call, SymbolicSizes.BATCH | SymbolicSizes.LENGTHS)
        )
        graph, *planning = planned(captured, args.stages, watch)
        count = len(captured.graph.nodes)
        table.add_row(
            name,
            f"{sum(p.numel() for p in model.parameters()) / 1e9:.2f} G",
            f"{len(graph):,}",
            *(text for seconds in (static, symbolic) for text in (f"{seconds:.1f}", f"{seconds / count * 1e3:.2f}")),
            *(f"{seconds:.1f}" for seconds in planning),
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
