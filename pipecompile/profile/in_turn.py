"""Times operations in the turn in which a stage runs them, so that caches hold what they hold there.

An operation that is repeated alone finds its operands, its weights and the memory of its results in the processor's
cache, and its code too. In a stage all of it is cold: other operations have run since, and activations are kept until
the backward. For operations of less than a millisecond this is up to a factor of four. So a stretch of the graph runs
as a stage does:

    forward    a  b  c  d        each is timed; what its backward needs is kept
    backward   d' c' b' a'       each is timed, from the gradients that those before it have returned

Each operation's backward is a graph of its own, whose start is subtracted. A stretch ends when it keeps ``MOST`` bytes,
so memory does not grow with the model. Equal operations on equal shapes have the median of all their runs.

Gradients of weights are added to those of earlier microbatches. They are not kept here, so the seconds of the addition
are a line over bytes, measured once.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from pipecompile.ops.functional import is_traceable
from pipecompile.ops.operators import is_opaque
from pipecompile.profile.call import Call, as_recorded, tensors_of
from pipecompile.profile.meters import UNKNOWN_BACKWARD
from pipecompile.profile.storages import nbytes

MOST = 32 << 20  # bytes of values in a stretch; several times the caches of a core
BLOCK = 1 << 20
LARGEST = (32 << 20) - (64 << 10)  # bytes of a block that glibc comes to keep when it is freed, as in training
SECONDS = 0.5  # of all runs of stretches, each of which runs at least once
RUNS = 3  # of a stretch, at most
ADDED = (1 << 12, 1 << 22)  # bytes of gradients whose addition is measured
FINE = 1e-6  # seconds; a thread's clock of a coarser resolution is not read

Operands = Callable[[fx.Node, dict[fx.Node, Any]], tuple[Any, Any]]


@dataclass(frozen=True)
class Waiting:
    """A node that has run once, with what is called, and what its figures are remembered by."""

    node: fx.Node
    function: Any
    key: Any


class InTurn:
    """The seconds of the nodes of a graph on the CPU.

    Args:
        operands: the arguments of a node, from the values of others.
    """

    def __init__(self, operands: Operands) -> None:
        self.operands = operands
        self.forward: dict[Any, list[float]] = defaultdict(list)
        self.backward: dict[Any, list[float]] = defaultdict(list)
        self.waiting: list[Waiting] = []
        self.given: dict[fx.Node, Any] = {}  # values from before the stretch
        self.held: list[Any] = []  # values of the stretch: memory that its runs find as a later microbatch does
        self.nbytes = 0
        self.left = SECONDS
        self.inside: set[fx.Node] = set()
        torch.empty(LARGEST, dtype=torch.uint8)
        leaf = torch.zeros((), requires_grad=True)
        self._empty = leaf.view_as(leaf), leaf, torch.ones(())
        self.start = median(self._start() for _ in range(5))
        self.adding = _adding()

    def add(self, node: fx.Node, function: Any, key: Any, values: dict[fx.Node, Any], nbytes: int) -> None:
        """Lets a node wait that has run, and runs the stretch when it keeps enough."""
        for source in node.all_input_nodes:
            if source not in self.inside:
                self.given[source] = values[source]
        self.waiting.append(Waiting(node, function, key))
        self.inside.add(node)
        self.held.append(values[node])
        self.nbytes += nbytes
        if self.nbytes >= MOST:
            self.run()

    def run(self) -> None:
        """Times the nodes that wait."""
        self.held += [torch.ones(BLOCK // 4) for _ in range(self.nbytes // BLOCK)]
        self.held.clear()
        for count in range(RUNS):
            began = time.perf_counter()
            if self.waiting and (not count or took <= self.left):
                self._run()
            took = time.perf_counter() - began
            self.left -= took
        self.waiting, self.given, self.inside, self.nbytes = [], {}, set(), 0

    def seconds(self, key: Any) -> tuple[float, float]:
        """The seconds of a forward and of a backward of nodes alike."""
        return median(self.forward[key]), median(self.backward.get(key) or [0.0])

    def _run(self) -> None:
        values, ran = dict(self.given), []
        for it in self.waiting:
            call = Call(it.node, it.function, *self.operands(it.node, values))
            with call.entered():
                clock = _clock(it.function)
                began = clock()
                out = it.function(*call.args, **call.kwargs)
                self.forward[it.key].append(clock() - began)
            values[it.node] = as_recorded(out, it.node.meta.get("val"))
            ran.append((it, call, out))
        gradients: dict[int, Tensor] = {}
        while ran:
            it, call, out = ran.pop()
            read = {id(t) for source in it.node.all_input_nodes if source.op != "get_attr" for t in tensors_of(values[source])}
            self._back(it, call, read, tensors_of(out), tensors_of(values.pop(it.node)), gradients)

    def _back(
        self, it: Waiting, call: Call, read: set[int], outputs: list[Tensor], leaves: list[Tensor], gradients: dict[int, Tensor]
    ) -> None:
        """Times the backward of a call.

        Args:
            read: identities of the activations that it has read.
            outputs: what the call has returned.
            leaves: the same for later calls.
            gradients: by the identity of a leaf, what later calls have returned for it.
        """
        wanted = list({id(t): t for t in call.leaves}.values())
        roots, seeds = [], []
        for output, leaf in zip(outputs, leaves, strict=True):
            gradient = gradients.pop(id(leaf), None)
            if output.grad_fn is not None:
                roots.append(output)
                seeds.append(torch.ones_like(output) if gradient is None else gradient)
            elif gradient is not None and output.requires_grad:  # an element of a tuple
                _add(gradients, output, gradient)
        if not roots or not wanted:
            return
        self._start()
        clock = _clock(it.function)
        began = clock()
        try:
            found = torch.autograd.grad(roots, wanted, seeds, allow_unused=True)
        except RuntimeError:  # it has no backward, or none that runs alone
            self.backward[it.key].append(UNKNOWN_BACKWARD * self.forward[it.key][-1])
            return
        weights = 0.0
        for leaf, gradient in zip(wanted, found, strict=True):
            if gradient is None:
                continue
            if id(leaf) in read:
                _add(gradients, leaf, gradient)
            else:
                weights += self.adding(nbytes(gradient))
        self.backward[it.key].append(max(0.0, clock() - began - self.start) + weights)

    def _start(self) -> float:
        """Starts an empty backward, which a stage does once for all its operations."""
        out, leaf, seed = self._empty
        began = time.perf_counter()
        torch.autograd.grad(out, leaf, seed, retain_graph=True)
        return time.perf_counter() - began


def _add(gradients: dict[int, Tensor], leaf: Tensor, gradient: Tensor) -> None:
    before = gradients.get(id(leaf))
    gradients[id(leaf)] = gradient if before is None else before + gradient


def _clock(function: Any) -> Callable[[], float]:
    """The clock for a function: of the thread, which a busy machine does not disturb, where it is fine enough."""
    alone = torch.get_num_threads() == 1 and (not is_opaque(function) or is_traceable(function))
    return time.thread_time if alone and time.get_clock_info("thread_time").resolution <= FINE else time.perf_counter


def _adding() -> Callable[[int], float]:
    """The seconds of adding a gradient to others, by its bytes."""

    def measured(size: int) -> float:
        total, gradient = torch.zeros(size // 4), torch.ones(size // 4)
        times = []
        for _ in range(RUNS + 1):
            clock = _clock(torch.add)
            began = clock()
            total.add_(gradient)
            times.append(clock() - began)
        return median(times[1:])

    (small, large), (short, long) = ADDED, map(measured, ADDED)
    slope = max(0.0, long - short) / (large - small)
    return lambda size: max(0.0, short + slope * (size - small))
