"""One attempt at tracing a model: runs its forward once on fake tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from types import FunctionType
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor, nn

from pipecompile.capture.call import Call, TensorName
from pipecompile.capture.captured import Captured, SymbolicSizes, device_of, sample_sizes
from pipecompile.capture.checkpoint_regions import recomputed
from pipecompile.capture.data_dependent_sizes import largest_sizes
from pipecompile.capture.evaluate import Evaluator
from pipecompile.capture.extract_reads import extract_reads, refuse_moving_reads
from pipecompile.capture.fake_inputs import FakeInputs, fake_inputs
from pipecompile.capture.final_values import write_final_values
from pipecompile.capture.input_reads import Values
from pipecompile.capture.node_table import NodeTable
from pipecompile.capture.number_inputs import NumberInputs
from pipecompile.capture.opaque_calls import Leaf, LeafCall, attribute_of
from pipecompile.capture.opaque_outputs import fake_result, learn
from pipecompile.capture.opaque_recording import LeafRecorder
from pipecompile.capture.opaque_scope import Part, Reason, name_of_part
from pipecompile.capture.operation_gradients import note_gradients
from pipecompile.capture.origin import Origin
from pipecompile.capture.outputs import Outputs
from pipecompile.capture.patches import patched
from pipecompile.capture.purity import must_stay
from pipecompile.capture.real_tensors import RealTensors
from pipecompile.capture.recorder import Recorder
from pipecompile.capture.scopes import Scopes
from pipecompile.capture.state.attribute_trace import Watch
from pipecompile.capture.state.caches import filled, parts_of_caches
from pipecompile.capture.state.container_proxies import without_stand_ins
from pipecompile.capture.state.executed_code import QUESTIONS
from pipecompile.capture.state.fingerprints import imprint
from pipecompile.capture.state.guards import Attribute, Attributes
from pipecompile.capture.state.lru_caches import forgotten
from pipecompile.capture.state.model_state import Change, fakes_of, with_fakes, without_caches
from pipecompile.capture.state.reachable import Reach
from pipecompile.capture.state.restore import Noted, generators_kept
from pipecompile.capture.state.sources import Answer, Fact, shown
from pipecompile.errors import CaptureError, PipecompileError
from pipecompile.ops.accelerators import factories_on
from pipecompile.ops.away import is_away
from pipecompile.ops.source_lines import failing_line
from pipecompile.ops.symbols import Shapes, Sizes
from pipecompile.ops.torch_internals import FakeTensorMode, enable_python_dispatcher, pytree


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
        counting: Whether to count the entries of masks that depend on buffers only.
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
        counting: bool = False,
    ) -> None:
        self.model = model
        self.reach = reach
        self.call = call
        self.microbatch = rows[0]
        self.forward = forward
        self.symbolic = symbolic
        self.kept = kept
        self.numbers = numbers
        self.follow = follow
        self.gradients = gradients
        self.operations = operations
        self.stood_in = False  # whether random numbers that forward drew had stand-ins
        self.drew_whole = False  # whether a part kept whole drew random numbers of Python or numpy
        self.counters: tuple[Attribute, ...] = ()  # numbers that forward has read and set

        self.device = device_of(model, call)
        self.graph = fx.Graph()
        self.shapes = Shapes() if symbolic else None
        self.mode = FakeTensorMode(shape_env=self.shapes, allow_non_fake_inputs=True)
        if symbolic:
            self.mode.cache_enabled = False  # an entry costs more than the operation; see repeated_calls.py
        self.scopes = Scopes()
        self.tensors = RealTensors(model, self.scopes, self.mode, self.device)
        self.number_inputs = NumberInputs(self.graph, self.mode)
        sizes = Sizes(self.graph, self.shapes)
        self.table = NodeTable(self.graph, sizes, self.scopes, self.tensors.constant, self.number_inputs.node)
        self.values = Values(call.tensors, call.alike(rows), self.tensors.named, self.tensors.parameters.__contains__)
        leaves = frozenset(part for part in kept if isinstance(part, str))
        self.recorder = Recorder(self.table, self.values, LeafRecorder(self.table, leaves, self._learn), counting)
        self.recorder.generators.update(map(id, (*reach.generators, *call.leaves)))
        sample = {n: t.detach()[: rows[0]] if n in call.batched else t for n, t in call.tensors.items()}
        self.evaluator = Evaluator(sample, self.tensors.valued, self._leaf)

    def run(self, reasons: list[str]) -> Captured:
        noted = Noted(self.reach)
        with torch.inference_mode(False), generators_kept(self.reach.generators), noted.kept():
            return self._run_outside_inference(reasons, noted)

    def _run_outside_inference(self, reasons: list[str], noted: Noted) -> Captured:
        fakes = fakes_of(self.model, self.mode, self.device)
        for name, fake in fakes.items():
            self.table.add_attribute(name, fake, self.tensors.of_model[name])
        inputs = fake_inputs(self.call, self.microbatch, self.symbolic, self.mode, self.device, self.table)
        paths = {id(module): path for path, module in reversed([*self.model.named_modules()])}
        with (
            with_fakes(self.model, fakes, self._is_replaced) as changes,
            without_caches(self.model, self.call.has_cache) as (notes, caches),
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
                    out = self._run(inputs.tensors, paths, watch)
            finally:
                self.stood_in, self.drew_whole = watch.drawing.stood_in, watch.drawing.in_leaf
        watch.note([*changes.attributes, *self._frozen(fakes)], noted.filled())
        self.counters = watch.counters
        self.recorder.ran.add(part for part in self.kept if isinstance(part, FunctionType))
        whole = {path: module for path, module in self.model.named_modules() if path in self.kept}
        values = {**self.recorder.data_writes.last_values(), **changes.rebound}
        write_final_values(values, self.table, self.tensors, self.mode)
        outputs = Outputs(self.table, self.call, inputs, self.tensors, self.mode)
        attributes = watch.attributes(whole, outputs.left_behind)
        attributes = replace(attributes, facts=(*attributes.facts, *self._modes_asked()))
        outputs.note_written()
        notes += self._give_up_notes(reasons)
        notes += [f"{name_of_part(part)} is kept whole: {why.text[:200]}" for part, why in self.kept.items()]
        return self._finish(without_stand_ins(out), inputs, outputs, attributes, notes)

    @property
    def asks_for_gradients(self) -> bool:
        """Whether the model's Python has asked whether gradients are enabled."""
        return torch.is_grad_enabled in self.recorder.ran.asked

    def _modes_asked(self) -> list[Fact]:
        """Returns the answers that the trace gave about the modes of the calling thread and of the process.

        The trace sets two modes itself; the answer about any other is the present one.
        """
        own = {torch.is_grad_enabled: self.gradients, torch.is_inference_mode_enabled: False}
        answers = [(ask, own[ask] if ask in own else ask()) for ask in self.recorder.ran.asked]
        return [Fact(Answer(ask, QUESTIONS[ask]), imprint(answer), shown(answer)) for ask, answer in answers]

    def _frozen(self, fakes: Mapping[str, Tensor]) -> list[Change]:
        """Returns the parameters whose ``requires_grad`` forward has changed."""
        real = self.tensors.of_model
        return [
            Change(Attribute(real[name], "requires_grad", f"{name}.requires_grad"), fake.requires_grad)
            for name, fake in fakes.items()
            if name in self.tensors.parameters and fake.is_leaf and fake.requires_grad != real[name].requires_grad
        ]

    def _run(self, inputs: Mapping[str, Tensor], paths: Mapping[int, str], watch: Watch) -> Any:
        ran = self.recorder.ran
        observing = ran.pause()  # what follows is not the model's own code
        try:
            with (
                torch.set_grad_enabled(self.gradients),
                factories_on(self.device),  # the model may be there since an earlier capture
                self.mode,
                enable_python_dispatcher(),
                patched(
                    self.recorder, self.model, paths, [part for part in self.kept if isinstance(part, FunctionType)]
                ),
                self.recorder,
                self.recorder.below() if self.operations else nullcontext(),
            ):
                ran.resume(observing)
                try:
                    args, kwargs = self.call.rebuild(inputs)
                    watch.own(parts_of_caches((args, kwargs)))
                    return filled((args, kwargs), self.forward(*args, **kwargs))
                finally:
                    ran.pause()
        except PipecompileError:
            raise
        except Exception as error:
            error.origin = Origin(self.scopes.path, failing_line(error))  # type: ignore[attr-defined]
            raise
        finally:
            ran.resume(observing)

    def _is_replaced(self, tensor: Tensor, value: Tensor) -> bool:
        """Whether forward replaces a real tensor that is not a parameter or buffer and whose value the graph reads."""
        if self.table.fakes.get(id(tensor)) is value:
            return False
        used = {str(node.target) for node in self.graph.nodes if node.op == "get_attr"}
        return any(tensor is constant and name in used for name, constant in self.tensors.constants.items())

    def _finish(
        self, out: Any, inputs: FakeInputs, outputs: Outputs, attributes: Attributes, notes: list[str]
    ) -> Captured:
        self.recorder.drop_removed_hooks()
        if self.gradients and self.recorder.has_operations:
            note_gradients(self.graph.nodes, self.shapes)
        refuse_moving_reads(self.values.reads, self.graph, self.scopes)
        returned, spec = outputs.end(out)
        reads = extract_reads(self.values.reads, self.graph, self.tensors.named)
        self.graph.eliminate_dead_code(is_impure_node=must_stay)
        alive = {node.name for node in self.graph.nodes}
        shared = [[n.name for n in group if n.name in alive] for group in self.table.aliases.groups]
        groups = [tuple(dict.fromkeys(group)) for group in shared if len(set(group)) > 1]
        sizes = {symbol: (node.name, dim) for symbol, (node, dim) in self.table.sizes.sources.items()}
        return Captured(
            model=self.model, graph=self.graph, constants=self.tensors.constants,
            call=self.number_inputs.added_to(self.call),
            numbers={name: value.of for name, value in self.number_inputs.numbers.items()},
            draws_whole=self.drew_whole, device=self.device,
            microbatch=self.microbatch, symbolic=self.symbolic, attributes=attributes,
            outputs=returned, left=tuple(outputs.left.values()), out_spec=spec,
            leaves={path: tuple(calls) for path, calls in self.recorder.leaves.calls.items()},
            sizes=sizes, data_sizes=largest_sizes(self.graph, sample_sizes(sizes, self.call, self.microbatch)),
            shapes=inputs.shapes, guards=self.shapes.decided() if self.shapes else (),
            assumed=self.shapes.assumed() if self.shapes else (), reads=reads,
            read_values=tuple(read.value for read in self.values.reads),
            read_extremes=tuple(read.extreme for read in self.values.reads),
            groups=tuple(groups), recomputed=recomputed(self.graph, groups), notes=tuple(notes),
            returns=tuple(
                (path, tuple(node.name if node is not None and node.name in alive else None for node in nodes))
                for path, nodes in self.recorder.returns
            ),
            written_inputs=outputs.written,
        )  # fmt: skip

    def _learn(self, call: LeafCall, nodes: list[Any]) -> tuple[LeafCall, Any]:
        """Runs a leaf on real tensors. Returns the call with its output shapes, and its outputs as fake tensors."""
        if self.shapes is not None:
            raise NeedsNumbers(f"{call.name} returns sizes that only a run can show")
        if any(t.is_meta or is_away(t) for t in self.tensors.of_model.values()):
            raise CaptureError(
                f"{call.name} must be run to be captured, but the model has no values on the meta device, or in a "
                f"process that has sent them away; build or load it before compile(), and make such a call first"
            )
        learnt, out = learn(call, nodes, self.evaluator, self.tensors.copies(f"{call.path}."))
        return learnt, pytree.tree_map_only(Tensor, lambda t: fake_result(t, self.device), out)

    def _leaf(self, target: str) -> Leaf:
        calls = self.recorder.leaves.calls
        path = next(path for path in calls if attribute_of(path) == target)
        return Leaf(calls[path], self.tensors.copies(f"{path}."))

    def _give_up_notes(self, reasons: list[str]) -> list[str]:
        if not reasons:
            return []
        kept = "all sizes are fixed" if not self.symbolic else f"only {self.symbolic} may change"
        return [f"{kept}; inputs of other sizes are recaptured: {reasons[0]}"]
