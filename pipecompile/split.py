"""Cuts a captured graph into stage modules.

A stage is a ``torch.fx.GraphModule`` that owns no tensors of its own: its parameters and buffers are the model's, under
their original names. Its arguments are the model inputs that it reads, then the values that earlier stages send it. It
returns the values that later stages read, and the model outputs that it makes.

Values that are replicated (masks, positions, sizes) are computed again in each stage that reads them. Regions (no_grad,
autocast) are entered and left by calls in the code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor, nn

from pipecompile.capture import Captured
from pipecompile.capture.leaves import FunctionLeaf
from pipecompile.capture.origin import origin_of
from pipecompile.capture.purity import is_random
from pipecompile.graph import Graph
from pipecompile.modules import owner_of
from pipecompile.plan import Plan, members
from pipecompile.randomness import seeded
from pipecompile.regions import PLAIN, Region, enter_region, exit_region
from pipecompile.retarget import retarget, same_device


@dataclass(frozen=True)
class Stage:
    """One stage of a split model. Values are named as in the captured graph.

    The module is called with ``inputs`` then ``receives``, in order, and returns ``returns``, in order.
    """

    index: int
    device: torch.device
    module: fx.GraphModule
    inputs: tuple[str, ...]  # model inputs
    receives: Mapping[int, tuple[str, ...]]  # source stage -> values
    sends: Mapping[int, tuple[str, ...]]  # target stage -> values
    outputs: tuple[str, ...]  # model outputs
    returns: tuple[str, ...]
    origins: Mapping[str, str]  # node -> "module 'h.0.attn', model.py:12", for error messages

    @property
    def modules(self) -> str:
        """The first and the last module that the stage runs: "modules 'h.0.attn' to 'h.5.mlp'"."""
        named = [origin for origin in self.origins.values() if origin.startswith("module ")]
        paths = [origin.removeprefix("module ").split(",")[0] for origin in named]
        return f"modules {paths[0]} to {paths[-1]}" if paths else "the model's own forward"

    @property
    def code(self) -> str:
        """The stage as Python."""
        return str(self.module.code)


def split(captured: Captured, graph: Graph, plan: Plan, devices: Sequence[torch.device]) -> tuple[Stage, ...]:
    """The stages of a plan; stage ``s`` is written for ``devices[plan.rank_of[s]]``."""
    cut = _Cut(captured, graph, plan)
    return tuple(cut.stage(s, devices[plan.rank_of[s]]) for s in range(plan.num_stages))


class _Cut:
    """What the stages of one split share."""

    def __init__(self, captured: Captured, graph: Graph, plan: Plan) -> None:
        self.captured = captured
        self.graph = graph
        self.plan = plan
        self.nodes: dict[str, fx.Node] = {n.name: n for n in captured.graph.nodes}
        self.model_outputs = tuple(dict.fromkeys(o.node for o in captured.outputs if o.node is not None))
        self.tensors = captured.tensors

    def stage(self, index: int, device: torch.device) -> Stage:
        run = [self.nodes[self.graph.nodes[i].name] for i in members(self.graph, self.plan, index)]
        inputs = tuple(n.name for n in run if n.op == "placeholder")
        receives = {c.source: self._names(c.values) for c in self.plan.incoming[index]}
        sends = {c.target: self._names(c.values) for c in self.plan.outgoing[index]}
        outputs = tuple(name for name in self.model_outputs if self._makes(index, name))
        returns = tuple(dict.fromkeys([*(v for values in sends.values() for v in values), *outputs]))
        received = [name for values in receives.values() for name in values]
        graph = _graph(run, received, returns, self.nodes, self.captured.device, device)
        module = _module(graph, self.tensors, self.captured.leaf, index)
        origins = {n.name: str(origin_of(n)) for n in run}
        return Stage(index, device, module, inputs, receives, sends, outputs, returns, origins)

    def _names(self, values: Sequence[int]) -> tuple[str, ...]:
        return tuple(self.graph.nodes[i].name for i in values)

    def _makes(self, stage: int, name: str) -> bool:
        """Whether a stage returns a model output: its own, or, for the last stage, a replicated one."""
        owner = self.owner.get(name)
        return (self.plan.num_stages - 1 if owner is None else owner) == stage

    @property
    def owner(self) -> dict[str, int | None]:
        return {node.name: stage for node, stage in zip(self.graph.nodes, self.plan.stage_of, strict=True)}


def _graph(
    run: Sequence[fx.Node],
    received: Sequence[str],
    returns: Sequence[str],
    nodes: Mapping[str, fx.Node],
    old: torch.device,
    new: torch.device,
) -> fx.Graph:
    """The graph of one stage."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for source in [n for n in run if n.op == "placeholder"] + [nodes[name] for name in received]:
        copies[source] = graph.placeholder(source.name)
    region = _Regions(graph)
    for source in (n for n in run if n.op != "placeholder"):
        for attribute in (a for a in source.all_input_nodes if a.op == "get_attr" and a not in copies):
            copies[attribute] = graph.get_attr(str(attribute.target))
        region.change(_moved(origin_of(source).region, old, new))
        copy = graph.node_copy(source, copies.__getitem__)
        if source.op == "call_function" and is_random(source) and callable(source.target):
            copy.target = seeded(source.target, source.name, new)
        if isinstance(source.target, FunctionLeaf):
            copy.target = source.target.on(old, new)
        copy.args, copy.kwargs = retarget(copy.args, old, new), retarget(copy.kwargs, old, new)
        if _makes_on_default_device(source, old) and old.type != new.type:
            copy.kwargs = {**copy.kwargs, "device": new}
        copies[source] = copy
    region.change(PLAIN)
    graph.output(tuple(copies[nodes[name]] for name in returns))
    return graph


# Functions that make a tensor on the default device unless they are told another.
FACTORIES = frozenset(
    {
        torch.arange, torch.as_tensor, torch.empty, torch.eye, torch.full, torch.linspace, torch.logspace, torch.ones,
        torch.rand, torch.randint, torch.randn, torch.randperm, torch.tensor, torch.tril_indices, torch.triu_indices,
        torch.zeros, torch.bartlett_window, torch.blackman_window, torch.hamming_window, torch.hann_window,
        torch.kaiser_window, torch.empty_strided, torch.normal,
    }
)  # fmt: skip


def _makes_on_default_device(node: fx.Node, old: torch.device) -> bool:
    """Whether a call made a tensor on the traced device without naming it."""
    value = node.meta.get("val")
    made_here = isinstance(value, Tensor) and same_device(value.device, old)
    return node.target in FACTORIES and made_here and node.kwargs.get("device") is None


def _moved(region: Region, old: torch.device, new: torch.device) -> Region:
    """A region whose autocast of the traced device is that of the stage's."""
    casts = tuple((new.type if kind == old.type else kind, dtype, on) for kind, dtype, on in region.autocast)
    return Region(region.grad, casts)


class _Regions:
    """Writes the calls that enter and leave regions."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.current = PLAIN
        self.entered: fx.Node | None = None

    def change(self, region: Region) -> None:
        if region == self.current:
            return
        if self.entered is not None:
            self.graph.call_function(exit_region, (self.entered,))
        self.entered = None
        if region != PLAIN:
            self.entered = self.graph.call_function(enter_region, (region.grad, region.autocast))
        self.current = region


def _module(
    graph: fx.Graph,
    tensors: Mapping[str, Tensor],
    leaf: Callable[[str, Mapping[str, Tensor]], nn.Module],
    index: int,
) -> fx.GraphModule:
    """A graph module that reads the model's own tensors under their own names."""
    root = nn.Module()
    for target in dict.fromkeys(str(n.target) for n in graph.nodes if n.op == "call_module"):
        owner, last = owner_of(root, target)
        owner.add_module(last, leaf(target, tensors))
    for target in dict.fromkeys(str(n.target) for n in graph.nodes if n.op == "get_attr"):
        owner, last = owner_of(root, target)
        tensor = tensors[target]
        if last in owner._parameters or last in owner._buffers:
            continue  # it is a leaf's
        if isinstance(tensor, nn.Parameter):
            owner.register_parameter(last, tensor)
        else:
            owner.register_buffer(last, tensor)
    module = fx.GraphModule(root, graph, class_name=f"Stage{index}")
    quiet: Any = type(module)
    quiet.__call__ = nn.Module.__call__  # fx's own prints to stderr when a call fails; the runtime reports better
    return module
