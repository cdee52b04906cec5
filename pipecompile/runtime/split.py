"""Splits a captured graph into stage modules.

A stage is a ``torch.fx.GraphModule`` whose parameters and buffers are the model's own, under their original names. Its
arguments are the model inputs that it reads, then the values that earlier stages send. It returns the values that later
stages read, and the model outputs that it computes.

Rematerialized values (masks, positions, sizes) are computed by each stage that reads them. Regions (no_grad, autocast)
are entered and left by calls in the code. A checkpointed part of the model is one call of a graph of its own.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor, nn

from pipecompile.capture import Captured
from pipecompile.capture.opaque_calls import FunctionLeaf
from pipecompile.capture.origin import Origin, origin_of
from pipecompile.capture.purity import is_random
from pipecompile.capture.state.model_state import named_tensors
from pipecompile.ir.graph import Graph
from pipecompile.ir.plan import Plan, members
from pipecompile.ops.accelerators import is_accelerator
from pipecompile.ops.checkpoint import Recomputed
from pipecompile.ops.compiled_part import CompiledPart
from pipecompile.ops.device_args import retarget, same_device
from pipecompile.ops.modes import PLAIN, Autocast, Region, enter_region, exit_region, regions_left
from pipecompile.ops.module_tree import called_bare, owner_of
from pipecompile.ops.names import in_code, in_graph_module, in_model, placeholder
from pipecompile.ops.randomness import seeded


@dataclass(frozen=True)
class Stage:
    """One stage of a split model. Values are named as in the captured graph.

    The module is called with ``arguments`` and returns ``returns``, in order. If a value may come from or go to several
    replicas, one of them works on a given microbatch.
    """

    index: int
    device: torch.device
    module: fx.GraphModule
    names: Mapping[str, str]  # the module's parameters, and buffers that may live elsewhere -> the model's first names
    inputs: tuple[str, ...]  # model inputs
    receives: Mapping[int, tuple[str, ...]]  # source stage -> values
    arguments: tuple[str, ...]  # inputs, then values received
    sends: Mapping[int, tuple[str, ...]]  # target stage -> values
    outputs: tuple[str, ...]  # model outputs
    returns: tuple[str, ...]
    origins: Mapping[str, Origin]  # by node
    backend: str = ""  # of torch.compile, if it compiles the stage
    uncompiled: Mapping[str, int] = field(default_factory=dict)  # calls that it then leaves as they are, by reason

    @property
    def modules(self) -> str:
        """The first and the last module that the stage runs: "modules 'h.0.attn' to 'h.5.mlp'"."""
        paths = [origin.path for origin in self.origins.values() if origin.path]
        return f"modules {paths[0]!r} to {paths[-1]!r}" if paths else "the model's own forward"

    @property
    def code(self) -> str:
        """The stage as Python code, then the code of each part that is compiled or that the backward recomputes."""
        return "".join([str(self.module.code), *(f"\n\n# {s.__name__}\n{s.module.code}" for s in _inner(self.module))])

    @property
    def compiled(self) -> tuple[CompiledPart, ...]:
        """The parts that ``torch.compile`` compiles, in order."""
        return tuple(part for part in _inner(self.module) if isinstance(part, CompiledPart))


def _inner(module: fx.GraphModule) -> Iterator[Recomputed | CompiledPart]:
    """The calls of graphs of their own in a graph, and those inside them."""
    for node in module.graph.nodes:
        if isinstance(node.target, Recomputed | CompiledPart):
            yield node.target
            yield from _inner(node.target.module)


def split(captured: Captured, graph: Graph, plan: Plan, devices: Sequence[torch.device]) -> tuple[Stage, ...]:
    """The stages of a plan; stage ``s`` runs on ``devices[plan.rank_of[s]]``."""
    cut, places = _Cut(captured, graph, plan), [devices[rank] for rank in plan.rank_of]
    return tuple(cut.stage(s, device, len({*places}) > 1) for s, device in enumerate(places))


@dataclass(frozen=True)
class Piece:
    """Some nodes of a captured graph as one module, called with ``inputs`` then ``received``; returns a tuple."""

    module: fx.GraphModule
    inputs: tuple[str, ...]  # model inputs
    received: tuple[str, ...]
    returns: tuple[str, ...]


def cut_out(captured: Captured, names: Sequence[str], returns: Sequence[str], device: torch.device) -> Piece:
    """A module of the nodes ``names`` for a device; values from other nodes are received as arguments."""
    chosen = set(names)
    nodes = {n.name: n for n in captured.graph.nodes}
    run = [n for n in captured.graph.nodes if n.name in chosen and n.op != "get_attr"]
    sources = dict.fromkeys(s.name for n in run for s in n.all_input_nodes if s.op != "get_attr")
    received = tuple(name for name in sources if name not in chosen)
    graph = _graph(run, received, returns, nodes, captured, device, captured.recomputed)
    module = _module(graph, captured.tensors, captured.leaf, "Piece")
    inputs = tuple(n.name for n in run if n.op == "placeholder")
    return Piece(module, inputs, received, tuple(returns))


class _Cut:
    """The data that all stages of one split share."""

    def __init__(self, captured: Captured, graph: Graph, plan: Plan) -> None:
        self.captured = captured
        self.graph = graph
        self.plan = plan
        self.nodes: dict[str, fx.Node] = {n.name: n for n in captured.graph.nodes}
        self.model_outputs = tuple(dict.fromkeys(str(result.node) for result in captured.results))
        self.tensors = captured.tensors

    def stage(self, index: int, device: torch.device, apart: bool) -> Stage:
        """One stage; ``apart``: whether another capture may move a buffer of this one to another device."""
        run = [self.nodes[self.graph.nodes[i].name] for i in members(self.graph, self.plan, index)]
        inputs = tuple(n.name for n in run if n.op == "placeholder")
        receives = {c.source: self._names(c.values) for c in self.plan.incoming[index]}
        sends = {c.target: self._names(c.values) for c in self.plan.outgoing[index]}
        outputs = tuple(name for name in self.model_outputs if self._makes(index, name))
        returns = tuple(dict.fromkeys([*(v for values in sends.values() for v in values), *outputs]))
        received = list(dict.fromkeys(name for values in receives.values() for name in values))
        regions = (
            dict.fromkeys(self.captured.repeatable, 0) if index in self.plan.recomputed else self.captured.recomputed
        )
        graph = _graph(run, received, returns, self.nodes, self.captured, device, regions)
        module = _module(graph, self.tensors, self.captured.leaf, f"Stage{index}")
        origins = {n.name: origin_of(n) for n in run}
        arguments = (*inputs, *received)
        first = self.captured.first_names
        names = {
            name: first.get(id(tensor), in_model(name))
            for name, tensor in named_tensors(module)
            if isinstance(tensor, nn.Parameter) or tensor.device != device or apart
        }
        return Stage(
            index=index, device=device, module=module, names=names, inputs=inputs, receives=receives,
            arguments=arguments, sends=sends, outputs=outputs, returns=returns, origins=origins,
        )  # fmt: skip

    def _names(self, values: Sequence[int]) -> tuple[str, ...]:
        return tuple(self.graph.nodes[i].name for i in values)

    def _makes(self, stage: int, name: str) -> bool:
        """Whether a stage returns a model output: its own, or, for the last stage, a rematerialized one."""
        owner = self.owner.get(name)
        return (self.plan.replica_of[-1] if owner is None else owner) == self.plan.replica_of[stage]

    @property
    def owner(self) -> dict[str, int | None]:
        return {node.name: stage for node, stage in zip(self.graph.nodes, self.plan.stage_of, strict=True)}


def _graph(
    run: Sequence[fx.Node],
    received: Sequence[str],
    returns: Sequence[str],
    nodes: Mapping[str, fx.Node],
    captured: Captured,
    device: torch.device,
    regions: Mapping[str, int],
) -> fx.Graph:
    """The graph of one stage.

    Args:
        regions: the region of each node that the backward recomputes; adjacent nodes of one region recompute together.
    """
    writer = _Writer(captured.device, device)
    for source in [n for n in run if n.op == "placeholder"] + [nodes[name] for name in received]:
        writer.argument(source)
    returned = [nodes[name] for name in returns]
    body = [n for n in run if n.op != "placeholder"]
    for region, stretch in groupby(body, lambda n: regions.get(n.name)):
        members = list(stretch)
        inside = set(members)
        results = [n for n in members if n in returned or not inside.issuperset(n.users)]
        if region is None or not any(_wants_gradient(n) for n in results):
            for source in members:
                writer.write(source)
        else:
            writer.write_recomputed(members, results, f"recompute_{region}")
    return writer.close(returned)


def _wants_gradient(node: fx.Node) -> bool:
    return any(isinstance(t, Tensor) and t.requires_grad for t in torch.utils._pytree.tree_leaves(node.meta.get("val")))


class _Writer:
    """Writes nodes of the captured graph, made for the device ``old``, into a graph for the device ``new``."""

    def __init__(self, old: torch.device, new: torch.device) -> None:
        self.graph = fx.Graph()
        self.old, self.new = old, new
        self.copies: dict[fx.Node, fx.Node] = {}
        self.region = _Regions(self.graph)

    def argument(self, source: fx.Node) -> None:
        self.copies[source] = placeholder(self.graph, source.name)
        self.copies[source].meta = _meta(source)

    def read(self, source: fx.Node) -> fx.Node:
        """The copy of a node in this graph; an attribute is copied on first use."""
        if source.op == "get_attr" and source not in self.copies:
            self.copies[source] = self.graph.get_attr(in_code(in_graph_module(str(source.target))))
            self.copies[source].meta = _meta(source)
        return self.copies[source]

    def write(self, source: fx.Node) -> None:
        old, new = self.old, self.new
        for attribute in source.all_input_nodes:
            self.read(attribute)
        self.region.change(_moved(origin_of(source).region, old, new))
        copy = self.graph.node_copy(source, self.copies.__getitem__)
        if source.op == "call_function" and is_random(source) and callable(source.target):
            copy.target = seeded(source.target, source.name, new)
        if isinstance(source.target, FunctionLeaf):
            copy.target = source.target.on(old, new)
        if source.op == "call_module":
            copy.target = in_code(in_graph_module(str(source.target)))
        copy.args, copy.kwargs = retarget(copy.args, old, new), retarget(copy.kwargs, old, new)
        if _makes_on_default_device(source, old) and (old.type != new.type or is_accelerator(new)):
            copy.kwargs = {**copy.kwargs, "device": new}
        self.copies[source] = copy

    def write_recomputed(self, members: Sequence[fx.Node], results: Sequence[fx.Node], name: str) -> None:
        """Writes nodes that the backward recomputes, as one call of a graph of their own."""
        inner = _Writer(self.old, self.new)
        outside = dict.fromkeys(n for member in members for n in member.all_input_nodes if n not in members)
        values = [self.read(source) for source in outside]
        for source in outside:
            inner.argument(source)
        for member in members:
            inner.write(member)
        module = quiet(fx.GraphModule(nn.Module(), inner.close(results)))
        self.region.change(PLAIN)
        call = self.graph.call_function(Recomputed(module, name), tuple(values))
        for index, result in enumerate(results):
            self.copies[result] = self.graph.call_function(operator.getitem, (call, index))
            self.copies[result].meta = {"val": result.meta.get("val")}

    def close(self, returned: Sequence[fx.Node]) -> fx.Graph:
        self.region.change(PLAIN)
        self.graph.output(tuple(self.read(node) for node in returned))
        return self.graph


def _meta(source: fx.Node) -> dict[str, Any]:
    """What is known of a value; of a parameter or buffer, which one it is."""
    return {**source.meta, "attribute": source.target} if source.op == "get_attr" else dict(source.meta)


# Functions that create a tensor on the default device unless device= is given.
FACTORIES = frozenset(
    {
        torch.arange, torch.as_tensor, torch.empty, torch.eye, torch.full, torch.linspace, torch.logspace, torch.ones,
        torch.rand, torch.randint, torch.randn, torch.randperm, torch.tensor, torch.tril_indices, torch.triu_indices,
        torch.zeros, torch.bartlett_window, torch.blackman_window, torch.hamming_window, torch.hann_window,
        torch.kaiser_window, torch.empty_strided, torch.normal,
    }
)  # fmt: skip


def _makes_on_default_device(node: fx.Node, old: torch.device) -> bool:
    """Whether a call created a tensor on the traced device without device=."""
    value = node.meta.get("val")
    made_here = isinstance(value, Tensor) and same_device(value.device, old)
    return node.target in FACTORIES and made_here and node.kwargs.get("device") is None


def _moved(region: Region, old: torch.device, new: torch.device) -> Region:
    """The region with autocast for the stage's device type in place of the traced one."""
    moved = ((new.type if kind == old.type else kind, name, on, shares) for kind, name, on, shares in region.autocast)
    return replace(region, autocast=tuple(moved))


class _Regions:
    """Writes the calls that enter and leave regions: an outermost autocast, and within it the other modes.

    It stays entered while the others change, as in the model: until it ends, torch keeps the casts of weights.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.current = PLAIN
        self.outer: fx.Node | None = None
        self.inner: fx.Node | None = None

    def change(self, region: Region) -> None:
        is_same = region.entry == self.current.entry
        if region == self.current and is_same:
            return
        self._leave(self.inner)
        if not is_same:
            self._leave(self.outer)
            self.outer = self._enter(True, region.autocast[:1])
        self.inner = self._enter(region.grad, region.autocast[1:])
        self.current = region

    def _enter(self, grad: bool, autocast: tuple[Autocast, ...]) -> fx.Node | None:
        return None if grad and not autocast else self.graph.call_function(enter_region, (grad, autocast))

    def _leave(self, entered: fx.Node | None) -> None:
        if entered is not None:
            self.graph.call_function(exit_region, (entered,))


def _module(
    graph: fx.Graph,
    tensors: Mapping[str, Tensor],
    leaf: Callable[[str, Mapping[str, Tensor]], nn.Module],
    name: str,
) -> fx.GraphModule:
    """A graph module on the model's own tensors, under their own names, unless graph modules have taken these."""
    root = nn.Module()
    for target in dict.fromkeys(str(n.target) for n in graph.nodes if n.op == "call_module"):
        owner, last = owner_of(root, target)
        owner.add_module(last, leaf(in_model(target), tensors))
    for target in dict.fromkeys(str(n.target) for n in graph.nodes if n.op == "get_attr"):
        owner, last = owner_of(root, target)
        tensor = tensors[in_model(target)]
        if last in owner._parameters or last in owner._buffers:
            continue  # it belongs to a leaf module
        if isinstance(tensor, nn.Parameter):
            owner.register_parameter(last, tensor)
        else:
            owner.register_buffer(last, tensor)
    return quiet(fx.GraphModule(root, graph, class_name=name))


def quiet(module: fx.GraphModule) -> fx.GraphModule:
    """A graph module whose failing call does not print to stderr; the runtime reports the error.

    Global module hooks (``register_module_forward_hook``) do not run on it, since it is not one of the model's modules.
    Nor does such a call leave its thread in a region of the model.
    """
    kind: Any = type(module)
    enters = any(node.target is enter_region for node in module.graph.nodes)
    kind.__call__ = regions_left()(called_bare) if enters else called_bare
    return module
