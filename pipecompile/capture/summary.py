"""Converts a captured model to a ``Graph``, the torch-free form that all planning works on."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch.fx as fx
from torch import Tensor

from pipecompile.capture.captured import Captured
from pipecompile.capture.functionalize import storage_key
from pipecompile.capture.origin import origin_of
from pipecompile.capture.purity import has_effect, is_cheap, name_of
from pipecompile.ir.graph import Graph, Node, Parameter, TensorSpec
from pipecompile.ir.split_nodes import SPLITTINGS
from pipecompile.ops.source_lines import short
from pipecompile.ops.splittable import fits, weights_of
from pipecompile.ops.symbols import resolve


def summarize(captured: Captured) -> Graph:
    """Returns the graph of a captured model, with the sizes of the sample microbatch."""
    fx_nodes = [n for n in captured.graph.nodes if n.op not in ("get_attr", "output")]
    index = {n: i for i, n in enumerate(fx_nodes)}
    parameters = dict(captured.model.named_parameters(remove_duplicate=False))
    sizes = captured.sample_sizes
    written = {name for n in fx_nodes for name in origin_of(n).writes}
    nodes: list[Node] = []
    for n in fx_nodes:
        attributes = [str(a.target) for a in n.all_input_nodes if a.op == "get_attr"]
        inputs = tuple(index[a] for a in n.all_input_nodes if a.op != "get_attr")
        origin = origin_of(n)
        outputs = tuple(_specs(n.meta.get("val"), sizes)) if n.op != "call_method" else ()
        if n.op == "call_module":
            attributes += captured.leaf_parameters(str(n.target))
        read = tuple(dict.fromkeys(a for a in attributes if a in parameters))
        nodes.append(
            Node(
                name=n.name,
                op="input" if n.op == "placeholder" else name_of(n),
                inputs=inputs,
                outputs=outputs,
                parameters=read,
                path=origin.path,
                source=short(origin.source),
                rematerialized=not read
                and not written.intersection(attributes)
                and all(nodes[i].rematerialized for i in inputs)
                and _may_repeat(n, outputs),
                writes=origin.writes,
                whole=_is_whole(n, parameters),
            )
        )
    if all(node.rematerialized for node in nodes):  # no parameters, no gradients: still something to run
        nodes = [node if node.op == "input" else replace(node, rematerialized=False) for node in nodes]
    used = dict.fromkeys(name for node in nodes for name in node.parameters)
    output = next(n for n in captured.graph.nodes if n.op == "output")
    return Graph(
        nodes=tuple(nodes),
        inputs=tuple(i for i, n in enumerate(fx_nodes) if n.op == "placeholder"),
        outputs=tuple(dict.fromkeys(index[n] for n in output.all_input_nodes if n in index)),
        parameters=tuple(Parameter(name, _spec(parameters[name], sizes)) for name in used),
        together=tuple(_together(captured, fx_nodes, index, nodes)),
    )


def _is_whole(n: fx.Node, parameters: Mapping[str, Tensor]) -> bool:
    """Whether no backward of a call is split, though its function has a split form: what it reads does not fit."""
    if name_of(n) not in SPLITTINGS:
        return False
    weights = weights_of(n)
    if weights is None or not all(weight.op == "get_attr" for weight in weights) or not fits(n):
        return True
    trained = {name for name, parameter in parameters.items() if parameter.requires_grad}
    return trained.isdisjoint(str(weight.target) for weight in weights)


def _may_repeat(n: fx.Node, outputs: tuple[TensorSpec, ...]) -> bool:
    if n.op in ("placeholder", "call_module"):
        return n.op == "placeholder"
    return not has_effect(n) and is_cheap(n) and not any(spec.requires_grad for spec in outputs)


def _together(
    captured: Captured, fx_nodes: list[fx.Node], index: Mapping[fx.Node, int], nodes: list[Node]
) -> Iterable[tuple[int, ...]]:
    """Yields groups of nodes that must share a stage, without the rematerialized ones, which every stage has."""
    by_name = {n.name: i for n, i in index.items()}
    groups: list[list[int]] = [[by_name[name] for name in group if name in by_name] for group in captured.groups]
    groups += [[index[n.args[0]], i] for n, i in index.items() if _is_item(n) and n.args[0] in index]  # type: ignore[index]
    groups += [[i, j] for i in index.values() if (j := _neighbour(i, fx_nodes, nodes)) is not None]
    groups += _around_buffers(captured, fx_nodes, index)
    for group in groups:
        placed = tuple(sorted({i for i in group if not nodes[i].rematerialized}))
        if len(placed) > 1:
            yield placed


def _around_buffers(captured: Captured, fx_nodes: list[fx.Node], index: Mapping[fx.Node, int]) -> Iterable[list[int]]:
    """Yields, for each buffer that is written directly or as a copy, its writers and all nodes that read or view it."""
    writers: dict[str, list[int]] = {}
    for n in fx_nodes:
        for name in (*origin_of(n).writes, *origin_of(n).copies):
            writers.setdefault(name, []).append(index[n])
    for name, group in writers.items():
        roots = [n for n in captured.graph.nodes if n.op == "get_attr" and str(n.target) == name]
        memory = {storage_key(n.meta["val"]) for n in roots} - {None}
        for n in captured.graph.nodes:
            value = n.meta.get("val")
            if isinstance(value, Tensor) and storage_key(value) in memory:
                group += [index[m] for m in (n, *n.users) if m in index]
        yield group


def _neighbour(i: int, fx_nodes: list[fx.Node], nodes: list[Node]) -> int | None:
    """For a write to a buffer whose value is not used otherwise (a counter): the next node of the same module."""
    if (
        not origin_of(fx_nodes[i]).writes
        or fx_nodes[i].users
        or not all(nodes[j].rematerialized for j in nodes[i].inputs)
    ):
        return None
    later = [j for j in range(i + 1, len(nodes)) if not nodes[j].rematerialized]
    return next((j for j in later if nodes[j].path == nodes[i].path), later[0] if later else None)


def _is_item(n: fx.Node) -> bool:
    """Whether a node selects an item of a tuple or list, which itself is never sent to another stage."""
    if n.target is not operator.getitem:
        return False
    source = n.args[0]
    return isinstance(source, fx.Node) and not isinstance(source.meta.get("val"), Tensor)


def _specs(value: Any, sizes: Mapping[Any, int]) -> Iterable[TensorSpec]:
    if isinstance(value, Tensor):
        yield _spec(value, sizes)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _specs(item, sizes)


def _spec(tensor: Tensor, sizes: Mapping[Any, int]) -> TensorSpec:
    shape = tuple(int(resolve(size, sizes)) for size in tensor.shape)
    return TensorSpec(shape, str(tensor.dtype).removeprefix("torch."), tensor.requires_grad)
