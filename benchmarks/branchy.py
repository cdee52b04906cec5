"""Problems from seeds: parallel towers, random layers, attention with explicit heads, and rows of blocks.

Real models are mostly narrow, and a narrow graph is easy: one topological order has nearly all good cuts. The blocks
are of this sort; the others have wide lattices and are hard. Costs are drawn, not measured: seconds are uniform, sent
seconds log-uniform over a factor of thirty.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from random import Random

from pipecompile.partition.solver.contraction import contract
from pipecompile.partition.solver.problem import Problem, Seat

Edges = list[tuple[int, int]]


def problems(numbers: Sequence[int]) -> Iterator[tuple[str, Problem]]:
    """All of them, at the given numbers of stages."""
    for num_stages in numbers:
        for seed in range(2):
            for count in (2, 4, 8):
                yield f"towers {count}, seed {seed}", towers(count, seed, num_stages)
            yield f"layered 150, seed {seed}", layered(150, seed, num_stages)
            yield f"heads 12 x 4, seed {seed}", heads(4, seed, num_stages)


def large(sizes: Sequence[int], numbers: Sequence[int]) -> Iterator[tuple[str, Problem]]:
    """Problems of about so many nodes, at the given numbers of stages."""
    for size in sizes:
        for num_stages in numbers:
            yield f"blocks, {size:,} nodes", blocks(size // 22, 0, num_stages)
            yield f"blocks with skips, {size:,} nodes", blocks(size // 22, 0, num_stages, skips=size // 44)
            yield f"heads, {size:,} nodes", heads(size // 78, 0, num_stages)
            yield f"layered, {size:,} nodes", layered(size, 0, num_stages)


def towers(count: int, seed: int, num_stages: int) -> Problem:
    """A stem, ``count`` chains of about 100 / count nodes each, and a head that reads them all."""
    random = Random(seed)
    edges: Edges = [(0, 1), (1, 2)]
    ends, node = [], 3
    for _ in range(count):
        length = random.randint(80, 120) // count
        chain = range(node, node + length)
        edges += [(2, chain[0]), *pairwise(chain)]
        ends.append(chain[-1])
        node += length
    edges += [(end, node) for end in ends] + [(node, node + 1), (node + 1, node + 2)]
    return _drawn(node + 3, edges, num_stages, random)


def layered(count: int, seed: int, num_stages: int, width: int = 6) -> Problem:
    """``count`` nodes in layers of up to ``width``; each reads one to three nodes of the two layers before."""
    random = Random(seed)
    edges: Edges = []
    layers = [[0]]
    node = 1
    while node < count:
        layer = list(range(node, min(count, node + random.randint(2, width))))
        recent = [source for earlier in layers[-2:] for source in earlier]
        for target in layer:
            sources = random.sample(recent, min(len(recent), random.randint(1, 3)))
            edges += [(source, target) for source in sources]
        layers.append(layer)
        node = layer[-1] + 1
    return _drawn(count, edges, num_stages, random)


def heads(layers: int, seed: int, num_stages: int, width: int = 12) -> Problem:
    """A transformer whose ``width`` heads are nodes of their own: a residual stream with wide, shallow detours."""
    random = Random(seed)
    edges: Edges = []
    stream, node = 0, 1
    for _ in range(layers):
        norm, join, add = node, node + 1, node + 2
        edges += [(stream, norm), (stream, add), (join, add)]
        node += 3
        for _ in range(width):
            head = range(node, node + 6)  # query, key, value, scores, softmax, mix
            edges += [(norm, head[0]), (norm, head[1]), (norm, head[2]), (head[0], head[3]), (head[1], head[3])]
            edges += [(head[3], head[4]), (head[4], head[5]), (head[2], head[5]), (head[5], join)]
            node += 6
        edges += [(add, node), (node, node + 1), (node + 1, node + 2), (add, node + 2)]
        stream = node + 2
        node += 3
    return _drawn(node, edges, num_stages, random)


def blocks(layers: int, seed: int, num_stages: int, skips: int = 0) -> Problem:
    """Transformer blocks of 22 nodes in a row; the first ``skips`` are read again by the last, as in a U-Net."""
    random = Random(seed)
    edges: Edges = []
    outputs = [0]
    for layer in range(layers):
        first = 1 + 22 * layer
        norm, joint, query, key, value, scores, mixed = range(first, first + 7)
        *rest, add, norm2, up, gate, act, down, add2, last = range(first + 7, first + 22)
        edges += [(outputs[-1], norm), (outputs[-1], add), (norm, joint), (joint, query), (joint, key), (joint, value)]
        edges += [(query, scores), (key, scores), (scores, mixed), (value, mixed), *pairwise([mixed, *rest, add])]
        edges += [(add, norm2), (norm2, up), (norm2, gate), (up, act), (gate, act), (act, down), (down, add2)]
        edges += [(add, add2), (add2, last)]
        if layer >= layers - skips:
            edges.append((outputs[layers - layer], norm))
        outputs.append(last)
    return _drawn(1 + 22 * layers, edges, num_stages, random)


def _drawn(count: int, edges: Edges, num_stages: int, random: Random) -> Problem:
    seconds = [random.uniform(0.1, 3.0) for _ in range(count)]
    users: list[list[int]] = [[] for _ in range(count)]
    for source, target in edges:
        users[source].append(target)
    nets = [((source, *targets), 0.1 * 30 ** random.random()) for source, targets in enumerate(users) if targets]
    return contract(seconds, edges, nets, [Seat(may_idle=True)] * num_stages).problem
