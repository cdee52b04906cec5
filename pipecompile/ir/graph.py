"""What a model computes and what it costs, as frozen data without torch.

A ``Graph`` is the torch-free reading of a captured model: positions in ``nodes`` are the only node ids, and their
order is topological by construction. The name of a node is the only link back to the ``torch.fx`` graph.

Two sorts of node do not belong to any stage: model inputs, and *replicated* nodes, which are computed from the inputs
and buffers alone, cheaply, without parameters and without effects (masks, position ids, sizes). Each stage that needs
one computes its own copy, so it is never sent.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import inf, prod

from pipecompile.ir.json_io import Json

ITEM_BYTES = {
    "bool": 1, "uint8": 1, "int8": 1, "float8_e4m3fn": 1, "float8_e5m2": 1,
    "int16": 2, "uint16": 2, "float16": 2, "bfloat16": 2,
    "int32": 4, "uint32": 4, "float32": 4, "complex32": 4,
    "int64": 8, "uint64": 8, "float64": 8, "complex64": 8, "complex128": 16,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Shape (sizes at the sample microbatch), dtype (torch's name without ``torch.``) and whether a gradient flows."""

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
    """A parameter under its original, fully qualified name; one that is tied has one name here."""

    name: str
    spec: TensorSpec


@dataclass(frozen=True, slots=True)
class Node:
    """One torch function call of the model."""

    name: str  # the fx node's name
    op: str  # what is called: "linear", "getitem", "input" for a model input
    inputs: tuple[int, ...] = ()  # producing nodes, each earlier than this one
    outputs: tuple[TensorSpec, ...] = ()
    parameters: tuple[str, ...] = ()  # read by this node; a tied weight shows up in several nodes
    path: str = ""  # "layers.3.mlp": the module whose forward made the call
    source: str = ""  # "model.py:42": the user's line
    replicated: bool = False
    writes: tuple[str, ...] = ()  # buffers that it writes

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.outputs)


@dataclass(frozen=True)
class Graph(Json):
    """The nodes of a model in topological order.

    Invariants, checked by ``validate``:
    1. every node's inputs stand before it;
    2. names are unique, and every parameter that a node reads is listed;
    3. inputs and outputs are nodes, inputs are replicated;
    4. a replicated node reads replicated nodes only, and no parameters.

    ``together`` lists groups of nodes that must share one stage (a tuple and its items, a buffer and its writers).
    """

    nodes: tuple[Node, ...]
    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()
    parameters: tuple[Parameter, ...] = ()
    together: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        self.validate()

    def __len__(self) -> int:
        return len(self.nodes)

    @cached_property
    def users(self) -> tuple[tuple[int, ...], ...]:
        """For each node the nodes that read it, in order, each once."""
        users: list[list[int]] = [[] for _ in self.nodes]
        for index, node in enumerate(self.nodes):
            for source in dict.fromkeys(node.inputs):
                users[source].append(index)
        return tuple(map(tuple, users))

    @cached_property
    def reached(self) -> frozenset[str]:
        """The parameters on differentiable paths to some output; what shares written memory counts as one."""
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
        return {parameter.name: parameter.spec.nbytes for parameter in self.parameters}

    def validate(self) -> None:
        """Raises ``ValueError`` at the first invariant that does not hold."""
        known = {parameter.name for parameter in self.parameters}
        for index, node in enumerate(self.nodes):
            if any(not 0 <= source < index for source in node.inputs):
                raise ValueError(f"node {index} ({node.name}) reads {node.inputs}, which do not all stand before it")
            if missing := set(node.parameters) - known:
                raise ValueError(f"node {node.name} reads the unlisted parameters {sorted(missing)}")
            if node.replicated and (
                node.parameters or not all(self.nodes[source].replicated for source in node.inputs)
            ):
                raise ValueError(f"replicated node {node.name} reads what is not replicated")
        if len({node.name for node in self.nodes}) != len(self.nodes):
            raise ValueError("node names are not unique")
        for index in (*self.inputs, *self.outputs, *(i for group in self.together for i in group)):
            if not 0 <= index < len(self.nodes):
                raise ValueError(f"{index} is not a node: there are {len(self.nodes)}")
        if not all(self.nodes[index].replicated for index in self.inputs):
            raise ValueError("an input must be marked as replicated")

    def __str__(self) -> str:
        lines = []
        for index, node in enumerate(self.nodes):
            reads = ", ".join([*(f"%{i}" for i in node.inputs), *node.parameters])
            specs = ", ".join(map(str, node.outputs))
            mark = "*" if node.replicated else " "
            lines.append(f"{mark}%{index} = {node.op}({reads}) -> {specs}   # {node.path} {node.source}".rstrip(" #"))
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds and bytes of a node, or of a whole stage, for one microbatch."""

    forward: float = 0.0  # seconds
    backward: float = 0.0  # seconds, gradients of inputs and of weights
    saved_bytes: int = 0  # kept from forward to backward, parameters not counted
    parameter_bytes: int = 0  # parameters alone; gradients and optimizer state come on top

    @property
    def seconds(self) -> float:
        return self.forward + self.backward

    def check(self, name: str) -> None:
        """Raises ``ValueError`` if these are no costs that the node ``name`` could have."""
        if not (0 <= self.forward < inf and 0 <= self.backward < inf):
            raise ValueError(f"node {name} takes {self.forward} s and {self.backward} s: not negative, and finite")
        if self.saved_bytes < 0 or self.parameter_bytes < 0:
            raise ValueError(f"node {name} holds {self.saved_bytes} and {self.parameter_bytes} bytes: not negative")

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.forward + other.forward,
            self.backward + other.backward,
            self.saved_bytes + other.saved_bytes,
            self.parameter_bytes + other.parameter_bytes,
        )


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a node's call does to memory; storages are numbers into ``CostedGraph.storages``.

    A storage is what several values may share: a view lives in that of its base. Parameters and buffers have none here.
    """

    values: tuple[int, ...] = ()  # storages that its values live in
    saved: tuple[int, ...] = ()  # storages that autograd keeps for its backward
    forward_bytes: int = 0  # most that it allocates at once while it runs, its values included
    backward_bytes: int = 0  # the same of its backward, gradients included
    again: tuple[int, ...] = ()  # of a node that the backward computes again: what is kept from then on
    stretch: int | None = None  # which nodes are computed again at once
    repeats: bool = True  # whether a backward may compute it again at all


@dataclass(frozen=True, slots=True)
class Setting:
    """What a profile was taken with."""

    device: str
    torch: str
    threads: int
    date: str  # ISO 8601
    model: str  # its class
    inputs: tuple[str, ...]  # "input_ids: int64[4, 128]", those of one microbatch


@dataclass(frozen=True)
class CostedGraph(Json):
    """A graph with the cost of each node and where the numbers come from ("measured: cpu, torch 2.13", "counted").

    Attributes:
        source: where the first numbers are from.
        measured: whether the seconds are those of a device that was there.
        corrections: what has been made of them since, in words.

    Without footprints each value has a storage of its own, and so has what a node saves.
    """

    graph: Graph
    costs: tuple[Cost, ...]
    source: str
    storages: tuple[int, ...] = ()  # bytes
    footprints: tuple[Footprint, ...] = ()
    setting: Setting | None = None
    measured: bool = False
    corrections: tuple[str, ...] = ()

    @property
    def origin(self) -> str:
        """Where the numbers are from, in words."""
        return ", ".join([self.source, *self.corrections])

    def __post_init__(self) -> None:
        if len(self.costs) != len(self.graph):
            raise ValueError(f"{len(self.costs)} costs for {len(self.graph)} nodes")
        for node, cost in zip(self.graph.nodes, self.costs, strict=True):
            cost.check(node.name)
        if not self.footprints:
            storages, footprints = _unshared(self.graph, self.costs)
            object.__setattr__(self, "storages", storages)
            object.__setattr__(self, "footprints", footprints)
        if len(self.footprints) != len(self.graph):
            raise ValueError(f"{len(self.footprints)} footprints for {len(self.graph)} nodes")
        for node, footprint in zip(self.graph.nodes, self.footprints, strict=True):
            named = (*footprint.values, *footprint.saved, *footprint.again)
            if any(not 0 <= storage < len(self.storages) for storage in named):
                raise ValueError(f"node {node.name} names storages {named}, and there are {len(self.storages)}")

    @property
    def seconds(self) -> float:
        """Seconds of one microbatch through the whole model, forward and backward."""
        return sum(cost.seconds for cost in self.costs)

    def check_fits(self, graph: Graph) -> None:
        """Passes if these are costs of ``graph``: the same calls on the same sizes; source lines may differ.

        Raises:
            ValueError: names the first node that differs, and how.
        """
        for index, (mine, other) in enumerate(zip(self.graph.nodes, graph.nodes, strict=False)):
            for what in ("op", "inputs", "outputs", "parameters", "path"):
                was, now = getattr(mine, what), getattr(other, what)
                if was != now:
                    place = f"node {index}, {other.name} ({other.path or 'the model'}, {other.source})"
                    raise ValueError(f"{place}: {what} {_told(now)}, in the profile {_told(was)}")
        if len(self.graph) != len(graph):
            raise ValueError(f"the model has {len(graph)} nodes, the profile {len(self.graph)}")
        if others := [p for p, q in zip(graph.parameters, self.graph.parameters, strict=True) if p != q]:
            raise ValueError(f"parameter {others[0].name} is {others[0].spec} now, and another in the profile")


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
