"""What each node costs: seconds forward and backward, and bytes kept for the backward pass.

The captured graph is run node by node on the sample microbatch, and each node's backward on its own. Equal operations
on equal shapes are timed once. A model without memory (on the meta device), or a device that is not here, is *counted*
instead: the same walk on fake tensors, with seconds from operations and bytes moved over a device's roofline.

Saved bytes are counted by storage: what several nodes keep counts for the first, and parameters do not count.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

import torch
import torch.fx as fx
from rich.progress import Progress
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from pipecompile.capture import Captured
from pipecompile.capture.leaves import FunctionLeaf
from pipecompile.capture.origin import origin_of
from pipecompile.capture.recorder import DATA_DEPENDENT
from pipecompile.capture.stand_ins import STAND_INS
from pipecompile.capture.symbols import resolve
from pipecompile.errors import ExecutionError, InputError
from pipecompile.graph import Cost, CostedGraph, Graph
from pipecompile.regions import enter_region
from pipecompile.retarget import retarget, threads_of

How = Literal["measure", "count"]
PATIENCE = 2.0  # seconds until a progress bar shows
REPEATS = (3, 7)  # timed runs of an operation, at least and at most
UNKNOWN_BACKWARD = 2.0  # forwards that a backward takes which cannot be run on its own
ENOUGH = 0.05  # seconds: an operation is not repeated further once it has been timed for so long


@dataclass(frozen=True, slots=True)
class Roofline:
    """What a device can do at most; an operation takes the longer of its arithmetic and its memory traffic.

    Default: NVIDIA A100 40 GB, TF32 (data sheet: 156 TFLOP/s, 1,555 GB/s), and 5 microseconds to launch a kernel.
    """

    flops: float = 156e12  # per second
    bandwidth: float = 1.555e12  # bytes per second
    launch: float = 5e-6  # seconds

    def seconds(self, flops: int, nbytes: int) -> float:
        if not flops and not nbytes:
            return 0.0  # a view
        return max(self.launch, flops / self.flops, nbytes / self.bandwidth)


def profile(
    captured: Captured,
    graph: Graph,
    how: How | None = None,
    device: torch.device | None = None,
    roofline: Roofline | None = None,
    threads: int | None = None,
) -> CostedGraph:
    """The graph with the cost of each node for one microbatch.

    Args:
        how: "measure" on ``device``, or "count"; by default measured unless the model is on the meta device.
        device: where to measure; by default where the model is.
        threads: within an operation on the CPU while it is measured; by default the caller's.

    Raises:
        InputError: a model on the meta device cannot be measured.
    """
    on_meta = any(p.is_meta for p in captured.model.parameters())
    how = how or ("count" if on_meta else "measure")
    if how == "measure" and on_meta:
        raise InputError("a model on the meta device has no values to measure with; use profile='count'")
    if device is None:
        device = torch.device("cpu") if on_meta else captured.device
    meter: _Meter = _Clock(device) if how == "measure" else _Counter(roofline or Roofline())
    with threads_of(threads or torch.get_num_threads()):
        costs = _Walk(captured, device, meter).run()
    origin = f"measured: {device}, torch {torch.__version__}" if how == "measure" else "counted"
    return CostedGraph(graph, tuple(costs.get(node.name, Cost()) for node in graph.nodes), origin)


class _Clock:
    """Measures seconds; CUDA work is waited for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.fake: Any = nullcontext()

    def tensor(self, tensor: Tensor) -> Tensor:
        return tensor.detach().to(self.device)

    def seconds(self, call: _Call) -> tuple[float, float]:
        forward = self.repeated(call.forward)
        if not call.differentiable:
            return forward, 0.0
        try:
            both = self.repeated(lambda: call.backward(call.forward()))
        except RuntimeError:
            return forward, UNKNOWN_BACKWARD * forward
        return forward, max(0.0, both - forward)

    def repeated(self, run: Callable[[], Any]) -> float:
        """The median of several runs."""
        run()
        times: list[float] = []
        least, most = REPEATS
        while len(times) < least or (len(times) < most and sum(times) < ENOUGH):
            self._wait()
            start = time.perf_counter()
            run()
            self._wait()
            times.append(time.perf_counter() - start)
        return median(times)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class _Counter:
    """Counts operations and bytes on fake tensors."""

    def __init__(self, roofline: Roofline) -> None:
        self.roofline = roofline
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)

    def tensor(self, tensor: Tensor) -> Tensor:
        if tensor.is_meta:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
        return self.fake.from_tensor(tensor.detach(), static_shapes=True)

    def seconds(self, call: _Call) -> tuple[float, float]:
        with FlopCounterMode(display=False) as counter:
            outputs = call.forward()
            nbytes = call.traffic(outputs)
            forward = self.roofline.seconds(counter.get_total_flops(), nbytes)
            if not call.differentiable:
                return forward, 0.0
            try:
                call.backward(outputs)
            except RuntimeError:
                return forward, UNKNOWN_BACKWARD * forward
            both = self.roofline.seconds(counter.get_total_flops(), 3 * nbytes)
        return forward, max(0.0, both - forward)


_Meter = _Clock | _Counter


class _Walk:
    """One walk over the graph; holds the values that are still needed."""

    def __init__(self, captured: Captured, device: torch.device, meter: _Meter) -> None:
        self.captured = captured
        self.device = device
        self.meter = meter
        self.values: dict[fx.Node, Any] = {}
        self.inputs = {name: self._input(name) for name in captured.call.tensors}
        self.timed: dict[Any, tuple[float, float]] = {}
        self.kept: dict[int, Any] = {}  # storages that some node keeps, held so that their address is not used twice
        self.attributes = captured.tensors
        self.sizes = captured.sample_sizes

    def run(self) -> dict[str, Cost]:
        costs: dict[str, Cost] = {}
        nodes = list(self.captured.graph.nodes)
        last_use = {source: node for node in nodes for source in node.all_input_nodes}
        with self.meter.fake, _progress("profiling", len(nodes)) as advance:
            for node in nodes:
                cost = self._visit_or_say(node)
                if cost is not None:
                    costs[node.name] = cost
                for source in node.all_input_nodes:
                    if last_use[source] is node:
                        self.values.pop(source, None)
                advance()
        return costs

    def _visit_or_say(self, node: fx.Node) -> Cost | None:
        try:
            return self._visit(node)
        except Exception as error:
            raise ExecutionError(
                f"{origin_of(node)}: a microbatch of {self.captured.microbatch} rows cannot be run: "
                f"{type(error).__name__}: {error}"
            ) from error

    def _visit(self, node: fx.Node) -> Cost | None:
        match node.op:
            case "placeholder":
                self.values[node] = self.inputs[node.name] if node.name in self.inputs else self._whole(node)
            case "get_attr":
                tensor = self.attributes[str(node.target)]
                self.values[node] = self._attribute(tensor)
            case "call_function" | "call_method" | "call_module":
                return self._measure(node)
        return None

    def _input(self, name: str) -> Tensor:
        call = self.captured.call
        tensor = call.tensors[name].detach()
        rows = tensor[: self.captured.microbatch] if name in call.batched else tensor
        return self.meter.tensor(rows.clone()).requires_grad_(call.tensors[name].requires_grad)

    def _attribute(self, tensor: Tensor) -> Tensor:
        value = self.meter.tensor(tensor)
        if isinstance(tensor, nn.Parameter):
            self.kept[value.untyped_storage()._cdata] = value  # never counted as saved
            return value.requires_grad_(tensor.requires_grad)
        return value.clone()  # a buffer may be written

    def _measure(self, node: fx.Node) -> Cost:
        """Runs a node, keeps its value, and says what it costs."""
        args, kwargs = fx.map_arg((node.args, node.kwargs), self.values.__getitem__)
        args = retarget(args, self.captured.device, self.device)
        kwargs = retarget(kwargs, self.captured.device, self.device)
        if node.op == "call_method":
            self.values[node] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
            return Cost()
        function = self._leaf(node) if node.op == "call_module" else node.target
        if isinstance(self.meter, _Counter):
            if isinstance(function, nn.Module | FunctionLeaf):
                return self._count_leaf(node, function, args)
            function = STAND_INS.get(function, function)  # type: ignore[arg-type]
        run = _Call(node, function, args, kwargs)
        try:
            value, saved = run.value()
            self.values[node] = _as_recorded(value, node.meta.get("val"))
        except DATA_DEPENDENT:
            return self._count_leaf(node, None, (args, kwargs))
        key = (node.target, origin_of(node).region, _described(args), _described(kwargs))
        if key not in self.timed:
            self.timed[key] = self.meter.seconds(run)
        forward, backward = self.timed[key]
        if node.name in self.captured.recomputed:
            return Cost(forward, forward + backward, self._newly_kept(self._read_from_outside(node)))
        return Cost(forward, backward, self._newly_kept(saved))

    def _read_from_outside(self, node: fx.Node) -> list[Tensor]:
        """What a node that is computed again reads of nodes that are not: that is kept for it."""
        region = self.captured.recomputed
        outside = [n for n in node.all_input_nodes if region.get(n.name) != region[node.name]]
        return _tensors([self.values[n] for n in outside])

    def _newly_kept(self, saved: list[Tensor]) -> int:
        """Bytes of saved tensors whose storage nothing before has kept."""
        nbytes = 0
        for tensor in saved:
            storage = tensor.untyped_storage()
            if storage._cdata not in self.kept:
                self.kept[storage._cdata] = tensor
                nbytes += storage.nbytes()
        return nbytes

    def _whole(self, node: fx.Node) -> Tensor:
        """A stand-in for a value of the whole batch that the model reads (how many targets count)."""
        like = node.meta["val"]
        return self.meter.tensor(torch.ones(self._shape(like), dtype=like.dtype))

    def _leaf(self, node: fx.Node) -> nn.Module:
        """A module that is kept whole, on tensors of this walk."""
        prefix = f"{node.target}."
        mine = {name: self._attribute(t) for name, t in self.attributes.items() if name.startswith(prefix)}
        return self.captured.leaf(str(node.target), mine)

    def _shape(self, tensor: Tensor) -> list[int]:
        """The shape of a recorded tensor at the sample microbatch."""
        return [resolve(size, self.sizes) for size in tensor.shape]

    def _count_leaf(self, node: fx.Node, leaf: nn.Module | FunctionLeaf | None, args: Any) -> Cost:
        """A call that no fake can run: as if each row of its first tensor met each of its parameters once."""
        roofline = self.meter.roofline if isinstance(self.meter, _Counter) else Roofline()
        self.values[node] = _map_tensors(
            lambda t: torch.empty(self._shape(t), dtype=t.dtype).requires_grad_(t.requires_grad), node.meta["val"]
        )
        parameters = list(leaf.parameters()) if isinstance(leaf, nn.Module) else []
        tensors = _tensors((args, self.values[node]))
        rows = tensors[0].numel() // max(1, tensors[0].shape[-1] if tensors[0].ndim else 1) if tensors else 1
        nbytes = sum(t.nbytes for t in [*tensors, *parameters])
        forward = roofline.seconds(2 * rows * sum(p.numel() for p in parameters), nbytes)
        return Cost(forward, 2 * forward, sum(t.nbytes for t in tensors))


class _Call:
    """A node's call on leaves of its own, so that its backward can run alone."""

    def __init__(self, node: fx.Node, function: Any, args: Any, kwargs: Any) -> None:
        self.function = function
        self.region = origin_of(node).region
        self.mutates = origin_of(node).mutates
        self.args, self.kwargs = args, kwargs
        own = list(function.parameters()) if isinstance(function, nn.Module) else []
        self.leaves: list[Tensor] = [t for t in [*_tensors((args, kwargs)), *own] if t.requires_grad]
        self.differentiable = False

    def value(self) -> tuple[Any, list[Tensor]]:
        """What the nodes after this one read, and the tensors that autograd keeps.

        A write goes to the very memory that later nodes read, without gradients. What it would keep is seen on copies,
        and told in terms of the originals.
        """
        if not self.mutates:
            return self._watched(self.args, self.kwargs)
        copies = _map_tensors(torch.clone, (self.args, self.kwargs))
        out, saved = self._watched(*copies)
        with torch.no_grad():
            value = self._run(self.args, self.kwargs)
        pairs = zip(_tensors((copies, out)), _tensors(((self.args, self.kwargs), value)), strict=True)
        original = {copy.untyped_storage()._cdata: tensor for copy, tensor in pairs}
        return value, [original.get(t.untyped_storage()._cdata, t) for t in saved]

    def _watched(self, args: Any, kwargs: Any) -> tuple[Any, list[Tensor]]:
        saved: list[Tensor] = []

        def pack(tensor: Tensor) -> Tensor:
            saved.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            return self._run(args, kwargs), saved

    def forward(self) -> list[Tensor]:
        """Runs the call as often as one likes; the outputs that a backward can start from."""
        copied = _map_tensors(torch.clone, (self.args, self.kwargs)) if self.mutates else (self.args, self.kwargs)
        outputs = _tensors(self._run(*copied))
        self.differentiable = bool(self.leaves) and any(t.grad_fn is not None for t in outputs)
        return outputs

    def backward(self, outputs: list[Tensor]) -> None:
        """Runs the backward of a forward's outputs."""
        roots = [t for t in outputs if t.grad_fn is not None]
        torch.autograd.grad(roots, self.leaves, [torch.ones_like(t) for t in roots], allow_unused=True)

    def traffic(self, outputs: list[Tensor]) -> int:
        """Bytes that a forward reads and writes; none if its outputs are views."""
        read = _tensors((self.args, self.kwargs))
        known = {t.untyped_storage()._cdata for t in read}
        is_view = all(t.untyped_storage()._cdata in known for t in outputs)
        return 0 if is_view else sum(t.nbytes for t in read + outputs)

    def _run(self, args: Any, kwargs: Any) -> Any:
        with enter_region(self.region.grad, self.region.autocast):
            return self.function(*args, **kwargs)


@contextmanager
def _progress(task: str, total: int) -> Iterator[Callable[[], None]]:
    """A progress bar that shows itself only when the work takes longer than ``PATIENCE``."""
    start = time.perf_counter()
    bar = Progress(transient=True)
    handle = bar.add_task(task, total=total)

    def advance() -> None:
        bar.advance(handle)
        if time.perf_counter() - start > PATIENCE:
            bar.start()

    try:
        yield advance
    finally:
        if bar.live.is_started:
            bar.stop()


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, tuple | list):
        return [tensor for item in value for tensor in _tensors(item)]
    if isinstance(value, dict):
        return [tensor for item in value.values() for tensor in _tensors(item)]
    return []


def _map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    return torch.utils._pytree.tree_map_only(Tensor, function, value)


def _as_recorded(value: Any, recorded: Any) -> Any:
    """A node's value as the next node's leaf, which wants a gradient if the trace says so."""
    wants = iter([t.requires_grad for t in _tensors(recorded)])
    return _map_tensors(lambda t: t.detach().requires_grad_(next(wants, False)), value)


def _described(value: Any) -> Any:
    """A hashable description of arguments: equal for equal operations on equal shapes."""
    if isinstance(value, Tensor):
        return (tuple(value.shape), value.stride(), value.dtype, value.requires_grad)
    if isinstance(value, tuple | list):
        return tuple(map(_described, value))
    if isinstance(value, dict):
        return tuple((key, _described(item)) for key, item in value.items())
    return repr(value)
