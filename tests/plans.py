"""Plans without a graph: the shapes that schedules must serve, and random ones for properties; layers to plan."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import strategies as st

from pipecompile.ir.between_stages import Channel, Tied
from pipecompile.ir.graph import Cost, CostedGraph, Footprint, Graph, Node, Parameter, TensorSpec
from pipecompile.ir.plan import Plan
from pipecompile.ir.program import Program
from pipecompile.schedule import SCHEDULES, SYNCHRONOUS

NBYTES = 1_000_000
# The schedules that take any plan.
WHOLE = {name: make for name, make in SYNCHRONOUS.items() if SCHEDULES[name].takes_replicas}


def dag(edges: Sequence[tuple[int, int]], rank_of: Sequence[int], tied: Sequence[Tied] = ()) -> Plan:
    return Plan((), tuple(rank_of), tuple(Channel(*edge, (), NBYTES) for edge in sorted(edges)), tuple(tied))


def unet(num_stages: int) -> Plan:
    """A chain with a skip from each stage of the way down to its partner on the way up."""
    chain = {(s, s + 1) for s in range(num_stages - 1)}
    return dag([*chain | {(s, num_stages - 1 - s) for s in range(num_stages // 2)}], range(num_stages))


def branches() -> Plan:
    """Source 0, the towers 1 2 3 and 4 5 6 side by side, sink 7."""
    return dag([(0, 1), (1, 2), (2, 3), (0, 4), (4, 5), (5, 6), (3, 7), (6, 7)], range(8))


SHAPES = {
    "chain": Plan.chain(4, nbytes=NBYTES),
    "one stage": Plan.chain(1),
    "unet": unet(8),
    "branches": branches(),
    "looped": Plan.chain(8, (0, 1, 2, 3, 0, 1, 2, 3), NBYTES),
    "folded": Plan.chain(8, (0, 1, 2, 3, 3, 2, 1, 0), NBYTES),
    "one rank": Plan.chain(3, (0, 0, 0)),
}


def units(plan: Plan, forward: float = 1.0, backward: float = 1.0) -> list[Cost]:
    return [Cost(forward, backward, saved_bytes=1)] * plan.num_stages


def layers(*seconds: float, weights: int = 4_000, saved: int = 1_000) -> CostedGraph:
    """Layers in a row, each with a weight, a value of 4 bytes, and something of its own that it saves."""
    spec, weight = TensorSpec((1,), "float32", requires_grad=True), TensorSpec((weights // 4,), "float32", True)
    nodes = [Node("x", "input", rematerialized=True)]
    nodes += [Node(f"n{i}", "linear", (i,), (spec,), (f"w{i}",), f"l{i}") for i in range(len(seconds))]
    costs = (Cost(), *(Cost(s / 3, 2 * s / 3, saved) for s in seconds))
    prints = [Footprint(), *(Footprint((2 * i,), (2 * i + 1,), 4 + saved, 0) for i in range(len(seconds)))]
    parameters = tuple(Parameter(f"w{i}", weight) for i in range(len(seconds)))
    graph = Graph(tuple(nodes), (0,), (len(seconds),), parameters)
    return CostedGraph(graph, costs, "by hand", (4, saved) * len(seconds), tuple(prints))


def rows(text: str) -> str:
    """Drawn rows without the indentation of the test."""
    return "\n".join(line.strip() for line in text.strip().splitlines())


def stage_row(program: Program, stage: int) -> str:
    """The computations of one stage without its number: ``F0 F1 B0``."""
    return " ".join(str(i).removeprefix(str(stage)) for i in program.row_of(stage))


@st.composite
def plans(draw: st.DrawFn, tied: bool = False) -> Plan:
    """Any stage graph of up to six stages, each on a rank of its own or sharing one."""
    num_stages = draw(st.integers(1, 6))
    pairs = [(s, t) for t in range(num_stages) for s in range(t)]
    edges = draw(st.sets(st.sampled_from(pairs))) if pairs else set()
    rank_of = draw(
        st.one_of(
            st.permutations(range(num_stages)),
            st.lists(st.integers(0, num_stages - 1), min_size=num_stages, max_size=num_stages),
        )
    )
    groups = draw(st.lists(st.sampled_from(pairs), max_size=3)) if tied and pairs else []
    return dag([*edges], rank_of, [Tied(f"w{n}", pair) for n, pair in enumerate(groups)])


def costs(plan: Plan) -> st.SearchStrategy[list[Cost]]:
    seconds = st.integers(1, 9).map(float)
    cost = st.builds(Cost, seconds, seconds, st.integers(0, 9), st.integers(0, 9))
    return st.lists(cost, min_size=plan.num_stages, max_size=plan.num_stages)
