"""One capture of a model, split into stages on devices.

A model has several captures (for training and evaluation, for other argument trees, for sizes that break a guard). They
share one placement; ``compile_call`` makes them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor, nn
from torch.func import functional_call

from pipecompile.batching import Division, Rows
from pipecompile.capture import Call, Captured
from pipecompile.capture.opaque_calls import FunctionLeaf
from pipecompile.capture.origin import Origin, origin_of
from pipecompile.capture.purity import is_random
from pipecompile.errors import InputError
from pipecompile.ir.graph import CostedGraph, Graph
from pipecompile.ir.instruction import Forward
from pipecompile.ir.plan import Plan
from pipecompile.ir.program import Program
from pipecompile.ir.timeline import Timeline
from pipecompile.ops.accelerators import copied
from pipecompile.ops.autograd_functions import Applied
from pipecompile.ops.names import in_model
from pipecompile.ops.operators import is_opaque
from pipecompile.ops.torch_internals import pytree
from pipecompile.planning.calibration import Times, stage_times, update_seconds
from pipecompile.planning.memory import Memory
from pipecompile.planning.planned import Planned
from pipecompile.runtime.split import Piece, Stage
from pipecompile.schedule.lowering import lower
from pipecompile.schedule.several_processes import refreshed, shared
from pipecompile.schedule.simulator import simulate


@dataclass(frozen=True)
class Compiled:
    """A captured model split into stages.

    The stages run the division's body; ``before`` and ``tail`` run on the whole batch. ``planned`` is of the capture
    that was planned; other captures follow its plan, and use its costs in simulations.
    """

    division: Division
    graph: Graph
    plan: Plan
    planned: Planned
    stages: tuple[Stage, ...]
    before: Piece | None
    tail: Piece | None
    apart: bool = False  # whether its ranks are in several processes
    programs: dict[Any, Program] = field(default_factory=dict)

    @property
    def captured(self) -> Captured:
        """The trace of the whole model on one microbatch."""
        return self.division.captured

    def without_values(self) -> Compiled:
        """The same without the values of the call that it was captured from."""
        return replace(self, division=self.division.without_values())

    def recosted(self, costed: CostedGraph) -> Compiled:
        """The planned capture with other costs for the same stages, with which the plan's quality is not known."""
        planned = self.planned.recosted(costed)
        return replace(self, plan=planned.plan, planned=planned, programs={})

    def cuts(self, rows: Rows) -> tuple[Rows, ...]:
        """The ways to divide a batch that the capture may hold for: as given, into equal parts, or not at all."""
        return (rows.of(sum(rows.counts), 1),) if self.division.one_part else (rows, rows.equal())

    def broken(self, call: Call, rows: Rows, state: int = -1) -> str:
        """Why the capture does not hold for a call, divided into microbatches; empty if it does.

        If one trace serves both the microbatches and the whole batch, its guards are checked on the whole batch, and
        the microbatches only have to fit the trace.

        Args:
            state: the number of the modules' present state; by default, everything that the trace read is compared.
        """
        division, whole = self.division, call.tensors
        for attributes in {id(c.attributes): c.attributes for c in (self.captured, division.whole)}.values():
            if changed := attributes.changed(state):
                return changed
        if division.one_part and len(rows) > 1:
            return "the capture holds for batches of one microbatch only"
        if sum(rows.counts) < division.at_least:
            return f"the capture holds for batches of at least {division.at_least} rows"
        if division.most_rows is not None and sum(rows.counts) > division.most_rows:
            return f"the capture holds for batches of at most {division.most_rows} rows"
        sizes = division.whole.size_values(whole)
        for size, most in division.at_most.items():
            if sizes.get(size, 0) > most:
                name, dim = division.whole.sizes[size]
                return f"samples were shown not to mix only up to size {most} in dimension {dim} of {name!r}"
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
        """The tail's outputs, from the joined values of the microbatches. Writes the model's buffers."""
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
    def tail_origins(self) -> Mapping[str, Origin]:
        """The origins of the tail's nodes."""
        return {} if self.tail is None else {n.name: origin_of(n) for n in self.tail.module.graph.nodes}

    @cached_property
    def is_random(self) -> bool:
        """Whether the model draws random numbers, as dropout does."""
        return any(map(is_random, self.captured.graph.nodes))

    @cached_property
    def runs_python(self) -> bool:
        """Whether a step runs the user's Python (leaf modules and functions, custom functions), with any effects."""
        return any(map(_is_the_users, self.captured.graph.nodes))

    @cached_property
    def in_float16(self) -> bool:
        """Whether the model itself computes in float16, whose gradients overflow or underflow at some scales."""
        values = pytree.tree_leaves([node.meta.get("val") for node in self.captured.graph.nodes])
        return any(isinstance(value, Tensor) and value.dtype == torch.float16 for value in values)

    @cached_property
    def has_own_backward(self) -> bool:
        """Whether the backward may be nonlinear in its gradient: a custom function, an operator, or a hook."""
        targets = [node.target for node in self.captured.graph.nodes if node.op == "call_function"]
        own = [target for target in targets if getattr(target, "__module__", "") == "pipecompile.ops.functional"]
        hooks = [target for target in own if getattr(target, "__name__", "") == "with_hook"]
        return bool(hooks) or any(is_opaque(target) for target in targets if target not in own)

    @cached_property
    def reached(self) -> tuple[Tensor, ...]:
        """The parameters that get a gradient from some output."""
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
        """The parameters, and the buffers that calls do not write, by their names in messages."""
        written = set(map(id, self.written))
        modules = [*(stage.module for stage in self.stages), *(p.module for p in (self.before, self.tail) if p)]
        found = {f"parameter {in_model(name)!r}": t for module in modules for name, t in module.named_parameters()}
        buffers = {f"buffer {in_model(name)!r}": t for module in modules for name, t in module.named_buffers()}
        return {name: t for name, t in {**found, **buffers}.items() if id(t) not in written}

    def program(self, schedule: Callable[[Plan], Program], key: Any, shares: bool = False) -> Program:
        """The lowered program of a schedule, cached by ``key``.

        Args:
            shares: whether outputs come to all processes.
        """
        if key not in self.programs:
            bare = schedule(self.plan)
            self._refuse_disorder(bare)
            self.programs[key] = self.lowered(bare, shares)
        return self.programs[key]

    def _refuse_disorder(self, program: Program) -> None:
        """Raises ``InputError`` if microbatches would write a buffer in another order than the unsplit model."""
        for node, stage in zip(self.graph.nodes, self.plan.stage_of, strict=True):
            if stage is None or not node.writes:
                continue
            last: Forward | None = None
            for i in program.row_of(stage):
                if isinstance(i, Forward):
                    if last is not None and i.microbatch < last.microbatch:
                        raise InputError(
                            f"{i} is after {last} on rank {self.plan.rank_of[stage]}, but stage {stage} writes buffer "
                            f"{node.writes[0]!r} in the forward of each microbatch ({node.path}), and the unsplit "
                            f"model writes it in their order; run the forwards of this stage in ascending order"
                        )
                    last = i

    def lowered(self, bare: Program, shares: bool = False) -> Program:
        """A bare program with its transfers, in the order of the simulation.

        Args:
            shares: whether outputs come to all processes.
        """
        bare = refreshed(bare) if self.apart else bare
        bare = shared(bare, len(self.planned.cluster)) if shares and self.apart else bare
        return lower(bare, self._simulated(bare))  # alike in all processes

    def predict(self, program: Program, measured: Timeline | None = None) -> Timeline:
        """The simulated timeline of a program, from the costs.

        Args:
            program: of the same stages.
            measured: of a program whose optimizer steps took as long; without it they take what the plan was made
                for. The order of transfers is that of steps that take no time, because processes measure different
                seconds.
        """
        planned, cluster, rank_of = self.planned, self.planned.cluster, program.plan.rank_of
        if measured is None:
            known = planned.work.update_seconds(planned.costed, planned.plan, cluster)
            return self._simulated(program, known)
        seconds = update_seconds(measured, len(rank_of))
        speeds = [cluster.devices[rank].speed for rank in rank_of]
        return self._simulated(program, [s * speed for s, speed in zip(seconds, speeds, strict=True)])

    def _simulated(self, program: Program, updates: float | Sequence[float] = 0.0) -> Timeline:
        """The timeline of a program of these stages, with the seconds of those that were planned."""
        planned = self.planned
        halves = planned.stage_halves if program.split else None
        return simulate(program, planned.stage_costs, planned.cluster, updates, halves=halves)

    @cached_property
    def memory(self) -> Memory:
        """The peak memory in training of each stage and rank of the capture that was planned."""
        return self.planned.memory(self.buffer_bytes)

    @property
    def buffer_bytes(self) -> tuple[int, ...]:
        """The bytes of the buffers of each stage."""
        return tuple(sum(b.nbytes for b in stage.module.buffers()) for stage in self.stages)

    def times(self, timeline: Timeline) -> tuple[Times, ...]:
        """Predicted and measured seconds of each stage in a step."""
        return stage_times(self.planned.stage_costs, timeline, self.planned.stage_halves)

    def tensors(self, stage: int) -> dict[str, Tensor]:
        """The parameters of a stage, and its buffers on other devices, by their first names in the model."""
        return {first: table[name] for first, table, name in self._tables[stage]}

    @cached_property
    def _tables(self) -> tuple[Sequence[tuple[str, Mapping[str, Tensor], str]], ...]:
        """Where the tensors of each stage are: first name in the model, table of a module, name there."""
        return tuple(
            [_place(stage.module, name, first) for name, first in stage.names.items()] for stage in self.stages
        )

    @cached_property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """The parameters of the model at the first call, each once. Other ones are those of another capture."""
        return tuple(self.captured.model.parameters())


def _place(module: nn.Module, name: str, first: str) -> tuple[str, Mapping[str, Tensor], str]:
    path, _, last = name.rpartition(".")
    owner = module.get_submodule(path)
    table: Mapping[str, Any] = owner._parameters if last in owner._parameters else owner._buffers
    return first, table, last


def _is_the_users(node: fx.Node) -> bool:
    module = getattr(node.target, "__module__", None) or "torch"
    ours = module.partition(".")[0] in ("torch", "_operator", "builtins", "pipecompile")
    return node.op == "call_module" or isinstance(node.target, FunctionLeaf | Applied) or not ours


def _near(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor if tensor.device == device or device.type == "meta" else copied(tensor, device)


def misfit(captured: Captured, parts: Sequence[Mapping[str, Tensor]], whole: Mapping[str, Tensor]) -> str:
    """Why a trace of the whole batch cannot run its microbatches; empty if it can."""
    return next(filter(None, map(captured.misfit, parts)), "") or captured.misread(parts, whole)
