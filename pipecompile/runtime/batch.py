"""``Batch``: one call on one capture, divided into microbatches, and how their results are joined."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pipecompile.batching import Division, Kind, Rows, gather
from pipecompile.capture import Call, Output
from pipecompile.capture.functionalize import storage_key
from pipecompile.ir.check_step import check_step
from pipecompile.ir.instruction import Backward, Forward
from pipecompile.ir.plan import Plan
from pipecompile.ir.program import Program
from pipecompile.ops.randomness import seed_microbatch, seeds
from pipecompile.runtime import Microbatch
from pipecompile.runtime.anomalies import watch_backward
from pipecompile.runtime.compiled import Compiled
from pipecompile.runtime.outputs import Outputs
from pipecompile.schedule import MakeProgram

KINDS = {"train": (Forward, Backward), "forward": (Forward,), "backward": (Backward,)}  # of computations


@dataclass(frozen=True)
class Part:
    """The part of a batch that this process was given, of which others have the rest.

    Attributes:
        number: among the parts.
        tensors: of the caller.
    """

    number: int
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class Batch:
    """One call on one capture, divided into microbatches.

    Attributes:
        part: what runs here, if it is not all. Values of the whole batch are joined from all parts.
    """

    compiled: Compiled
    call: Call
    rows: Rows
    part: Part | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "call", self.compiled.division.whole.filled(self.call))

    @property
    def outputs(self) -> Sequence[Output]:
        """The tensors that the call computes: outputs, and tensors that the forward stores in the model."""
        return self.compiled.captured.results

    @property
    def trains(self) -> bool:
        """Whether the call records gradients."""
        return torch.is_grad_enabled() and any(output.requires_grad for output in self.outputs)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The trainable parameters, each once."""
        return [p for p in self.compiled.parameters if p.requires_grad]

    @property
    def model_tensors(self) -> list[Tensor]:
        """The tensors that may get a gradient: trainable parameters, then inputs that require one."""
        return [*self.parameters, *(t for t in self.call.tensors.values() if t.requires_grad)]

    def name_of(self, tensor: Tensor) -> str:
        """The name of one of the ``model_tensors``; its shape, if the model has another one in its place by now."""
        inputs = {id(given): name for name, given in self.call.tensors.items()}
        return {**inputs, **self.compiled.captured.first_names}.get(id(tensor), f"a tensor {list(tensor.shape)}")

    @property
    def reached(self) -> list[Tensor]:
        """The ``model_tensors``, each once, without parameters that get a gradient from no output."""
        unreached = {id(p) for p in self.parameters} - {id(p) for p in self.compiled.reached}
        return list({id(t): t for t in self.model_tensors if id(t) not in unreached}.values())

    def draw(self) -> Sequence[int | None]:
        """A seed for each microbatch from the caller's generator, if the model draws random numbers."""
        return seeds(len(self.rows)) if self.compiled.is_random else [None] * len(self.rows)

    @property
    def here(self) -> slice:
        """The microbatches that run here."""
        return slice(0, len(self.rows)) if self.part is None else self.rows.microbatches_of(self.part.number)

    @property
    def rows_here(self) -> Rows:
        """The rows of the microbatches that run here."""
        return Rows(self.rows.counts[self.here])

    def program(self, kind: str, schedule: MakeProgram, shares: bool = False) -> Program:
        """The lowered program of a step.

        Args:
            kind: "train", or "forward" and "backward" where the caller computes the loss.
            shares: whether the outputs come to all processes.
        """
        count = len(self.rows_here)

        def whole(plan: Plan) -> Program:
            found = schedule(plan, count)
            check_step(found, count, KINDS[kind])
            return found

        return self.compiled.program(whole, (kind, count, shares), shares)

    @property
    def division(self) -> Division:
        return self.compiled.division

    @property
    def sees_the_whole(self) -> bool:
        """Whether the whole batch is used: by values before the stages, or by a tail that mixes samples."""
        tail = self.division.tail
        return bool(self.division.before) or (tail is not None and bool(tail.why))

    @property
    def joins(self) -> Mapping[str, Kind]:
        """The kind of each output of the stages, by name, by which microbatches are joined."""
        return self.division.joins

    def ends_in_body(self, output: int) -> bool:
        """Whether the stages compute an output, microbatch by microbatch."""
        return self.division.places[str(self.outputs[output].node)] in self.joins

    def join(self, microbatches: Mapping[int, Microbatch], names: Container[str] | None = None) -> dict[str, Tensor]:
        """The outputs of the stages of this process, joined to the part of the batch that runs here.

        Each is on the device of its first microbatch.

        Args:
            names: of those to join; by default, all.
        """
        made = next(iter(microbatches.values())).outputs.keys() if microbatches and names is None else names or ()

        def parts(name: str) -> list[Tensor]:
            outputs = [microbatch.outputs[name] for microbatch in microbatches.values()]
            return [output.to(outputs[0].device) for output in outputs]  # replicas of a stage are on several

        return {name: gather(kind, parts(name), self.rows_here) for name, kind in self.joins.items() if name in made}

    @property
    def makers(self) -> dict[str, int]:
        """The rank that makes each output of the stages."""
        rank_of = self.compiled.plan.rank_of
        return {name: rank_of[stage.index] for stage in reversed(self.compiled.stages) for name in stage.outputs}

    @property
    def wanted(self) -> frozenset[str]:
        """The outputs of the stages whose values all processes get, if they are several."""
        return frozenset(output.name for output in self.compiled.graph.shared_outputs if output.how != "shape")

    def shared(self, microbatches: Mapping[int, Microbatch]) -> Outputs:
        """The outputs of microbatches in all processes, once a program with Shares has run."""
        return Outputs(partial(self.join, microbatches), self.makers, self.wanted)

    def finish(self, joined: Mapping[str, Tensor], drawn: Sequence[int | None]) -> list[Tensor]:
        """The tensors of ``outputs``, from the stages and from the tail, which runs here."""
        seed_microbatch(drawn[0])
        try:
            tail = self.compiled.run_tail(joined, self.call)
            watch_backward(tail.values(), self.compiled.tail_origins)
        finally:
            seed_microbatch(None)
        return [{**joined, **tail}[self.division.places[str(output.node)]] for output in self.outputs]

    def given(self, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        """The tensors of ``outputs`` by node name."""
        for output, tensor in zip(self.outputs, tensors, strict=True):
            if output.retains_grad and tensor.requires_grad:
                tensor.retain_grad()
        return {str(output.node): tensor for output, tensor in zip(self.outputs, tensors, strict=True)}

    def rebuild(self, given: Mapping[str, Tensor]) -> Any:
        """The model's output in its own type, from the tensors of the call."""
        return self.compiled.captured.rebuild_output(given, self.call.tensors)

    def on_copies(self) -> Batch:
        """The batch on copies of the input tensors that the call writes at its end, and of others in their memory.

        Its backwards still read them, and autograd counts a write to a tensor as a write to all its views.
        """
        tensors, written = self.call.tensors, self.compiled.division.whole.written_inputs
        if not written:
            return self
        memory = {storage_key(tensors[name]) for name in written}
        shared = {n: t for n, t in tensors.items() if not t.requires_grad and storage_key(t) in memory}
        copies = {name: tensor.detach().clone() for name, tensor in shared.items()}
        return replace(self, call=replace(self.call, tensors={**tensors, **copies}))

    def leave(self, given: Mapping[str, Tensor]) -> None:
        """Sets the attributes that the forward sets, and writes the caller's tensors that it writes."""
        captured, call = self.compiled.division.whole, self.call
        captured.attributes.update(captured.size_values(call.tensors), {**call.tensors, **given})
        with torch.no_grad():
            for name, node in captured.written_inputs.items():
                call.tensors[name].copy_(given[node])
                if self.part is not None:
                    self.part.tensors[name].copy_(self._cut(name))

    def _cut(self, name: str) -> Tensor:
        """What the caller's tensor is of an input of the whole batch."""
        assert self.part is not None
        tensor, sizes = self.call.tensors[name], list(self.rows.by_part.counts)
        return torch.split(tensor, sizes)[self.part.number] if name in self.call.batched else tensor
