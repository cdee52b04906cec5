"""One pass over a captured graph, which runs every node and keeps the values that are still needed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from pipecompile.capture import Captured
from pipecompile.capture.fake_kernels import STAND_INS
from pipecompile.capture.fake_runs import DATA_DEPENDENT
from pipecompile.capture.opaque_calls import FunctionLeaf
from pipecompile.capture.origin import origin_of
from pipecompile.capture.state.quiet_torch import quiet
from pipecompile.errors import ExecutionError
from pipecompile.ir.device_specs import ACCELERATORS
from pipecompile.ir.graph import Cost, Footprint
from pipecompile.ops.accelerators import factories_on
from pipecompile.ops.device_args import retarget
from pipecompile.ops.operators import is_opaque
from pipecompile.ops.phases import phase
from pipecompile.ops.symbols import resolve
from pipecompile.profile.budget import SECONDS, Budget
from pipecompile.profile.call import Call, as_recorded, described, map_tensors, tensors_of
from pipecompile.profile.in_turn import InTurn
from pipecompile.profile.meters import ENOUGH, UNKNOWN_BACKWARD, Counter, Meter, Share
from pipecompile.profile.repeats import Repeats
from pipecompile.profile.storages import has_storage

Figures = tuple[float, float, int, int]  # seconds and peak bytes of a forward and of a backward
MOST_COUNTED = 10_000  # calls whose counts are remembered
COUNTED: dict[Any, Figures] = {}  # of torch's own functions, by settings, function and shapes
_SOME = ACCELERATORS["A100-40GB"].roofline  # for calls that cannot be measured


class Walk:
    """One pass over the graph, which keeps the values that are still needed.

    Args:
        captured: the captured model.
        device: the device to run on.
        meter: what determines the seconds of a call.
        seconds: of all timed runs.
        repeats: whether nodes like earlier ones need not run (``repeats.py``).

    Attributes:
        costs, footprints: by node name, for nodes that have run.
        storages: the bytes of each storage in a footprint.
    """

    def __init__(
        self,
        captured: Captured,
        device: torch.device,
        meter: Meter,
        seconds: float = SECONDS,
        repeats: bool = True,
    ) -> None:
        self.captured = captured
        self.device = device
        self.meter = meter
        self.values: dict[fx.Node, Any] = {}
        self.costs: dict[str, Cost] = {}
        self.footprints: dict[str, Footprint] = {}
        self.storages: list[int] = []
        self.inputs = {name: self._input(name) for name in captured.call.tensors}
        self.known: dict[Any, Figures] = {}  # by what the call does, and on which shapes
        self.numbers: Any = WeakIdKeyDictionary()  # storage -> its number, None for those of parameters and buffers
        self.kept: set[int] = set()  # storages kept by earlier nodes
        self.attributes = captured.tensors
        self.written = {name for node in captured.graph.nodes for name in origin_of(node).writes}
        self.sizes = captured.sample_sizes
        self.turns = InTurn(self._operands, self._says_where, seconds) if meter.in_turn else None
        self.last_use = {source: node for node in captured.graph.nodes for source in node.all_input_nodes}
        self.keys: dict[str, Any] = {}  # of the nodes that are timed in turn
        self.makes_views: dict[Any, bool] = {}  # by what a call does
        self.views: set[fx.Node] = set()  # whose values are views in a stage, and here leaves
        self.repeats = Repeats(off=not repeats or bool(captured.data_sizes) or self.turns is None)
        calls = (node for node in captured.graph.nodes if node.op in ("call_function", "call_module"))
        self.budget = Budget(calls, seconds)

    def _take(self, turns: InTurn) -> None:
        """Takes the seconds of the nodes that were timed in turn."""
        turns.run()
        for name, key in self.keys.items():
            forward, backward = turns.seconds(key)
            again = forward if name in self.captured.recomputed else 0.0
            self.costs[name] = replace(self.costs[name], forward=forward, backward=backward + again)

    def _operands(self, node: fx.Node, values: dict[fx.Node, Any]) -> tuple[Any, Any]:
        """The arguments of a node on the device."""
        given = fx.map_arg((node.args, node.kwargs), values.__getitem__)
        args, kwargs = retarget(given, self.captured.device, self.device)
        return args, kwargs

    @contextmanager
    def _says_where(self, node: fx.Node) -> Iterator[None]:
        try:
            yield
        except ExecutionError:  # which says where
            raise
        except Exception as error:
            raise ExecutionError(
                f"{origin_of(node)}: cannot run a microbatch of {self.captured.microbatch} rows "
                f"({type(error).__name__}: {error}); the model must accept this batch size (see microbatches=)"
            ) from error

    def visit(self, node: fx.Node) -> None:
        """Runs a node, and frees the values that it is the last one to read."""
        with self._says_where(node):
            self._visit(node)
        for source in node.all_input_nodes:
            if self.last_use[source] is node:
                self.values.pop(source, None)

    def end(self) -> None:
        """Times what still waits, after the last node."""
        if self.turns is not None:
            self._take(self.turns)

    def free(self) -> None:
        """Frees what was run, since this object is in a cycle of references."""
        self.values.clear()
        self.repeats.found.clear()
        if self.turns is not None:
            self.turns.clear()

    def _visit(self, node: fx.Node) -> None:
        match node.op:
            case "placeholder":
                value = self.inputs[node.name] if node.name in self.inputs else self._whole(node)
                self.values[node] = value
                self.footprints[node.name] = Footprint(self._numbers([value]))
            case "get_attr":
                tensor = self.attributes[str(node.target)]
                self.values[node] = self._attribute(tensor, str(node.target) in self.written)
            case "call_function" | "call_method" | "call_module":
                self._measure(node)

    def _input(self, name: str) -> Tensor:
        call = self.captured.call
        tensor = call.tensors[name].detach()
        rows = tensor[: self.captured.microbatch] if name in call.batched else tensor
        return self.meter.tensor(rows.clone()).requires_grad_(call.tensors[name].requires_grad)

    def _attribute(self, tensor: Tensor, written: bool = False) -> Tensor:
        value = self.meter.tensor(tensor)
        if written or not isinstance(tensor, nn.Parameter):
            value = value.detach().clone()  # it may be written in place
        if has_storage(value):
            self.numbers[value.untyped_storage()] = None
        return value.requires_grad_(tensor.requires_grad)

    def _measure(self, node: fx.Node) -> None:
        """Runs a node, keeps its value, and records its cost."""
        args, kwargs = self._operands(node, self.values)
        if node.op == "call_method":
            self.values[node] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
            return
        function = self._leaf(node) if node.op == "call_module" else node.target
        if isinstance(self.meter, Counter):
            if isinstance(function, nn.Module | FunctionLeaf):
                self._count_leaf(node, function, args)
                return
            function = STAND_INS.get(function, function)  # type: ignore[arg-type]
        on_views = bool(origin_of(node).mutates) and not self.views.isdisjoint(node.all_input_nodes)
        key = (node.target, origin_of(node).region, described(args), described(kwargs), on_views)
        operands = tensors_of((args, kwargs))
        if (repeat := self.repeats.of(key, operands)) is not None:
            value, saved = repeat.again(operands)
            self.values[node] = as_recorded(value, node.meta.get("val"))
            self.keys[node.name] = key
            self._note(node, saved, self.known[key])
            self._note_view(node, key, on_views)
            return
        run = Call(node, function, args, kwargs, on_views=on_views)
        turns = self.turns
        if turns is not None:
            turns.before(node, self.values)
        try:
            value, saved = run.value()
            self.makes_views[key] = any(tensor._is_view() for tensor in tensors_of(value))
            self._note_view(node, key, on_views)
            self.values[node] = as_recorded(value, node.meta.get("val"))
        except Exception as error:
            if not isinstance(error, DATA_DEPENDENT) and not self._wants_a_constants_values(node):
                raise
            self._count_leaf(node, None, (args, kwargs))
            return
        self.repeats.add(node, key, operands, self.values[node], saved)
        if key not in self.known:
            if isinstance(self.meter, Counter):
                self.known[key] = self._counted(self.meter, key, run)
            else:
                self.known[key] = self._timed(node, run) if turns is None else (0.0, 0.0, *run.allocated())
        before = len(self.storages)
        self._note(node, saved, self.known[key])
        if turns is not None:
            self.keys[node.name] = key
            turns.add(node, function, key, self.values, sum(self.storages[before:]))

    def _note_view(self, node: fx.Node, key: Any, on_views: bool) -> None:
        """Notes whether a node's value is a view in a stage: one that it makes, or one that it writes."""
        if self.makes_views[key] or on_views:
            self.views.add(node)

    def _counted(self, counter: Counter, key: tuple[Any, ...], run: Call) -> Figures:
        """What counting gives for a call, which is remembered for torch's own functions."""
        if is_opaque(key[0]):
            return self._figures(run)
        full = (counter.settings, *key)
        found = COUNTED.get(full)
        if found is None:
            if len(COUNTED) >= MOST_COUNTED:
                COUNTED.clear()
            found = COUNTED[full] = self._figures(run)
        return found

    def _timed(self, node: fx.Node, run: Call) -> Figures:
        figures = self._figures(run, self.budget.share(node))
        self.budget.spend(node, figures[0] + figures[1])
        return figures

    def _figures(self, run: Call, share: Share = lambda seconds: ENOUGH) -> Figures:
        allocated = run.allocated()  # first, since a first run takes longer
        forward, backward = self.meter.seconds(run, share)
        return forward, backward, *allocated

    def _wants_a_constants_values(self, node: fx.Node) -> bool:
        """Whether a node may need the values of an integer tensor of the model, which fake tensors do not have."""
        read = [self.values[n] for n in node.all_input_nodes if n.op == "get_attr"]
        return isinstance(self.meter, Counter) and any(not value.is_floating_point() for value in read)

    def _note(self, node: fx.Node, saved: list[Tensor], figures: Figures) -> None:
        forward, backward, allocated, returned = figures
        values = self._numbers(tensors_of(self.values[node]))
        stretch = self.captured.recomputed.get(node.name)
        kept, again = self._numbers(saved), self._numbers([])
        if stretch is not None:
            kept, again = self._numbers(self._read_from_outside(node)), kept
            backward += forward
        nbytes = sum(self.storages[number] for number in kept if number not in self.kept)
        self.kept.update(kept)
        self.costs[node.name] = Cost(forward, backward, nbytes)
        self.footprints[node.name] = Footprint(
            values=values,
            saved=kept,
            forward_bytes=allocated,
            backward_bytes=returned,
            again=again,
            stretch=stretch,
            repeats=node.name in self.captured.repeatable,
        )

    def _read_from_outside(self, node: fx.Node) -> list[Tensor]:
        """The values that a recomputed node reads from outside its stretch, which are kept for it."""
        region = self.captured.recomputed
        outside = [n for n in node.all_input_nodes if region.get(n.name) != region[node.name]]
        return tensors_of([self.values[n] for n in outside])

    def _numbers(self, tensors: list[Tensor]) -> tuple[int, ...]:
        """The storages of tensors without repeats, and without those of parameters and buffers."""
        found: dict[int, None] = {}
        for tensor in filter(has_storage, tensors):
            storage = tensor.untyped_storage()
            if storage not in self.numbers:
                self.numbers[storage] = len(self.storages)
                self.storages.append(storage.nbytes())
            if (number := self.numbers[storage]) is not None:
                found[number] = None
        return tuple(found)

    def _whole(self, node: fx.Node) -> Tensor:
        """A stand-in for a value computed from the whole batch (such as the number of targets)."""
        like = node.meta["val"]
        return self.meter.empty(self._shape(like), like.dtype).fill_(1)

    def _leaf(self, node: fx.Node) -> nn.Module:
        """A leaf module on the tensors of this pass."""
        prefix = f"{node.target}."
        mine = {n: self._attribute(t, n in self.written) for n, t in self.attributes.items() if n.startswith(prefix)}
        return self.captured.leaf(str(node.target), mine)

    def _shape(self, tensor: Tensor) -> list[int]:
        """The shape of a recorded tensor at the sample microbatch."""
        return [resolve(size, self.sizes) for size in tensor.shape]

    def _count_leaf(self, node: fx.Node, leaf: nn.Module | FunctionLeaf | None, args: Any) -> None:
        """Estimates a call that cannot run on fakes: as if each row of its first tensor met each parameter once."""
        roofline = self.meter.roofline if isinstance(self.meter, Counter) else _SOME
        self.values[node] = map_tensors(
            lambda t: self.meter.empty(self._shape(t), t.dtype).requires_grad_(t.requires_grad), node.meta["val"]
        )
        parameters = list(leaf.parameters()) if isinstance(leaf, nn.Module) else []
        tensors = tensors_of((args, self.values[node]))
        rows = tensors[0].numel() // max(1, tensors[0].shape[-1] if tensors[0].ndim else 1) if tensors else 1
        nbytes = sum(t.nbytes for t in [*tensors, *parameters])
        forward = roofline.seconds(2 * rows * sum(p.numel() for p in parameters), nbytes)
        self._note(node, tensors, (forward, UNKNOWN_BACKWARD * forward, nbytes, nbytes))


def run_in_turn(walks: Sequence[Walk]) -> None:
    """Runs walks over one graph, node by node in each, so that what the machine does meanwhile changes all alike."""
    first = walks[0]
    nodes = list(first.captured.graph.nodes)
    with quiet(), first.meter.fake, factories_on(first.device), phase("profile", len(nodes)) as advance:
        for walk in walks[1:]:
            if walk.turns is not None and first.turns is not None:
                walk.turns.share(first.turns)
        try:
            for node in nodes:
                for walk in walks:
                    walk.visit(node)
                advance()
            for walk in walks:
                walk.end()
        finally:
            for walk in walks:
                walk.free()
