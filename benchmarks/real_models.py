"""How well real models are cut: the busiest stage of our plan, beside ways to cut that people use.

    python benchmarks/real_models.py --stages 2,4,8 --json out/real_models.json

Every way is scored by one definition: the seconds of the busiest stage for one microbatch, forward, backward and the
transfers at its cuts, on counted costs. Numbers are ratios to the lower bound that the solver proves, so 1.000 is an
optimum; the bound holds for all ways.

    layers          equally many layers a stage, as one writes by hand
    by time         torchgpipe's balance_by_time: layers in order, balanced by their seconds (by its own solver)
    compute         the best plan for seconds alone, by our solver, blind to transfers
    pipecompile     the plan that ``compile`` makes
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import nn
from unet import UNet

from pipecompile.capture import capture, read_call, summarize
from pipecompile.ir.cluster import Cluster
from pipecompile.ir.graph import CostedGraph
from pipecompile.ir.plan_options import SEARCH_SECONDS
from pipecompile.partition.from_graph import problem_of
from pipecompile.partition.solver.contraction import Contraction
from pipecompile.partition.solver.score import bottleneck
from pipecompile.partition.solver.solver import solve
from pipecompile.partition.stage_nodes import Placed
from pipecompile.profile import profile

ROWS = 4  # of a microbatch
Inputs = dict[str, torch.Tensor]


def tokens(length: int, vocabulary: int, **more: torch.Tensor) -> Inputs:
    ids = torch.randint(vocabulary, (ROWS, length))
    return {"input_ids": ids, "labels": ids, **more}


def gpt2(**config: int) -> tuple[nn.Module, Inputs]:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**config)), tokens(1024, 50257)


def t5() -> tuple[nn.Module, Inputs]:
    config = transformers.T5Config(d_model=768, d_ff=3072, num_layers=12, num_heads=12, decoder_start_token_id=0)
    return transformers.T5ForConditionalGeneration(config), tokens(512, 32128)


def clip() -> tuple[nn.Module, Inputs]:
    images = torch.randn(ROWS, 3, 224, 224)
    return transformers.CLIPModel(transformers.CLIPConfig()), {
        "input_ids": torch.randint(49000, (ROWS, 77)),
        "pixel_values": images,
    }


def experts() -> tuple[nn.Module, Inputs]:
    config = transformers.MixtralConfig(
        hidden_size=1024, intermediate_size=3584, num_hidden_layers=16, num_attention_heads=16, num_key_value_heads=8
    )
    return transformers.MixtralForCausalLM(config), tokens(1024, 32000)


def unet() -> tuple[nn.Module, Inputs]:
    return UNet(), {"images": torch.randn(ROWS, 3, 64, 64), "noise": torch.randn(ROWS, 3, 64, 64)}


# A model, and the lists whose entries are its layers, in order.
MODELS: dict[str, tuple[Callable[[], tuple[nn.Module, Inputs]], str]] = {
    "GPT-2": (gpt2, r"transformer\.h\.\d+"),
    "GPT-2 XL": (lambda: gpt2(n_layer=48, n_embd=1600, n_head=25), r"transformer\.h\.\d+"),
    "T5 base": (t5, r"(encoder|decoder)\.block\.\d+"),
    "U-Net": (unet, r"(down|up)\.\d+"),
    "CLIP": (clip, r"(text|vision)_model\.encoder\.layers\.\d+"),
    "Mixtral, small": (experts, r"model\.layers\.\d+"),
}
SEQUENTIAL = ("GPT-2", "GPT-2 XL", "Mixtral, small")  # what could be written as an nn.Sequential


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", default="2,4,8", type=lambda text: [int(part) for part in text.split(",")])
    parser.add_argument("--models", default="", help="a pattern that names must contain")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    rows = []
    for name in MODELS:
        if re.search(options.models, name):
            rows += compare(name, options.stages)
    Console(width=120).print(_table(rows))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(rows, indent=1))


def compare(name: str, stages: Sequence[int]) -> list[dict[str, Any]]:
    build, pattern = MODELS[name]
    torch.manual_seed(0)
    with torch.device("meta"):
        model, inputs = build()
    call = read_call(model.forward, (), {key: torch.zeros(t.shape, dtype=t.dtype) for key, t in inputs.items()})
    captured = capture(model, call, None)
    graph = summarize(captured)
    costed = profile(captured, graph, "count")
    return [_row(name, pattern, costed, count) for count in stages]


def _row(name: str, pattern: str, costed: CostedGraph, stages: int) -> dict[str, Any]:
    contraction = problem_of(costed, stages, Cluster.of([f"rank {rank}" for rank in range(stages)]))
    problem = contraction.problem
    found = solve(problem, SEARCH_SECONDS)
    quality = found.quality
    layer_of = layers(costed, contraction, pattern)
    count = 1 + max(layer_of)
    ways = {
        "layers": _forward(problem.arcs, [layer * stages // count for layer in layer_of]),
        "by time": _by_time(problem.seconds, layer_of, stages) if name in SEQUENTIAL else None,
        "compute": solve(replace(problem, nets=()), SEARCH_SECONDS).stage_of,
        "pipecompile": found.stage_of,
    }
    scores = {way: bottleneck(problem, plan) / quality.lower_bound if plan else None for way, plan in ways.items()}
    return {
        "model": name, "nodes": len(costed.graph), "stages": stages, "bound": quality.lower_bound,
        "proven": quality.proven, "seconds": quality.seconds, **scores,
    }  # fmt: skip


def layers(costed: CostedGraph, contraction: Contraction, pattern: str) -> list[int]:
    """The layer of each atom: that of its nodes, or, outside of layers, the last one that anything before it is in."""
    names: dict[str, int] = {}
    of_thing: list[int | None] = []
    for index in Placed(costed.graph).nodes:
        match = re.search(pattern, costed.graph.nodes[index].path)
        of_thing.append(names.setdefault(match[0], len(names)) if match else None)
    layer_of = [0] * len(contraction.problem)
    known = [max((of_thing[t] or 0 for t in things), default=0) for things in _things(contraction)]
    inside = [any(of_thing[t] is not None for t in things) for things in _things(contraction)]
    before: dict[int, list[int]] = {}
    for low, high in contraction.problem.arcs:
        before.setdefault(high, []).append(low)
    for atom in range(len(layer_of)):  # atoms are in topological order
        layer_of[atom] = (
            known[atom] if inside[atom] else max((layer_of[low] for low in before.get(atom, ())), default=0)
        )
    return layer_of


def _things(contraction: Contraction) -> list[list[int]]:
    things: list[list[int]] = [[] for _ in range(len(contraction.problem))]
    for thing, atom in enumerate(contraction.atom_of):
        things[atom].append(thing)
    return things


def _by_time(seconds: Sequence[float], layer_of: Sequence[int], stages: int) -> list[int] | None:
    try:
        from torchgpipe.balance import blockpartition
    except ImportError:
        return None
    sums = [0.0] * (1 + max(layer_of))
    for atom, layer in enumerate(layer_of):
        sums[layer] += seconds[atom]
    blocks = blockpartition.solve(sums, stages)
    stage_of_layer = [stage for stage, block in enumerate(blocks) for _ in block]
    return [stage_of_layer[layer] for layer in layer_of]


def _forward(arcs: Sequence[tuple[int, int]], stage_of: list[int]) -> list[int]:
    """The stages with every atom no earlier than what it reads."""
    for low, high in sorted(arcs, key=lambda arc: arc[1]):
        stage_of[high] = max(stage_of[high], stage_of[low])
    return stage_of


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    ways = ("layers", "by time", "compute", "pipecompile")
    table = Table("model", "nodes", "stages", "bound", *ways, "CPU s")
    for row in rows:
        scores = ["-" if row[way] is None else f"{row[way]:.3f}" for way in ways]
        table.add_row(
            row["model"], f"{row['nodes']:,}", str(row["stages"]), f"{1e3 * row['bound']:.2f} ms", *scores,
            f"{row['seconds']:.1f}",
        )  # fmt: skip
    return table


if __name__ == "__main__":
    main()
