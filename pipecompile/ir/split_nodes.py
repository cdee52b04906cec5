"""Which nodes a split backward leaves gradients of weights of, and the seconds of a stage whose backward is split.

A split backward computes the gradients of inputs (B), and leaves those of weights to a BackwardWeight (W). Only some
functions can be split (``ops/splittable.py``). Other nodes compute all in B, and nothing is added to their seconds.
For a node that is split:

    F  takes longer by what it takes to note what W needs
    B  computes the gradient of the input: half of the whole backward, or nothing if no input needs a gradient
    W  computes the rest

Both halves together are the whole backward times a factor of the function, since some kernels share work between the
two gradients (``benchmarks/split_nodes.py``). The fixed seconds of a node are those of ranks that are threads of one
process: notes and queues are Python, for which threads wait for each other. One thread alone takes a quarter of them.
An accelerator computes the two gradients in kernels of their own anyway, and queues them while others run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from math import prod

from pipecompile.ir.cluster import Cluster
from pipecompile.ir.graph import Cost, CostedGraph, Graph, Node, TensorSpec
from pipecompile.ir.halves import Halves
from pipecompile.ir.plan import Plan, members, stage_costs


@dataclass(frozen=True, slots=True)
class Splitting:
    """What it takes to split the backward of a node.

    Attributes:
        forward, backward, weights: seconds that F, B and W take for each node, whatever its size.
        factor: the seconds of B and W without these, relative to the whole backward.
    """

    forward: float
    backward: float
    weights: float
    factor: float


PRODUCT = Splitting(forward=150e-6, backward=20e-6, weights=100e-6, factor=1.0)
CONVOLUTION = Splitting(forward=150e-6, backward=40e-6, weights=160e-6, factor=1.15)
THIN = replace(CONVOLUTION, factor=1.2)  # with kernels of one point, or outputs that read some channels only
ELSEWHERE = Splitting(forward=0.0, backward=0.0, weights=0.0, factor=1.02)  # on accelerators
SPLITTINGS: Mapping[str, Splitting] = {
    "linear": PRODUCT,
    "addmm": PRODUCT,
    "matmul": PRODUCT,
    "embedding": PRODUCT,
    "conv1d": CONVOLUTION,
    "conv2d": CONVOLUTION,
    "conv3d": CONVOLUTION,
}  # the functions that can be split, by name; ``ops/split_backward.py`` has their split forms


def split_nodes(costed: CostedGraph, nodes: Iterable[int], again: bool = False) -> frozenset[int]:
    """The nodes, of some in one stage, whose weights a split backward leaves.

    Not those without a weight to train, of which the split form does not take the options or the shapes (``whole``), or
    recomputed in the backward.

    Args:
        again: whether the stage is recomputed.
    """
    graph, footprints, trained = costed.graph, costed.footprints, _trained(costed.graph)
    return frozenset(
        i
        for i in nodes
        if graph.nodes[i].op in SPLITTINGS
        and not graph.nodes[i].whole
        and footprints[i].stretch is None
        and not (again and footprints[i].repeats)
        and not trained.isdisjoint(graph.nodes[i].parameters)
    )


def stage_halves(costed: CostedGraph, plan: Plan, cluster: Cluster | None = None) -> tuple[Halves, ...]:
    """The seconds of each stage if its backward is split.

    Args:
        cluster: the devices; by default CPUs.
    """
    graph, found = costed.graph, []
    shapes = {parameter.name: parameter.spec.shape for parameter in graph.parameters}
    for stage, cost in enumerate(stage_costs(costed, plan)):
        on_cpu = cluster is None or cluster.devices[plan.rank_of[stage]].is_cpu
        it = Halves(cost.forward, cost.backward, 0.0)
        for i in sorted(split_nodes(costed, members(graph, plan, stage), stage in plan.recomputed)):
            node = graph.nodes[i]
            inputs = [spec for source in node.inputs for spec in graph.nodes[source].outputs]
            by = splitting(node, inputs, shapes) if on_cpu else ELSEWHERE
            it = _with(it, costed.costs[i].backward, any(spec.requires_grad for spec in inputs), by)
        found.append(it)
    return tuple(found)


def _with(it: Halves, whole: float, waits: bool, by: Splitting) -> Halves:
    """A stage in which one more node is split.

    Args:
        whole: seconds of its whole backward.
        waits: whether an input of it waits for a gradient.
    """
    inputs = 0.5 * by.factor * whole if waits else 0.0
    return Halves(
        forward=it.forward + by.forward,
        backward=max(0.0, it.backward - whole) + inputs + by.backward,  # sums are rounded
        weights=it.weights + by.factor * whole - inputs + by.weights,
        fixed=it.fixed + Cost(by.forward, by.backward + by.weights),
    )


def splitting(node: Node, inputs: Sequence[TensorSpec], shapes: Mapping[str, Sequence[int]]) -> Splitting:
    """What it takes to split a node on a CPU.

    Args:
        inputs: what it reads.
        shapes: of parameters, by name.
    """
    by = SPLITTINGS[node.op]
    weight = next((shapes[name] for name in node.parameters if len(shapes[name]) > 2), ())
    if by is not CONVOLUTION or not weight:  # (out, in / groups, ...)
        return by
    channels = [spec.shape[1 - len(weight)] for spec in inputs if len(spec.shape) >= len(weight) - 1]
    return THIN if prod(weight[2:]) == 1 or (channels and weight[1] < channels[0]) else CONVOLUTION


def _trained(graph: Graph) -> Set[str]:
    return {parameter.name for parameter in graph.parameters if parameter.spec.requires_grad}
