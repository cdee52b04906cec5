"""Writes operator graphs of BERT and ResNet-50 in the JSON format of the NeurIPS 2020 artifact, to be partitioned.

    python benchmarks/operator_graphs.py out/operators
    python benchmarks/partition.py --instances out/operators --stages 2,4,8

A model is exported and decomposed to core aten operations; each is a node, and so is each weight. Latencies are those
of a V100's roofline in milliseconds, a cost is a tensor's way over 12 GB/s. In training each operation has a backward
node of its colour class, twice as long, whose edges lead back. They are like the operator graphs of the artifact in
size and form, not the same graphs.

Source of the format: Tarnawski et al. (NeurIPS 2020); see ``instances.py``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torchvision
import transformers
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

FLOPS, MEMORY, LINK = 14e12, 900e9, 12e9  # of a V100, and of PCIe
LIMIT = 16 * 2**30  # bytes of a device
Json = dict[str, Any]


def bert(layers: int) -> tuple[nn.Module, Tensor]:
    config = transformers.BertConfig(num_hidden_layers=layers)
    model = transformers.BertForMaskedLM(config)
    return model, torch.zeros(8, 512, dtype=torch.int64)


def resnet() -> tuple[nn.Module, Tensor]:
    return torchvision.models.resnet50(), torch.zeros(32, 3, 224, 224)


MODELS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "bert_l-3": lambda: bert(3),
    "bert_l-6": lambda: bert(6),
    "bert_l-12": lambda: bert(12),
    "resnet50": resnet,
}


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for (name, build), training in product(MODELS.items(), (False, True)):
        model, example = build()
        graph = instance(exported(model.eval(), example), training)
        path = folder / f"{name}_{'training' if training else 'inference'}.json"
        path.write_text(json.dumps(graph))
        print(f"{path}: {len(graph['nodes'])} nodes, {len(graph['edges'])} edges")


def exported(model: nn.Module, example: Tensor) -> fx.Graph:
    with torch.no_grad():
        program = torch.export.export(model, (example,), strict=False)
    return program.run_decompositions().graph


def instance(graph: fx.Graph, training: bool) -> Json:
    nodes = [node for node in graph.nodes if node.op in ("placeholder", "call_function") and node.users]
    ids = {node: 2 * index for index, node in enumerate(nodes)}
    turned = {node for node in nodes if training and node.op == "call_function"}
    rows, edges = [], []
    for node in nodes:
        weight = sum(t.nbytes for t in tensors(node)) if node.op == "placeholder" else 0
        rows.append(
            _row(ids[node], f"{node.name}", False, ids[node], milliseconds(node), weight * (3 if training else 1))
        )
        if node in turned:
            kept = sum(t.nbytes for t in tensors(node))
            rows.append(_row(ids[node] + 1, f"{node.name} grad", True, ids[node], 2 * milliseconds(node), kept))
        for user in node.users:
            if user in ids:
                edges.append(_edge(ids[node], ids[user], cost(node)))
            if node in turned and user in turned:
                edges.append(_edge(ids[user] + 1, ids[node] + 1, cost(user)))
    return {"maxSizePerFPGA": LIMIT, "maxFPGAs": 6, "maxCPUs": 1, "nodes": rows, "edges": edges}


def tensors(node: fx.Node) -> list[Tensor]:
    return [value for value in tree_leaves(node.meta.get("val")) if isinstance(value, Tensor)]


def milliseconds(node: fx.Node) -> float:
    """Of one operation on a V100; a view and a weight take none."""
    if node.op == "placeholder":
        return 0.0
    read = [t for source in node.all_input_nodes for t in tensors(source)]
    written = tensors(node)
    if {t.untyped_storage()._cdata for t in written} <= {t.untyped_storage()._cdata for t in read}:
        return 0.0
    moved = sum(t.nbytes for t in (*read, *written)) / MEMORY
    packet = getattr(node.target, "overloadpacket", None)
    flops = 0
    if packet in flop_registry:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        flops = flop_registry[packet](*args, **kwargs, out_val=node.meta["val"])
    return 1e3 * max(moved, flops / FLOPS)


def cost(node: fx.Node) -> float:
    """Milliseconds that a node's value is on its way."""
    return 1e3 * sum(t.nbytes for t in tensors(node)) / LINK


def _row(number: int, name: str, backward: bool, colour: int, latency: float, size: float) -> Json:
    return {
        "name": name,
        "id": number,
        "supportedOnFpga": 1,
        "cpuLatency": 10 * latency,
        "fpgaLatency": latency,
        "isBackwardNode": int(backward),
        "colorClass": colour,
        "size": size,
    }


def _edge(source: int, target: int, milliseconds: float) -> Json:
    return {"sourceId": source, "destId": target, "cost": milliseconds}


if __name__ == "__main__":
    main()
