"""The kinds of call: what a pipeline does with a batch.

evaluate      no gradients: forwards alone
train         the loss is an output: the whole schedule runs, ``loss.backward()`` delivers the gradients
defer         the loss is the caller's: forwards now, backwards when the caller's gradients arrive
stream        asynchronous: the next segment of the stream, each microbatch a minibatch with its own update
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from pipecompile.batching import Division, Kind, Partial, Rows, gather, scatter, spread
from pipecompile.capture import Call, Output
from pipecompile.compiled import Compiled
from pipecompile.errors import ExecutionError
from pipecompile.plan import Plan
from pipecompile.program import Program
from pipecompile.randomness import seeds
from pipecompile.runtime import Microbatch
from pipecompile.runtime.delivery import Deferred, Delivered, Gradients
from pipecompile.schedule import backward_only, drain, forward_only, pipedream
from pipecompile.session import Session, Stream


@dataclass(frozen=True)
class Batch:
    """One call on one capture, cut into microbatches."""

    compiled: Compiled
    call: Call
    rows: Rows

    @property
    def outputs(self) -> list[Output]:
        """The outputs that are tensors."""
        return [output for output in self.compiled.captured.outputs if output.node is not None]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The trainable parameters, each once."""
        return [p for p in self.compiled.captured.model.parameters() if p.requires_grad]

    @property
    def model_tensors(self) -> list[Tensor]:
        """What gradients are delivered to: trainable parameters, then inputs that want one."""
        return [*self.parameters, *(t for t in self.call.tensors.values() if t.requires_grad)]

    def program(self, kind: str, schedule: Callable[[Plan, int], Program]) -> Program:
        count = len(self.rows)
        return self.compiled.program(lambda plan: schedule(plan, count), (kind, count))

    @property
    def division(self) -> Division:
        return self.compiled.division

    @property
    def joins(self) -> Mapping[str, Kind]:
        """What the stages give, by name, with how the parts are joined."""
        return self.division.joins

    def ends_in_body(self, output: int) -> bool:
        """Whether the stages compute an output themselves, part by part."""
        return self.division.places[str(self.outputs[output].node)] in self.joins

    def join(self, microbatches: Mapping[int, Microbatch]) -> dict[str, Tensor]:
        """What the stages give, of the whole batch."""
        parts = list(microbatches.values())
        return {name: gather(kind, [m.outputs[name] for m in parts], self.rows) for name, kind in self.joins.items()}

    def finish(self, joined: Mapping[str, Tensor]) -> list[Tensor]:
        """The tensors of the model's output: what the stages give, and what the tail makes of it."""
        tail = self.compiled.run_tail(joined, self.call)
        return [{**joined, **tail}[self.division.places[str(output.node)]] for output in self.outputs]

    def rebuild(self, tensors: Sequence[Tensor]) -> Any:
        """The model's own output type around the outputs' tensors."""
        named = {str(output.node): tensor for output, tensor in zip(self.outputs, tensors, strict=True)}
        return self.compiled.captured.rebuild_output(named, self.call.tensors)


def evaluate(session: Session, batch: Batch) -> Any:
    """Forwards alone."""
    with torch.no_grad():
        return batch.rebuild(batch.finish(batch.join(_forward(session, batch))))


def train(session: Session, batch: Batch, loss: int, schedule: Callable[[Plan, int], Program]) -> Any:
    """The whole schedule, from the output at position ``loss``, which the stages compute."""
    session.begin(batch.compiled)
    name = batch.division.places[str(batch.outputs[loss].node)]
    kind = batch.joins[name]
    weights = batch.rows.weights if kind != Partial() else (1.0,) * len(batch.rows)
    parts = zip(_microbatches(batch), weights, strict=True)
    microbatches = {i: replace(part, seeds={name: weight}) for i, (part, weight) in enumerate(parts)}
    session.run(batch.compiled, batch.program("train", schedule), microbatches)
    with torch.no_grad():
        tensors = batch.finish(batch.join(microbatches))
    wanting = [t.detach().requires_grad_(o.requires_grad) for t, o in zip(tensors, batch.outputs, strict=True)]
    box = [_gradients(session, batch, microbatches)]
    return batch.rebuild(Delivered.apply(box, loss, len(tensors), *wanting, *batch.model_tensors))  # type: ignore[no-untyped-call]


def defer(session: Session, batch: Batch) -> Any:
    """Forwards now; the backwards run when gradients of what the stages gave come in, from the caller or the tail."""
    microbatches = _forward(session, batch)
    joined = batch.join(microbatches)

    def backward(incoming: Sequence[Tensor | None]) -> Gradients:
        if not all(microbatch.saved for microbatch in microbatches.values()):
            raise ExecutionError(
                "backward() was called a second time on one call of the pipeline; call the pipeline again "
                "(retain_graph= cannot help)"
            )
        _seed(batch, microbatches, incoming)
        with torch.enable_grad():
            session.run(batch.compiled, batch.program("backward", backward_only), microbatches)
        return _gradients(session, batch, microbatches)

    given = Deferred.apply(backward, len(joined), *joined.values(), *batch.model_tensors)  # type: ignore[no-untyped-call]
    return batch.rebuild(batch.finish(dict(zip(joined, given, strict=True))))


def stream(session: Session, batch: Batch, loss: int) -> Any:
    """The next segment of the stream; the losses are those of weights that differ from microbatch to microbatch."""
    if session.stream.compiled is not batch.compiled:
        flush(session)
        session.begin(batch.compiled)
        session.stream.compiled = batch.compiled
    under_way = session.stream
    name = str(batch.outputs[loss].node)
    entering = range(under_way.next, under_way.next + len(batch.rows))
    parts = zip(entering, _microbatches(batch), strict=True)
    new = {number: replace(part, seeds={name: 1.0}) for number, part in parts}
    under_way.microbatches.update(new)
    program = batch.compiled.lowered(pipedream(batch.compiled.plan, entering, under_way.carried))
    try:
        session.run(batch.compiled, program, under_way.microbatches)
    except BaseException:
        session.stream = Stream()
        raise
    under_way.advance(program, len(new))
    return batch.rebuild([tensor.detach() for tensor in batch.finish(batch.join(new))])


def flush(session: Session) -> None:
    """Ends every microbatch that is under way, with its update."""
    under_way, session.stream = session.stream, Stream()
    if under_way.compiled is not None and under_way.carried:
        with torch.enable_grad():
            program = under_way.compiled.lowered(drain(under_way.compiled.plan, under_way.carried))
            session.run(under_way.compiled, program, under_way.microbatches)


def _forward(session: Session, batch: Batch) -> dict[int, Microbatch]:
    if session.optimizer is None:
        session.begin(batch.compiled)
    microbatches = dict(enumerate(_microbatches(batch)))
    session.run(batch.compiled, batch.program("forward", forward_only), microbatches)
    return microbatches


def _microbatches(batch: Batch) -> list[Microbatch]:
    """The parts of a batch; a model that draws random numbers gets a seed for each from the caller's generator."""
    parts = scatter(batch.call, batch.rows, batch.compiled.run_before(batch.call), batch.division.before)
    drawn: Sequence[int | None] = seeds(len(parts)) if batch.compiled.is_random else [None] * len(parts)
    return [Microbatch(part, seed) for part, seed in zip(parts, drawn, strict=True)]


def _seed(batch: Batch, microbatches: Mapping[int, Microbatch], incoming: Sequence[Tensor | None]) -> None:
    """Gives each microbatch its part of the gradients that came in."""
    parts = list(microbatches.values())
    for (name, kind), gradient in zip(batch.joins.items(), incoming, strict=True):
        if gradient is not None:
            pieces = spread(kind, gradient, [m.outputs[name] for m in parts], batch.rows)
            for microbatch, piece in zip(parts, pieces, strict=True):
                microbatch.seeds = {**microbatch.seeds, name: piece}


def _gradients(session: Session, batch: Batch, microbatches: Mapping[int, Microbatch]) -> Gradients:
    """What a program has gathered for each of the batch's ``model_tensors``; None where nothing arrived."""
    found: dict[int, Tensor] = {}
    for stage, version in next(iter(microbatches.values())).versions.items():
        for name, leaf in version.leaves.items():
            if leaf.grad is not None:
                tensor = session.weights[stage].tensors[name]
                gradient, leaf.grad = leaf.grad.to(tensor.device), None  # held once: autograd may take it as it is
                found[id(tensor)] = found[id(tensor)] + gradient if id(tensor) in found else gradient
    wanting = [name for name, tensor in batch.call.tensors.items() if tensor.requires_grad]
    inputs = [_input_gradient(name, batch, microbatches) for name in wanting]
    return [*(found.get(id(parameter)) for parameter in batch.parameters), *inputs]


def _input_gradient(name: str, batch: Batch, microbatches: Mapping[int, Microbatch]) -> Tensor | None:
    """The gradient of a model input: rows of the microbatches side by side, or for a shared input their sum."""
    tensor = batch.call.tensors[name]
    parts: list[Tensor] = []
    for microbatch in microbatches.values():
        total = torch.zeros_like(microbatch.inputs[name])
        for gradient in microbatch.input_gradients.get(name, ()):
            total = total + gradient.to(tensor.device)
        parts.append(total)
    if not any(microbatch.input_gradients.get(name) for microbatch in microbatches.values()):
        return None
    return torch.cat(parts) if name in batch.call.batched else sum(parts[1:], parts[0])
