"""Times operations in the turn in which a stage runs them, so that caches hold what they hold there.

An operation that is repeated alone finds its operands, its weights, the memory of its results and its own code in the
caches of a core. In a stage, other operations have run since, and activations are kept until the backward: a short
operation takes up to four times as long. So a stretch of the graph runs as a stage does:

    forward    a  b  c  d        each is timed, and what its backward needs is kept
    backward   d' c' b' a'       each is timed, with the gradients that those before it have returned

What a stretch reads from before it, and writes to, is copied for each run, so that all runs compute on the same values.
The backward of each operation is a graph of its own; the seconds of starting it are subtracted. A stretch ends when it
keeps ``STRETCH`` bytes, so memory does not grow with the model. Equal operations on equal shapes have the median of all
their runs. Additions to gradients of earlier microbatches are not run: their seconds are a line over bytes.

With one thread, the clock is that of the thread, which stands while other programs have the processor.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Set
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache, cached_property, partial
from statistics import median
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from pipecompile.capture.functionalize import storage_key
from pipecompile.capture.origin import origin_of
from pipecompile.ops.functional import is_traceable
from pipecompile.ops.operators import is_opaque
from pipecompile.profile.call import Call, as_recorded, map_tensors, tensors_of
from pipecompile.profile.meters import UNKNOWN_BACKWARD
from pipecompile.profile.storages import nbytes
from pipecompile.profile.used_memory import used_memory

STRETCH = 32 << 20  # bytes; several times the caches of a core
RUNS = 2  # of a stretch, at most
ADDED = (1 << 12, 1 << 22)  # bytes of gradients whose addition is measured
FINE = 1e-6  # seconds; a thread's clock of a coarser resolution is not read

Values = dict[fx.Node, Any]
Operands = Callable[[fx.Node, Values], tuple[Any, Any]]
Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class Waiting:
    """A node that is to be timed.

    Attributes:
        key: equal for equal operations on equal shapes.
    """

    node: fx.Node
    function: Any
    key: Any


class InTurn:
    """The seconds of a graph's nodes on the CPU.

    Args:
        operands: the arguments of a node, from the values of others.
        says_where: a context in which an error names a node.
        most: seconds after which no stretch runs again; each runs once.

    Attributes:
        waited: the part of the seconds on the wall clock in which the thread did not run; 0 if no seconds are of that.
    """

    def __init__(
        self, operands: Operands, says_where: Callable[[fx.Node], AbstractContextManager[None]], most: float
    ) -> None:
        self.operands = operands
        self.says_where = says_where
        self.forward: dict[Any, list[float]] = defaultdict(list)
        self.backward: dict[Any, list[float]] = defaultdict(list)
        self.left = most
        self.wall = self.ran = 0.0  # seconds of what the wall clock has timed
        self.clear()

    def clear(self) -> None:
        """Forgets the nodes that wait."""
        self.waiting: list[Waiting] = []
        self.inside: set[fx.Node] = set()
        self.given: Values = {}  # from before the stretch
        self.copies: set[int] = set()  # storages in it that are copies of what the stretch writes to
        self.held: list[Any] = []  # values of the stretch
        self.nbytes = 0

    def share(self, other: InTurn) -> None:
        """Takes over what another one has measured once: starting a backward, and adding gradients."""
        self.start, self.adding = other.start, other.adding

    def before(self, node: fx.Node, values: Values) -> None:
        """Keeps what a node reads, as it is before the node may write to it."""
        for source in node.all_input_nodes:
            if source not in self.inside:
                self.given.setdefault(source, values[source])
        if origin_of(node).mutates:
            read = {storage_key(t) for source in node.all_input_nodes for t in tensors_of(values[source])}
            self.given, copies = _copied(self.given, read)
            self.copies |= copies

    def add(self, node: fx.Node, function: Any, key: Any, values: Values, nbytes: int) -> None:
        """Lets a node wait that has run once, and times those that wait if they keep enough.

        Args:
            values: has that of the node.
            nbytes: what it keeps.
        """
        self.waiting.append(Waiting(node, function, key))
        self.inside.add(node)
        self.held.append(values[node])
        self.nbytes += nbytes
        if self.nbytes >= STRETCH:
            self.run()

    def run(self) -> None:
        """Times the nodes that wait."""
        if not self.waiting:
            return
        with used_memory(2 * self.nbytes):
            self.held.clear()
            for count in range(RUNS):
                began = time.perf_counter()
                self._run()
                took = time.perf_counter() - began
                self.left -= took
                if self.left < took or count + 1 == RUNS:
                    break
        self.clear()

    def seconds(self, key: Any) -> tuple[float, float]:
        """The seconds of a forward and of a backward of nodes alike."""
        return median(self.forward[key]), median(self.backward.get(key, [0.0]))

    @property
    def waited(self) -> float:
        return max(0.0, 1 - self.ran / self.wall) if self.wall else 0.0

    def _run(self) -> None:
        (values, _), ran = _copied(self.given, self.copies), []
        for it in self.waiting:
            with self.says_where(it.node):
                call = Call(it.node, it.function, *self.operands(it.node, values))
                args, kwargs = call.operands()
                with call.entered():
                    out, seconds = self._timed(it, partial(it.function, *args, **kwargs))
                self.forward[it.key].append(seconds)
                values[it.node] = as_recorded(call.written() if call.mutates else out, it.node.meta.get("val"))
                ran.append((it, call, tensors_of(out)))
        gradients: dict[int, Tensor] = {}
        while ran:
            it, call, outputs = ran.pop()
            with self.says_where(it.node):
                leaves = tensors_of(values.pop(it.node))
                read = tensors_of([values[node] for node in it.node.all_input_nodes if node.op != "get_attr"])
                self._back(it, call, outputs, leaves, {id(tensor) for tensor in read}, gradients)

    def _back(
        self,
        it: Waiting,
        call: Call,
        outputs: list[Tensor],
        leaves: list[Tensor],
        read: set[int],
        gradients: dict[int, Tensor],
    ) -> None:
        """Times the backward of a call.

        Args:
            outputs: what the call has returned.
            leaves: the same, as later calls have read it.
            read: the identities of activations that the call has read; other leaves are weights.
            gradients: of leaves, by identity, as far as later calls have returned some.
        """
        roots, seeds = [], []
        for output, leaf in zip(outputs, leaves, strict=True):
            gradient = gradients.pop(id(leaf), None)
            if output.grad_fn is not None:
                roots.append(output)
                seeds.append(torch.ones_like(output) if gradient is None else gradient)
            elif gradient is not None and output.requires_grad:  # an element of a tuple is handed on
                _add(gradients, output, gradient)
        wanted = list({id(tensor): tensor for tensor in call.leaves}.values())
        if not roots or not wanted:
            return

        def run() -> list[Tensor]:
            weights = []
            for leaf, gradient in zip(
                wanted, torch.autograd.grad(roots, wanted, seeds, allow_unused=True), strict=True
            ):
                if gradient is not None and id(leaf) in read:
                    _add(gradients, leaf, gradient)
                elif gradient is not None:
                    weights.append(gradient)
            return weights

        start, adding = self.start, self.adding
        self._start()
        try:
            weights, seconds = self._timed(it, run)
        except RuntimeError:  # one that cannot run alone
            self.backward[it.key].append(UNKNOWN_BACKWARD * self.forward[it.key][-1])
            return
        added = sum(adding(nbytes(gradient)) for gradient in weights)
        self.backward[it.key].append(max(0.0, seconds - start) + added)

    def _timed(self, it: Waiting, run: Callable[[], Any]) -> tuple[Any, float]:
        clock = clock_of(it.function)
        ran, began = time.thread_time(), clock()
        result = run()
        seconds = clock() - began
        if clock is not time.thread_time:
            self.wall += seconds
            self.ran += time.thread_time() - ran
        return result, seconds

    @cached_property
    def start(self) -> float:
        """Seconds of starting a backward."""
        return _of_runs(self._start, 5)

    @cached_property
    def adding(self) -> Callable[[int], float]:
        """The seconds of adding a gradient to another one, by its bytes."""
        return _adding()

    @cached_property
    def _empty(self) -> tuple[Tensor, Tensor, Tensor]:
        leaf = torch.zeros((), requires_grad=True)
        return leaf.view_as(leaf), leaf, torch.ones(())

    def _start(self) -> None:
        """An empty backward: it has the code of autograd in the caches, as in a stage, where there is one for all."""
        out, leaf, seed = self._empty
        torch.autograd.grad(out, leaf, seed, retain_graph=True)


def _copied(values: Values, storages: Set[int | None]) -> tuple[Values, set[int]]:
    """Values with these storages copied, each once, and the storages of the copies."""
    made: dict[int, torch.UntypedStorage] = {}

    def copy(tensor: Tensor) -> Tensor:
        key = storage_key(tensor)
        if key is None or key not in storages:
            return tensor
        if key not in made:
            made[key] = tensor.untyped_storage().clone()  # type: ignore[no-untyped-call]
        view = tensor.storage_offset(), tensor.size(), tensor.stride()
        same = torch.empty(0, dtype=tensor.dtype).set_(made[key], *view)
        return same.requires_grad_(tensor.requires_grad)

    found = {node: map_tensors(copy, value) for node, value in values.items()} if storages else dict(values)
    return found, {int(storage._cdata) for storage in made.values()}


def clock_of(function: Any) -> Clock:
    """The clock for a function: that of the thread where it is fine enough, and all of the function runs there."""
    alone = torch.get_num_threads() == 1 and (not is_opaque(function) or is_traceable(function))
    return time.thread_time if alone and _is_fine() else time.perf_counter


@cache
def _is_fine() -> bool:
    """Whether a thread's clock is fine enough."""
    return time.get_clock_info("thread_time").resolution <= FINE


def _of_runs(run: Callable[[], Any], count: int) -> float:
    """The median seconds of several runs, after one that is not timed."""
    clock, times = clock_of(torch.add), []
    for _ in range(count + 1):
        began = clock()
        run()
        times.append(clock() - began)
    return median(times[1:])


def _adding() -> Callable[[int], float]:
    """The seconds of adding a gradient to another one, by its bytes."""

    def measured(size: int) -> float:
        total, gradient = torch.zeros(size // 4), torch.ones(size // 4)
        return _of_runs(lambda: total.add_(gradient), 3)

    (small, large), (short, long) = ADDED, map(measured, ADDED)
    slope = max(0.0, long - short) / (large - small)
    return lambda size: max(0.0, short + slope * (size - small))


def _add(gradients: dict[int, Tensor], leaf: Tensor, gradient: Tensor) -> None:
    before = gradients.get(id(leaf))
    gradients[id(leaf)] = gradient if before is None else before + gradient
