"""A model's computation and its costs, as frozen data without torch.

A ``Graph`` describes a captured model. Positions in ``nodes`` are the only node ids, and their order is topological.
The name of a node is the only link back to the ``torch.fx`` graph.

Two kinds of nodes belong to no stage: model inputs, and *rematerialized* nodes. A rematerialized node is cheap, is
computed from inputs and buffers alone, and has no parameters and no side effects (masks, position ids, sizes). Each
stage that reads one computes its own copy, so it is never sent.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import inf, prod
from typing import Literal

from pipecompile.ir.json_io import Json

ITEM_BYTES = {
    "bool": 1, "uint8": 1, "int8": 1, "float8_e4m3fn": 1, "float8_e5m2": 1,
    "int16": 2, "uint16": 2, "float16": 2, "bfloat16": 2,
    "int32": 4, "uint32": 4, "float32": 4, "complex32": 4,
    "int64": 8, "uint64": 8, "float64": 8, "complex64": 8, "complex128": 16,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Shape (at the sample microbatch), dtype (torch's name without ``torch.``) and whether it needs a gradient."""

    shape: tuple[int, ...]
    dtype: str
    requires_grad: bool = False

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * ITEM_BYTES[self.dtype]

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter under its original, fully qualified name. A tied parameter has one name."""

    name: str
    spec: TensorSpec


@dataclass(frozen=True, slots=True)
class Node:
    """One torch function call of the model."""

    name: str  # the fx node's name
    op: str  # the function: "linear", "getitem"; "input" for a model input
    inputs: tuple[int, ...] = ()  # producing nodes, each earlier than this one
    outputs: tuple[TensorSpec, ...] = ()
    parameters: tuple[str, ...] = ()  # read by this node; several nodes may read a tied parameter
    path: str = ""  # "layers.3.mlp": the module whose forward made the call
    source: str = ""  # "model.py:42": the user's line
    rematerialized: bool = False
    writes: tuple[str, ...] = ()  # buffers written in place
    whole: bool = False  # whether no backward of it is split, though its function has a split form

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.outputs)


@dataclass(frozen=True, slots=True)
class SharedOutput:
    """An output of the stages, which processes give each other if they are several.

    Attributes:
        name: of the output.
        node: that makes it; None for a parameter or a buffer, which the last stage returns.
        how: what all processes get: its values, joined from those of all microbatches, or of the size of one
            microbatch's (a sum); or its shape alone.
    """

    name: str
    node: int | None
    how: Literal["joined", "once", "shape"]


@dataclass(frozen=True)
class Graph(Json):
    """The nodes of a model in topological order.

        >>> inputs = Node("x", "input", outputs=(TensorSpec((4, 8), "float32"),), rematerialized=True)
        >>> layer = Node("linear", "linear", inputs=(0,), outputs=(TensorSpec((4, 2), "float32"),))
        >>> graph = Graph((inputs, layer), inputs=(0,), outputs=(1,))
        >>> len(graph), graph.users, layer.outputs[0].nbytes
        (2, ((1,), ()), 32)

    Attributes:
        nodes: the functions that the model calls, with the shapes of one microbatch; positions here are the node ids.
        inputs: the nodes that are the model's inputs.
        outputs: the nodes that the model returns.
        parameters: what nodes read, each tied parameter once.
        together: groups of nodes that must share a stage (a tuple and its items, a buffer and its writers).
        shared_outputs: the outputs of the stages, if these are in several processes.

    Invariants, checked by ``validate``:

    1. the inputs of a node precede it;
    2. names are unique, and every parameter that a node reads is listed;
    3. inputs and outputs are nodes, and inputs are marked as rematerialized;
    4. a rematerialized node reads only rematerialized nodes, and no parameters.
    """

    nodes: tuple[Node, ...]
    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()
    parameters: tuple[Parameter, ...] = ()
    together: tuple[tuple[int, ...], ...] = ()
    shared_outputs: tuple[SharedOutput, ...] = ()

    def __post_init__(self) -> None:
        self.validate()

    def __len__(self) -> int:
        return len(self.nodes)

    @cached_property
    def users(self) -> tuple[tuple[int, ...], ...]:
        """For each node, the nodes that read it, ascending and without repeats."""
        users: list[list[int]] = [[] for _ in self.nodes]
        for index, node in enumerate(self.nodes):
            for source in dict.fromkeys(node.inputs):
                users[source].append(index)
        return tuple(map(tuple, users))

    @cached_property
    def reached(self) -> frozenset[str]:
        """The parameters with a differentiable path to an output. Nodes in one ``together`` group count as one node."""
        shared = {i: group for group in self.together for i in group}
        found: set[int] = set()
        stack = list(self.outputs)
        while stack:
            index = stack.pop()
            specs = self.nodes[index].outputs
            if index not in found and (index in shared or not specs or any(spec.requires_grad for spec in specs)):
                found.add(index)
                stack += [*self.nodes[index].inputs, *shared.get(index, ())]
        return frozenset(name for index in found for name in self.nodes[index].parameters)

    @cached_property
    def parameter_bytes(self) -> dict[str, int]:
        """The bytes of each parameter by its name."""
        return {parameter.name: parameter.spec.nbytes for parameter in self.parameters}

    def validate(self) -> None:
        """Raises ``ValueError`` at the first invariant that does not hold."""
        known = {parameter.name for parameter in self.parameters}
        for index, node in enumerate(self.nodes):
            if any(not 0 <= source < index for source in node.inputs):
                raise ValueError(f"node {index} ({node.name}) reads nodes {node.inputs}, which do not all precede it")
            if missing := set(node.parameters) - known:
                raise ValueError(f"node {node.name} reads parameters that the graph does not list: {sorted(missing)}")
            if node.rematerialized and (
                node.parameters or not all(self.nodes[source].rematerialized for source in node.inputs)
            ):
                raise ValueError(
                    f"rematerialized node {node.name} reads a parameter or a node that is not rematerialized"
                )
        if len({node.name for node in self.nodes}) != len(self.nodes):
            raise ValueError("node names are not unique")
        for index in (*self.inputs, *self.outputs, *(i for group in self.together for i in group)):
            if not 0 <= index < len(self.nodes):
                raise ValueError(f"{index} is not a node: the graph has {len(self.nodes)} nodes")
        if not all(self.nodes[index].rematerialized for index in self.inputs):
            raise ValueError("an input must be marked as rematerialized")

    def __str__(self) -> str:
        lines = []
        for index, node in enumerate(self.nodes):
            reads = ", ".join([*(f"%{i}" for i in node.inputs), *node.parameters])
            specs = ", ".join(map(str, node.outputs))
            mark = "*" if node.rematerialized else " "
            lines.append(f"{mark}%{index} = {node.op}({reads}) -> {specs}   # {node.path} {node.source}".rstrip(" #"))
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds and bytes of a node, or of a whole stage, for one microbatch."""

    forward: float = 0.0  # seconds
    backward: float = 0.0  # seconds, for the gradients of inputs and weights
    saved_bytes: int = 0  # kept from forward to backward, without parameters
    parameter_bytes: int = 0  # without gradients and optimizer state

    @property
    def seconds(self) -> float:
        return self.forward + self.backward

    def check(self, name: str) -> None:
        """Raises ``ValueError`` if a number is negative or not finite; ``name`` is the node's."""
        if not (0 <= self.forward < inf and 0 <= self.backward < inf):
            raise ValueError(f"node {name} takes {self.forward} s and {self.backward} s; both must be finite and >= 0")
        if self.saved_bytes < 0 or self.parameter_bytes < 0:
            raise ValueError(
                f"node {name} holds {self.saved_bytes} and {self.parameter_bytes} bytes; both must be >= 0"
            )

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.forward + other.forward,
            self.backward + other.backward,
            self.saved_bytes + other.saved_bytes,
            self.parameter_bytes + other.parameter_bytes,
        )


@dataclass(frozen=True, slots=True)
class Footprint:
    """The memory that a node's call uses. Storages are indices into ``CostedGraph.storages``.

    Several values may share a storage: a view uses that of its base. Parameters and buffers are not included.
    """

    values: tuple[int, ...] = ()  # storages of its outputs
    saved: tuple[int, ...] = ()  # storages that autograd keeps for its backward
    forward_bytes: int = 0  # peak bytes that it allocates while it runs, outputs included
    backward_bytes: int = 0  # peak bytes that its backward allocates, gradients included
    again: tuple[int, ...] = ()  # if the node is recomputed in the backward: storages kept from then on
    stretch: int | None = None  # nodes with the same number are recomputed together
    repeats: bool = True  # whether a backward may recompute it


@dataclass(frozen=True, slots=True)
class Setting:
    """The conditions of a profile."""

    device: str
    torch: str
    threads: int
    date: str  # ISO 8601
    model: str  # class name
    inputs: tuple[str, ...]  # "input_ids: int64[4, 128]", for one microbatch


@dataclass(frozen=True)
class CostedGraph(Json):
    """A graph with the cost of each node, and where the numbers come from ("measured: cpu, torch 2.13", "counted").

    Attributes:
        graph: the nodes.
        costs: for each node the seconds of its forward and backward, and its bytes, for one microbatch.
        source: where the original numbers come from.
        storages: the bytes of each storage that nodes make or keep; several tensors may share one.
        footprints: for each node, the storages that it makes and keeps for its backward.
        setting: what the numbers hold for: the device and torch's settings, if they are known.
        measured: whether the seconds were measured on a device.
        corrections: the corrections applied since, in words.
        waited: the part of the measured seconds in which the measuring thread had no processor; the machine was busy.

    Without footprints, each output has its own storage, and so do the bytes that a node saves.
    """

    graph: Graph
    costs: tuple[Cost, ...]
    source: str
    storages: tuple[int, ...] = ()  # bytes
    footprints: tuple[Footprint, ...] = ()
    setting: Setting | None = None
    measured: bool = False
    corrections: tuple[str, ...] = ()
    waited: float = 0.0

    @property
    def origin(self) -> str:
        """Where the numbers come from, corrections included."""
        return ", ".join([self.source, *self.corrections])

    def __post_init__(self) -> None:
        if len(self.costs) != len(self.graph):
            raise ValueError(f"{len(self.costs)} costs were given for {len(self.graph)} nodes")
        for node, cost in zip(self.graph.nodes, self.costs, strict=True):
            cost.check(node.name)
        if not self.footprints:
            storages, footprints = _unshared(self.graph, self.costs)
            object.__setattr__(self, "storages", storages)
            object.__setattr__(self, "footprints", footprints)
        if len(self.footprints) != len(self.graph):
            raise ValueError(f"{len(self.footprints)} footprints were given for {len(self.graph)} nodes")
        for node, footprint in zip(self.graph.nodes, self.footprints, strict=True):
            named = (*footprint.values, *footprint.saved, *footprint.again)
            if any(not 0 <= storage < len(self.storages) for storage in named):
                raise ValueError(f"node {node.name} names storages {named}, but there are only {len(self.storages)}")

    @property
    def seconds(self) -> float:
        """Seconds per microbatch of the whole model, forward and backward."""
        return sum(cost.seconds for cost in self.costs)

    def check_fits(self, graph: Graph) -> None:
        """Checks that these costs belong to ``graph``: the same calls on the same sizes. Source lines may differ.

        Raises:
            ValueError: a node or parameter differs; the message names the first one.
        """
        for index, (mine, other) in enumerate(zip(self.graph.nodes, graph.nodes, strict=False)):
            for what in ("op", "inputs", "outputs", "parameters", "path"):
                was, now = getattr(mine, what), getattr(other, what)
                if was != now:
                    place = f"node {index}, {other.name} ({other.path or 'the model'}, {other.source})"
                    raise ValueError(f"{place}: {what} is {_told(now)}, but {_told(was)} in the given costs")
        if len(self.graph) != len(graph):
            raise ValueError(f"the model has {len(graph)} nodes, but the given costs have {len(self.graph)}")
        if others := [p for p, q in zip(graph.parameters, self.graph.parameters, strict=True) if p != q]:
            raise ValueError(
                f"parameter {others[0].name} is {others[0].spec} in the model, but differs in the given costs"
            )


def _told(value: object) -> str:
    return ", ".join(map(str, value)) or "none" if isinstance(value, tuple) else repr(value)


def _unshared(graph: Graph, costs: tuple[Cost, ...]) -> tuple[tuple[int, ...], tuple[Footprint, ...]]:
    storages: list[int] = []
    footprints = []
    for node, cost in zip(graph.nodes, costs, strict=True):
        values = tuple(range(len(storages), len(storages) + len(node.outputs)))
        storages += [spec.nbytes for spec in node.outputs]
        saved = (len(storages),) * (cost.saved_bytes > 0)
        storages += [cost.saved_bytes] * len(saved)
        backward = sum(graph.nodes[i].nbytes for i in dict.fromkeys(node.inputs)) + cost.parameter_bytes
        footprints.append(Footprint(values, saved, node.nbytes + cost.saved_bytes, backward * (cost.backward > 0)))
    return tuple(storages), tuple(footprints)
