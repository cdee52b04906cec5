"""One capture of a model, placed and ready to run.

A model has several captures (training and evaluation, another tree of arguments, sizes that break a guard). They share
one placement; ``compile_call`` makes them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor
from torch.func import functional_call

from pipecompile.batching import Division, Rows
from pipecompile.capture import Call, Captured
from pipecompile.capture.opaque_calls import FunctionLeaf
from pipecompile.capture.origin import origin_of
from pipecompile.capture.purity import is_random
from pipecompile.capture.state.model_state import named_tensors
from pipecompile.errors import InputError
from pipecompile.ir.cluster import Cluster
from pipecompile.ir.graph import CostedGraph, Graph
from pipecompile.ir.plan import Plan, stage_costs
from pipecompile.ir.program import Program
from pipecompile.ir.timeline import Timeline
from pipecompile.ops.autograd_functions import Applied
from pipecompile.ops.operators import is_opaque
from pipecompile.ops.torch_internals import pytree
from pipecompile.planning.calibration import Times, stage_times
from pipecompile.planning.memory import Memory
from pipecompile.planning.replicas import Candidate
from pipecompile.planning.training_spec import Workload
from pipecompile.runtime.split import Piece, Stage
from pipecompile.schedule.lowering import lower
from pipecompile.schedule.simulator import simulate


@dataclass(frozen=True)
class Compiled:
    """A captured model cut into stages.

    The stages are made of the division's body; ``before`` and ``tail`` see the batch whole. ``costed`` is that of the
    capture that was partitioned; other captures borrow its costs for their simulations.
    """

    division: Division
    graph: Graph
    plan: Plan
    costed: CostedGraph
    reference: Plan  # the plan that ``costed`` belongs to
    cluster: Cluster
    work: Workload
    candidates: tuple[Candidate, ...]  # where replicas were looked for, the best first
    stages: tuple[Stage, ...]
    before: Piece | None
    tail: Piece | None
    programs: dict[Any, Program] = field(default_factory=dict)

    @property
    def captured(self) -> Captured:
        """The trace of the model, whole, at the size of a microbatch."""
        return self.division.captured

    def cuts(self, rows: Rows) -> tuple[Rows, ...]:
        """The ways to cut a batch that the capture may hold for: as asked, or into equal parts, or not at all."""
        return (rows.of(sum(rows.counts), 1),) if self.division.one_part else (rows, rows.equal())

    def broken(self, call: Call, rows: Rows, state: int = -1) -> str:
        """Why the capture does not hold for a call, cut into microbatches; empty if it does.

        ``state`` numbers the states of the model's modules; without one what the trace has read is looked at closely.

        Where one trace is the microbatches' and the whole batch's, the whole batch decides what the model's Python
        asks; the microbatches need only fit the trace.
        """
        division, whole = self.division, call.tensors
        for attributes in {id(c.attributes): c.attributes for c in (self.captured, division.whole)}.values():
            if changed := attributes.changed(state):
                return changed
        if division.one_part and len(rows) > 1:
            return "it holds for a batch of one microbatch"
        if sum(rows.counts) < division.at_least:
            return f"it holds for batches of {division.at_least} rows and more"
        sizes = division.whole.size_values(whole)
        for size, most in division.at_most.items():
            if sizes.get(size, 0) > most:
                name, dim = division.whole.sizes[size]
                return f"that samples stay apart was tried out up to a size of {most} of dimension {dim} of {name!r}"
        parts = call.split(rows.counts) if call.batch else [whole]
        if division.is_divided and division.whole is division.captured:
            return division.whole.broken_guard([whole], whole) or misfit(division.captured, parts, whole)
        why = division.captured.broken_guard(parts, whole)
        return why or (division.whole.broken_guard([whole], whole) if division.is_divided else "")

    def run_before(self, call: Call) -> dict[str, Tensor]:
        """The values of the whole batch that the stages read."""
        if self.before is None:
            return {}
        with torch.no_grad():
            values = self.before.module(
                *(_near(call.tensors[name], self.captured.device) for name in self.before.inputs)
            )
        named = dict(zip(self.before.returns, values, strict=True))
        return {each.name: each.value(named) for each in self.division.before}

    def run_tail(self, joined: Mapping[str, Tensor], call: Call) -> dict[str, Tensor]:
        """What the whole batch gives, from the joined values of the microbatches; writes the model's buffers."""
        tail, piece = self.division.tail, self.tail
        if tail is None or piece is None:
            return {}
        device = self.stages[-1].device
        read = [call.tensors[name] for name in piece.inputs] + [joined[tail.joined[name]] for name in piece.received]
        tensors = (*piece.module.named_parameters(), *piece.module.named_buffers())
        moved = {name: t.to(device) for name, t in tensors if t.device != device}
        values = functional_call(piece.module, moved, tuple(_near(t, device) for t in read), tie_weights=False)
        return dict(zip(tail.outputs, values, strict=True))

    @cached_property
    def is_random(self) -> bool:
        """Whether the model draws random numbers, as for dropout."""
        return any(map(is_random, self.captured.graph.nodes))

    @cached_property
    def runs_python(self) -> bool:
        """Whether a step runs code of the user's (parts kept whole, custom functions), which may do anything."""
        return any(map(_is_the_users, self.captured.graph.nodes))

    @cached_property
    def in_float16(self) -> bool:
        """Whether the model itself computes with float16, whose gradients take only some scales."""
        values = pytree.tree_leaves([node.meta.get("val") for node in self.captured.graph.nodes])
        return any(isinstance(value, Tensor) and value.dtype == torch.float16 for value in values)

    @cached_property
    def has_own_backward(self) -> bool:
        """Whether a custom function, an operator or a hook may make of a gradient twice as large another than twice."""
        targets = [node.target for node in self.captured.graph.nodes if node.op == "call_function"]
        own = [target for target in targets if getattr(target, "__module__", "") == "pipecompile.ops.functional"]
        hooks = [target for target in own if getattr(target, "__name__", "") == "with_hook"]
        return bool(hooks) or any(is_opaque(target) for target in targets if target not in own)

    @cached_property
    def reached(self) -> tuple[Tensor, ...]:
        """The parameters that a gradient may arrive at, from some output."""
        tensors = self.captured.tensors
        tail = () if self.tail is None else tuple(self.tail.module.parameters())
        return (*(tensors[name] for name in self.graph.reached), *tail)

    @cached_property
    def written(self) -> tuple[Tensor, ...]:
        """The buffers that a call writes."""
        tensors = self.captured.tensors
        names = dict.fromkeys(name for node in self.captured.graph.nodes for name in origin_of(node).writes)
        return tuple(tensors[name] for name in names)

    @cached_property
    def read(self) -> Mapping[str, Tensor]:
        """The parameters, and the buffers that no call writes, by their names in messages."""
        written = set(map(id, self.written))
        modules = [*(stage.module for stage in self.stages), *(p.module for p in (self.before, self.tail) if p)]
        found = {f"parameter {name!r}": t for module in modules for name, t in module.named_parameters()}
        buffers = {f"buffer {name!r}": t for module in modules for name, t in module.named_buffers()}
        return {name: t for name, t in {**found, **buffers}.items() if id(t) not in written}

    def program(self, schedule: Callable[[Plan], Program], key: Any) -> Program:
        """The lowered program of a schedule, made once for each key."""
        if key not in self.programs:
            self.programs[key] = self.lowered(schedule(self.plan))
        return self.programs[key]

    def lowered(self, bare: Program) -> Program:
        """A bare program with its transfers, in the order of the simulation."""
        return lower(bare, self.predict(bare))

    def predict(self, program: Program) -> Timeline:
        """What a program will take, by the profile."""
        return simulate(program, stage_costs(self.costed, self.reference), self.cluster)

    @cached_property
    def memory(self) -> Memory:
        """What each stage and rank of the capture that was partitioned holds at its fullest in training."""
        buffers = [sum(b.nbytes for b in stage.module.buffers()) for stage in self.stages]
        return self.work.memory(self.costed, self.reference, self.cluster, buffers)

    def times(self, timeline: Timeline) -> tuple[Times, ...]:
        """What each stage took in a measured step beside the prediction; none where that cannot be told.

        On CUDA a stage's operations run behind the clock that the timeline is measured by.
        """
        if any(stage.device.type == "cuda" for stage in self.stages):
            return ()
        return stage_times(stage_costs(self.costed, self.reference), timeline)

    def tensors(self, stage: int) -> dict[str, Tensor]:
        """What a stage reads: parameters, and buffers that live on another device, by the model's first names."""
        read = dict(named_tensors(self.stages[stage].module))
        return {first: read[name] for name, first in self.stages[stage].names.items()}


def _is_the_users(node: fx.Node) -> bool:
    module = getattr(node.target, "__module__", None) or "torch"
    ours = module.partition(".")[0] in ("torch", "_operator", "builtins", "pipecompile")
    return node.op == "call_module" or isinstance(node.target, FunctionLeaf | Applied) or not ours


def _near(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor if tensor.device == device or device.type == "meta" else tensor.to(device)


def misfit(captured: Captured, parts: Sequence[Mapping[str, Tensor]], whole: Mapping[str, Tensor]) -> str:
    """Why a trace of the whole batch cannot run its parts; empty if it can."""
    return next(filter(None, map(captured.misfit, parts)), "") or captured.misread(parts, whole)


def could_be_losses(captured: Captured) -> list[str]:
    """The outputs that are single numbers which want a gradient."""
    tensors = [output for output in captured.outputs if output.node is not None]
    return [o.name or str(i) for i, o in enumerate(tensors) if o.is_scalar and o.requires_grad]


def find_loss(captured: Captured, name: str | None) -> int | None:
    """The position of the loss among the outputs' tensors; None if the caller computes it.

    It is the output called ``name``, or "loss", or the only single number that wants a gradient. Where there are
    several, the caller may do with them what it likes, so that their gradients are waited for.

    Raises:
        InputError: ``name`` is no output, or no loss.
    """
    tensors = [output for output in captured.outputs if output.node is not None]
    losses = [i for i, output in enumerate(tensors) if output.is_scalar and output.requires_grad]
    wanted = name or "loss"
    named = [i for i, output in enumerate(tensors) if output.name == wanted]
    if named and named[0] in losses:
        return named[0]
    if name is not None:
        names = ", ".join(output.name for output in tensors)
        raise InputError(f"loss={name!r} is no output with a single number that wants a gradient; outputs are {names}")
    return losses[0] if len(losses) == 1 else None
