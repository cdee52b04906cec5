"""One attempt at tracing a model: runs its forward once on fake tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from types import FunctionType
from typing import Any

import sympy
import torch
import torch.fx as fx
from torch import Tensor, nn

from pipecompile.capture.ancestors import ancestors
from pipecompile.capture.call import Call, TensorName, order_of
from pipecompile.capture.captured import Captured, Output, SymbolicSizes, device_of, sample_sizes
from pipecompile.capture.checkpoint_regions import recomputed
from pipecompile.capture.data_dependent_sizes import largest_sizes
from pipecompile.capture.evaluate import META_TO_CPU, Evaluator
from pipecompile.capture.input_reads import Values
from pipecompile.capture.node_table import NodeTable
from pipecompile.capture.opaque_calls import Leaf, LeafCall, attribute_of
from pipecompile.capture.opaque_outputs import fake_result, learn
from pipecompile.capture.opaque_recording import LeafRecorder
from pipecompile.capture.opaque_scope import Part, Reason, name_of_part
from pipecompile.capture.origin import Origin, origin_of
from pipecompile.capture.patches import patched
from pipecompile.capture.purity import has_effect
from pipecompile.capture.pytrees import flatten
from pipecompile.capture.recorder import Recorder
from pipecompile.capture.scopes import Scopes
from pipecompile.capture.state.attribute_trace import Watch
from pipecompile.capture.state.container_proxies import without_stand_ins
from pipecompile.capture.state.counters import Number, is_number
from pipecompile.capture.state.fingerprints import imprint
from pipecompile.capture.state.guards import Attribute, Attributes, Update
from pipecompile.capture.state.lru_caches import forgotten
from pipecompile.capture.state.model_state import Change, fake_of, fakes_of, named_tensors, with_fakes, without_caches
from pipecompile.capture.state.reachable import Reach
from pipecompile.capture.state.restore import Noted, generators_kept
from pipecompile.capture.state.sources import Answer, Fact
from pipecompile.errors import CaptureError, DependsOnData, PipecompileError
from pipecompile.ops.device_args import retarget
from pipecompile.ops.functional import after, number, write_back
from pipecompile.ops.module_tree import owner_of
from pipecompile.ops.source_lines import failing_line
from pipecompile.ops.symbols import Shapes, Sizes
from pipecompile.ops.tensor_args import is_real
from pipecompile.ops.torch_internals import (
    DisableTorchFunction,
    FakeTensorMode,
    _disable_current_modes,
    enable_python_dispatcher,
    pytree,
)


class NeedsNumbers(Exception):
    """A leaf must be run to find out what it returns, so every size must be a number."""


class Trace:
    """One attempt at tracing.

    Args:
        model: The model to trace.
        call: Sample arguments, for the whole batch.
        rows: Rows of each microbatch; the first is traced.
        forward: The function to trace.
        symbolic: Which sizes to make symbolic.
        kept: Parts to keep whole, with reasons.
        reach: State that forward may read and change.
        numbers: Attributes that an earlier trace both read and set, which get stand-ins.
        follow: Whether random numbers of Python and numpy get stand-ins.
        gradients: Whether gradients are enabled during the trace.
        operations: Whether to record aten operations instead of functions.
    """

    def __init__(
        self,
        model: nn.Module,
        call: Call,
        rows: Sequence[int],
        forward: Callable[..., Any],
        symbolic: SymbolicSizes,
        kept: Mapping[Part, Reason],
        reach: Reach,
        numbers: Sequence[Attribute] = (),
        follow: bool = True,
        gradients: bool = True,
        operations: bool = False,
    ) -> None:
        self.model = model
        self.reach = reach
        self.call = call
        self.microbatch = microbatch = rows[0]
        self.forward = forward
        self.symbolic = symbolic
        self.device = device_of(model, call)
        self.graph = fx.Graph()
        self.shapes = Shapes() if symbolic else None
        self.sizes = Sizes(self.graph, self.shapes)
        self.mode = FakeTensorMode(shape_env=self.shapes, allow_non_fake_inputs=True)
        self.constants: dict[str, Tensor] = {}
        self.real = dict(named_tensors(model))
        self.parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        self.buffers = set(self.real) - self.parameters
        self.values = Values(call.tensors, call.alike(rows), self._attribute, self.parameters.__contains__)
        self.kept = kept
        self.sample = {n: t.detach()[:microbatch] if n in call.batched else t for n, t in call.tensors.items()}
        leaves = frozenset(part for part in kept if isinstance(part, str))
        self.scopes = Scopes()
        self.table = NodeTable(self.graph, self.sizes, self.scopes, self._constant, self._number_input)
        self.recorder = Recorder(self.table, self.values, LeafRecorder(self.table, leaves, self._learn))
        self.recorder.generators.update(map(id, (*reach.generators, *call.leaves)))
        self.evaluator = Evaluator(self.sample, self._attribute, self._leaf)
        self.expected: dict[str, tuple[Any, ...]] = {}
        self.numbers = numbers
        self.follow = follow
        self.stood_in = False  # whether random numbers that forward drew had stand-ins
        self.drew_whole = False  # whether a part kept whole drew random numbers of Python or numpy
        self.inputs: dict[str, Number] = {}  # numbers that the graph takes as inputs
        self.number_nodes: dict[str, fx.Node] = {}
        self.gradients = gradients
        self.operations = operations
        self.counters: tuple[Attribute, ...] = ()  # numbers that forward has read and set
        self.written: dict[str, str] = {}  # tensor of the call -> node written to it
        self.left: dict[str, Output] = {}  # tensors that forward stores somewhere, by node

    def run(self, reasons: list[str]) -> Captured:
        noted = Noted(self.reach)
        with torch.inference_mode(False), generators_kept(self.reach.generators), noted.kept():
            return self._run_outside_inference(reasons, noted)

    def _run_outside_inference(self, reasons: list[str], noted: Noted) -> Captured:
        fakes = fakes_of(self.model, self.mode, self.device)
        for name, fake in fakes.items():
            self.table.add_attribute(name, fake, self.real[name])
        inputs = self._fake_inputs()
        paths = {id(module): path for path, module in reversed([*self.model.named_modules()])}
        with (
            with_fakes(self.model, fakes, self._is_replaced) as changes,
            without_caches(self.model) as (notes, caches),
        ):
            plain = [leaf for leaf in self.call.leaves if not isinstance(leaf, TensorName)]
            watch = Watch(
                self.model,
                self.reach,
                changes.before,
                self.numbers,
                caches,
                self.follow,
                lambda: self.scopes.inside_leaf,
                self.recorder.ran,
                plain,
            )
            try:
                with watch.watching(), forgotten(self.model):
                    out = self._run(inputs, paths)
            finally:
                self.stood_in, self.drew_whole = watch.drawing.stood_in, watch.drawing.in_leaf
        watch.note([*changes.attributes, *self._frozen(fakes)], noted.filled())
        self.counters = watch.counters
        self.recorder.ran.add(part for part in self.kept if isinstance(part, FunctionType))
        whole = {path: module for path, module in self.model.named_modules() if path in self.kept}
        self._write_back({**self.recorder.data_writes.last_values(), **changes.rebound})
        attributes = watch.attributes(whole, self._left_behind)
        attributes = replace(attributes, facts=(*attributes.facts, *self._modes_asked()))
        self._note_written(inputs)
        notes += self._give_up_notes(reasons)
        notes += [f"{name_of_part(part)} is kept whole: {why.text[:200]}" for part, why in self.kept.items()]
        return self._finish(without_stand_ins(out), attributes, notes)

    @property
    def asks_for_gradients(self) -> bool:
        """Whether the model's Python has asked whether gradients are enabled."""
        return torch.is_grad_enabled in self.recorder.ran.asked

    def _modes_asked(self) -> list[Fact]:
        """Returns the answers that the trace gave about the modes of the calling thread."""
        given = {torch.is_grad_enabled: self.gradients, torch.is_inference_mode_enabled: False}
        return [
            Fact(Answer(ask, f"torch.{ask.__name__}()"), imprint(answer), str(answer))
            for ask, answer in given.items()
            if ask in self.recorder.ran.asked
        ]

    def _frozen(self, fakes: Mapping[str, Tensor]) -> list[Change]:
        """Returns the parameters whose ``requires_grad`` forward has changed."""
        changed = [(name, fake) for name, fake in fakes.items() if name in self.parameters]
        return [
            Change(Attribute(self.real[name], "requires_grad", f"{name}.requires_grad"), fake.requires_grad)
            for name, fake in changed
            if fake.is_leaf and fake.requires_grad != self.real[name].requires_grad
        ]

    def _run(self, inputs: Mapping[str, Tensor], paths: Mapping[int, str]) -> Any:
        try:
            with (
                torch.set_grad_enabled(self.gradients),
                self.mode,
                enable_python_dispatcher(),
                patched(
                    self.recorder, self.model, paths, [part for part in self.kept if isinstance(part, FunctionType)]
                ),
                self.recorder,
                self.recorder.below() if self.operations else nullcontext(),
            ):
                args, kwargs = self.call.rebuild(inputs)
                return self.forward(*args, **kwargs)
        except PipecompileError:
            raise
        except Exception as error:
            error.origin = Origin(self.scopes.path, failing_line(error))  # type: ignore[attr-defined]
            raise

    def _fake_inputs(self) -> dict[str, Tensor]:
        """Creates placeholders and fakes for the input tensors, with the sizes of a microbatch."""
        symbols: dict[tuple[str, int], int | torch.SymInt] = {}
        fakes: dict[str, Tensor] = {}
        for name, real in self.call.tensors.items():
            shape = [self._size(name, real, dim, symbols) for dim in range(real.ndim)]
            order = order_of(real)
            with self.mode, torch.no_grad():
                fake = torch.empty([shape[d] for d in order or range(real.ndim)], dtype=real.dtype, device=self.device)
                fake = fake if order is None else fake.permute(sorted(range(real.ndim), key=order.__getitem__))
            fake.requires_grad_(real.requires_grad)
            placeholder = self.graph.create_node("placeholder", name, name=name)
            placeholder.meta["origin"] = Origin()
            self.table.add_input(fake, placeholder)
            for dim, size in enumerate(shape):
                if isinstance(size, torch.SymInt):
                    self.sizes.declare(size, placeholder, dim)
            self.expected[placeholder.name] = tuple(_expression(size) for size in shape)
            fakes[name] = fake
        return fakes

    def _size(
        self, name: str, real: Tensor, dim: int, symbols: dict[tuple[str, int], int | torch.SymInt]
    ) -> int | torch.SymInt:
        size = int(real.shape[dim])
        if dim == 0 and name in self.call.batched:
            kind, size = "batch", self.microbatch
        else:
            kind = "length"
        fixed = (
            SymbolicSizes.BATCH not in self.symbolic
            if kind == "batch"
            else not self._is_length(real, dim, size, symbols)
        )
        if self.shapes is None or fixed:
            return size
        if (kind, size) not in symbols:
            hint = max(2, size) if kind == "batch" else size
            symbols[kind, size] = self.shapes.symbol(f"{name}.{dim}", hint)
        return symbols[kind, size]

    def _is_length(self, real: Tensor, dim: int, size: int, symbols: dict[tuple[str, int], int | torch.SymInt]) -> bool:
        """Whether a dimension is likely to change between steps: of ids, of sequences, or as long as one of those."""
        if SymbolicSizes.LENGTHS not in self.symbolic:
            return False
        if ("length", size) in symbols:
            return True
        ids = not real.dtype.is_floating_point
        return (ids and size > 1) or (real.ndim == 3 and dim == 1)

    def _attribute(self, name: str) -> Tensor:
        return self.constants[name] if name in self.constants else self.real[name]

    def _constant(self, tensor: Tensor) -> tuple[str, Tensor]:
        """Returns the name in the graph and a fake for a real tensor that is not a parameter or buffer of the model."""
        if tensor.grad_fn is not None:
            raise CaptureError(
                f"{self.scopes.here}: forward uses a tensor of shape {tuple(tensor.shape)} that was computed before "
                f"this call and has a grad_fn, so gradients would flow out of this call; call detach() on it where it "
                f"is stored"
            )
        if tensor.requires_grad:
            raise CaptureError(
                f"{self.scopes.here}: forward uses a tensor of shape {tuple(tensor.shape)} that requires grad but is "
                f"not a parameter of the model, so it would get no gradient; register it as an nn.Parameter"
            )
        name = f"_constant{len(self.constants)}"
        self.constants[name] = tensor
        return name, fake_of(tensor, self.mode, self.device)

    def _is_replaced(self, tensor: Tensor, value: Tensor) -> bool:
        """Whether forward replaces a real tensor that is not a parameter or buffer and whose value the graph reads."""
        if self.table.fakes.get(id(tensor)) is value:
            return False
        used = {str(node.target) for node in self.graph.nodes if node.op == "get_attr"}
        return any(tensor is constant and name in used for name, constant in self.constants.items())

    def _finish(self, out: Any, attributes: Attributes, notes: list[str]) -> Captured:
        self._refuse_moving_reads()
        leaves, spec = flatten(out)
        with self.mode:
            lowered = [self.table.lower(leaf) for _, leaf in leaves]
        lowered = [self._as_output(leaf, low) for (_, leaf), low in zip(leaves, lowered, strict=True)]
        outputs = tuple(self._output(path, leaf, low) for (path, leaf), low in zip(leaves, lowered, strict=True))
        reads = self._extract_reads()
        nodes = {node.name: node for node in self.graph.nodes}
        left = tuple(self.left.values())
        returned = [low for low in lowered if isinstance(low, fx.Node)]
        self.graph.output((*returned, *(nodes[str(output.node)] for output in left)))
        self.graph.eliminate_dead_code(is_impure_node=_must_stay)
        alive = {node.name for node in self.graph.nodes}
        shared = [[n.name for n in group if n.name in alive] for group in self.table.aliases.groups]
        groups = [tuple(dict.fromkeys(group)) for group in shared if len(set(group)) > 1]
        sizes = {symbol: (node.name, dim) for symbol, (node, dim) in self.sizes.sources.items()}
        return Captured(
            model=self.model, graph=self.graph, constants=self.constants, call=self._call_with_numbers(),
            numbers={name: value.of for name, value in self.inputs.items()}, draws_whole=self.drew_whole,
            device=self.device,
            microbatch=self.microbatch, symbolic=self.symbolic, attributes=attributes,
            outputs=outputs, left=left, out_spec=spec,
            leaves={p: tuple(c) for p, c in self.recorder.leaves.calls.items()},
            sizes=sizes, data_sizes=largest_sizes(self.graph, sample_sizes(sizes, self.call, self.microbatch)),
            shapes=self.expected, guards=self.shapes.decided() if self.shapes else (),
            assumed=self.shapes.assumed() if self.shapes else (), reads=reads,
            read_values=tuple(read.value for read in self.values.reads),
            read_extremes=tuple(read.extreme for read in self.values.reads),
            groups=tuple(groups), recomputed=recomputed(self.graph, groups), notes=tuple(notes),
            returns=tuple(
                (path, tuple(node.name if node is not None and node.name in alive else None for node in nodes))
                for path, nodes in self.recorder.returns
            ),
            written_inputs=self.written,
        )  # fmt: skip

    def _call_with_numbers(self) -> Call:
        """Returns the sample with the numbers that Python computed for it."""
        numbers = {name: torch.tensor(value.value, dtype=_dtype_of(value)) for name, value in self.inputs.items()}
        return replace(self.call, tensors={**self.call.tensors, **numbers})

    def _refuse_moving_reads(self) -> None:
        """Raises ``DependsOnData`` if a guard depends on a buffer that each microbatch changes."""
        written = {name for node in self.graph.nodes for name in origin_of(node).writes}
        for read in (read.node for read in self.values.reads):
            moving = [n for n in ancestors([read]) if n.op == "get_attr" and str(n.target) in written]
            if moving:
                self.scopes.paths.append(origin_of(read).path)
                raise DependsOnData(
                    f"{origin_of(read)}: the model's Python reads buffer {moving[0].target!r}, which its forward "
                    f"changes; keep the module whole with leaf_modules="
                )

    def _write_back(self, rebound: dict[str, Tensor]) -> None:
        for name, value in rebound.items():
            real = self._attribute(name)
            with self.mode:
                buffer, new = self.table.attribute(name, self.table.fakes[id(real)]), self.table.node_of(value)
            node = self.table.emit(write_back, (buffer, new))
            node.meta.update(val=value, origin=replace(origin_of(node), writes=(name,), mutates=True))
            with self.graph.inserting_after(buffer):  # readers of the old value must not see the write
                old = self.graph.call_function(torch.clone, (buffer,))
            old.meta.update(buffer.meta, origin=Origin())
            keep = {old, node}
            buffer.replace_all_uses_with(old, delete_user_cb=lambda user, keep=keep: user not in keep)  # type: ignore[misc]

    def _number_input(self, value: Number) -> fx.Node:
        """Returns the node of a number that Python computes before each step, read from an extra input of the graph."""
        name = next((name for name, known in self.inputs.items() if known is value), "")
        if not name:
            name = f"_number{len(self.inputs)}"
            self.inputs[name] = value
            last = [node for node in self.graph.nodes if node.op == "placeholder"][-1]
            with self.graph.inserting_after(last):
                placeholder = self.graph.create_node("placeholder", name, name=name)
            with self.mode:
                placeholder.meta.update(val=torch.empty((), dtype=_dtype_of(value)), origin=Origin())
            with self.graph.inserting_after(placeholder):
                self.number_nodes[name] = self.graph.call_function(number, (placeholder,))
            self.number_nodes[name].meta.update(val=value.value, origin=Origin())
        return self.number_nodes[name]

    def _left_behind(self, tensor: Tensor) -> Update:
        """Returns how a later call computes a tensor that forward stores: from the model, an input, or the graph.

        Raises:
            CaptureError: The trace has not recorded how the tensor is computed.
        """
        own = self.table.names.get(id(tensor))
        if is_real(tensor) or own is not None:
            real = tensor if own is None else self._attribute(own)
            return lambda state: real
        with self.mode:
            node = self.table.node_of(tensor)
            if node.op != "placeholder":
                node = self._as_output(tensor, node)
        name, dim = node.name, self.call.dims.get(node.name, 0)
        if node.op == "placeholder":
            return lambda state: state.tensors[name].movedim(0, dim) if dim else state.tensors[name]
        self.left.setdefault(name, replace(self._output((), tensor, node), name=name))
        return lambda state: state.tensors[name]

    def _note_written(self, inputs: Mapping[str, Tensor]) -> None:
        """Notes the writes of forward to the caller's tensors, which the pipeline makes after each call."""
        for name, fake in inputs.items():
            node = self.table.node_of(fake)
            if node.op != "placeholder":
                self.left.setdefault(node.name, replace(self._output((), fake, node), name=node.name))
                self.written[name] = node.name

    def _as_output(self, leaf: Any, lowered: Any) -> Any:
        """Returns what an output is read from: a parameter through a node of its own, a size as an expression."""
        if is_number(leaf):
            return leaf.concrete()
        if isinstance(leaf, torch.SymInt | torch.SymFloat | torch.SymBool):
            return leaf.node.expr
        if isinstance(leaf, Tensor) and self.table.aliases.buffer_of(leaf) in self.buffers:
            return self.table.emit(torch.clone, (lowered,), like=lowered)  # the next microbatch may write it
        if isinstance(lowered, fx.Node) and lowered.op == "get_attr":
            return self.table.emit(after, (lowered,), like=lowered)
        return lowered

    def _output(self, path: Any, leaf: Any, lowered: Any) -> Output:
        name = ".".join(str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path)
        if not isinstance(lowered, fx.Node):
            return Output(name, None, lowered)
        scalar = leaf.ndim == 0 and leaf.dtype.is_floating_point
        shared = not any(n.op == "placeholder" and n.name in self.call.batched for n in ancestors([lowered]))
        return Output(name, lowered.name, None, self._batch_dim(leaf), scalar, shared, leaf.requires_grad)

    def _batch_dim(self, tensor: Tensor) -> int | None:
        """Returns the only dimension of an output that grows with the batch, or None."""
        batch = next((self.expected[n][0] for n in self.expected if n in self.call.batched), None)
        if batch is None:
            return None
        if isinstance(batch, sympy.Basic) and self.shapes is not None:
            batch = self.shapes.replace(batch)
        dims = [dim for dim, size in enumerate(tensor.shape) if _grows(size, batch)]
        if isinstance(batch, sympy.Basic) and batch.free_symbols:
            return dims[0] if len(dims) == 1 else None
        return 0 if dims and dims[0] == 0 else None

    def _extract_reads(self) -> fx.GraphModule | None:
        if not self.values.reads:
            return None
        reads = [read.node for read in self.values.reads]
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        needed = ancestors(reads)
        for node in self.graph.nodes:
            if node in needed:
                copies[node] = copy = graph.node_copy(node, copies.__getitem__)
                copy.args, copy.kwargs = retarget(copy.args, *META_TO_CPU), retarget(copy.kwargs, *META_TO_CPU)
        graph.output(tuple(copies[node] for node in reads))
        root = nn.Module()
        for name in dict.fromkeys(str(node.target) for node in graph.nodes if node.op == "get_attr"):
            owner, last = owner_of(root, name)
            owner.register_buffer(last, self._attribute(name))
        return fx.GraphModule(root, graph)

    def _learn(self, call: LeafCall, nodes: list[Any]) -> tuple[LeafCall, Any]:
        """Runs a leaf on real tensors. Returns the call with its output shapes, and its outputs as fake tensors."""
        if self.shapes is not None:
            raise NeedsNumbers(f"{call.name} returns sizes that only a run can show")
        if any(t.is_meta for t in self.real.values()):
            raise CaptureError(
                f"{call.name} must be run to be captured, but the model is on the meta device; load its weights first"
            )
        learnt, out = learn(call, nodes, self.evaluator, self._sandbox(f"{call.path}."))
        return learnt, pytree.tree_map_only(Tensor, lambda t: fake_result(t, self.device), out)

    def _leaf(self, target: str) -> Leaf:
        path = next(path for path in self.recorder.leaves.calls if attribute_of(path) == target)
        return Leaf(self.recorder.leaves.calls[path], self._sandbox(f"{path}."))

    def _sandbox(self, prefix: str) -> dict[str, Tensor]:
        """Returns copies of a module's parameters and buffers, which a run may write to."""
        mine = {name: tensor for name, tensor in self.real.items() if name.startswith(prefix)}
        with DisableTorchFunction(), _disable_current_modes():
            return {name: t.detach().clone().requires_grad_(t.requires_grad) for name, t in mine.items()}

    def _give_up_notes(self, reasons: list[str]) -> list[str]:
        if not reasons:
            return []
        kept = "all sizes are fixed" if not self.symbolic else f"only {self.symbolic} may change"
        return [f"{kept}; inputs of other sizes are recaptured: {reasons[0]}"]


def _dtype_of(value: Number) -> torch.dtype:
    return torch.int64 if type(value.value) is int else torch.float64


def _must_stay(node: fx.Node) -> bool:
    return node.op in ("placeholder", "output") or has_effect(node)


def _grows(size: int | torch.SymInt, batch: Any) -> bool:
    """Whether a size contains the batch symbol; for a batch of fixed size, whether it is equal."""
    if isinstance(size, torch.SymInt) and size.node.expr.free_symbols:
        return bool(size.node.expr.free_symbols & getattr(batch, "free_symbols", set()))
    return bool((size.node.expr if isinstance(size, torch.SymInt) else size) == batch)


def _expression(size: int | torch.SymInt) -> Any:
    return size.node._expr if isinstance(size, torch.SymInt) else size
