"""The kinds of call: what a pipeline does with a batch.

evaluate      no gradients: forwards alone
train         the loss is an output: the whole schedule runs, ``loss.backward()`` delivers the gradients
defer         the loss is the caller's: forwards now, backwards when the caller's gradients arrive
stream        asynchronous: the next segment of the stream, each microbatch a minibatch with its own update

Three gradients cannot be foreseen, and run the call again (``Snapshot``): into an output beside the loss, when all has
run from the loss alone (later calls are then deferred); into a loss computed with float16, of another scale than the
last; and a second one, with ``retain_graph=True``, into a call whose backwards have run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from pipecompile.batching import Division, Kind, Partial, Rows, gather, scatter, spread
from pipecompile.capture import Call, Output
from pipecompile.capture.functionalize import storage_key
from pipecompile.ir.plan import Plan
from pipecompile.ir.program import Program
from pipecompile.ops.randomness import Generators, seed_microbatch, seeds
from pipecompile.runtime import Microbatch
from pipecompile.runtime.compiled import Compiled
from pipecompile.runtime.delivery import Deferred, Delivered, Gradients
from pipecompile.runtime.rerun import Snapshot
from pipecompile.runtime.session import Rerun, Session, Stream
from pipecompile.schedule import backward_only, drain, forward_only, pipedream


@dataclass(frozen=True)
class Batch:
    """One call on one capture, cut into microbatches."""

    compiled: Compiled
    call: Call
    rows: Rows

    def __post_init__(self) -> None:
        object.__setattr__(self, "call", self.compiled.division.whole.filled(self.call))

    @property
    def outputs(self) -> Sequence[Output]:
        """What the call gives: the outputs that are tensors, and what the forward leaves behind."""
        return self.compiled.captured.results

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The trainable parameters, each once."""
        return [p for p in self.compiled.captured.model.parameters() if p.requires_grad]

    @property
    def model_tensors(self) -> list[Tensor]:
        """What may get a gradient: trainable parameters, then inputs that want one."""
        return [*self.parameters, *(t for t in self.call.tensors.values() if t.requires_grad)]

    @property
    def reached(self) -> list[Tensor]:
        """The ``model_tensors``, each once, less the parameters that no output has a gradient for."""
        unreached = {id(p) for p in self.parameters} - {id(p) for p in self.compiled.reached}
        return list({id(t): t for t in self.model_tensors if id(t) not in unreached}.values())

    def draw(self) -> Sequence[int | None]:
        """A seed for each microbatch from the caller's generator, if the model draws random numbers."""
        return seeds(len(self.rows)) if self.compiled.is_random else [None] * len(self.rows)

    def program(self, kind: str, schedule: Callable[[Plan, int], Program]) -> Program:
        count = len(self.rows)
        return self.compiled.program(lambda plan: schedule(plan, count), (kind, count))

    @property
    def division(self) -> Division:
        return self.compiled.division

    @property
    def sees_the_whole(self) -> bool:
        """Whether a part of the model is computed from the whole batch: numbers before the stages, or what mixes."""
        tail = self.division.tail
        return bool(self.division.before) or (tail is not None and bool(tail.why))

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

    def finish(self, joined: Mapping[str, Tensor], drawn: Sequence[int | None]) -> list[Tensor]:
        """The tensors of the ``outputs``: what the stages give, and what the tail makes of it."""
        seed_microbatch(drawn[0])
        try:
            tail = self.compiled.run_tail(joined, self.call)
        finally:
            seed_microbatch(None)
        return [{**joined, **tail}[self.division.places[str(output.node)]] for output in self.outputs]

    def given(self, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        """The tensors of the ``outputs``, by node."""
        return {str(output.node): tensor for output, tensor in zip(self.outputs, tensors, strict=True)}

    def rebuild(self, given: Mapping[str, Tensor]) -> Any:
        """The model's own output type around what the call has given."""
        return self.compiled.captured.rebuild_output(given, self.call.tensors)

    def on_copies(self) -> Batch:
        """The same on copies of the tensors that the call writes to in the end, and of others in their memory.

        Its backwards still read them; autograd counts the writes to a tensor and to all its views as one.
        """
        tensors, written = self.call.tensors, self.compiled.division.whole.written_inputs
        if not written:
            return self
        memory = {storage_key(tensors[name]) for name in written}
        shared = {n: t for n, t in tensors.items() if not t.requires_grad and storage_key(t) in memory}
        copies = {name: tensor.detach().clone() for name, tensor in shared.items()}
        return replace(self, call=replace(self.call, tensors={**tensors, **copies}))

    def leave(self, given: Mapping[str, Tensor]) -> None:
        """Sets what the forward sets, for the whole batch, and writes what it writes to the caller's tensors."""
        captured, call = self.compiled.division.whole, self.call
        captured.attributes.update(captured.size_values(call.tensors), {**call.tensors, **given})
        with torch.no_grad():
            for name, node in captured.written_inputs.items():
                call.tensors[name].copy_(given[node])


def run(
    session: Session,
    batch: Batch,
    loss: int | None,
    schedule: Callable[[Plan, int], Program],
    asynchronous: bool = False,
) -> dict[str, Tensor]:
    """The kind of call that a batch asks for, in the modes of the calling thread; what it gives, by node.

    A batch does not hold what it gives: those tensors' own graph holds the batch, to run it again.

    Args:
        loss: the position of the loss among the outputs' tensors; None where the caller computes it.
        asynchronous: whether the stages step by themselves.
    """
    batch = batch.on_copies()
    if not torch.is_grad_enabled() or not any(output.requires_grad for output in batch.outputs):
        return evaluate(session, batch)
    if asynchronous and loss is not None:
        return stream(session, batch, loss)
    if loss is None or not batch.ends_in_body(loss) or session.defers:
        return defer(session, batch)
    return train(session, batch, loss, schedule)


def evaluate(session: Session, batch: Batch) -> dict[str, Tensor]:
    """Forwards alone."""
    start = Snapshot.of(batch.compiled, batch.call, batch.draw, session.devices)
    with start.kept_on_failure(), torch.no_grad():
        return batch.given(batch.finish(batch.join(_forward(session, batch, start.seeds)), start.seeds))


def train(session: Session, batch: Batch, loss: int, schedule: Callable[[Plan, int], Program]) -> dict[str, Tensor]:
    """The whole schedule, from the output at position ``loss``, which the stages compute."""
    start = Snapshot.of(batch.compiled, batch.call, batch.draw, session.devices)
    with start.kept_on_failure():
        return _train(session, batch, loss, schedule, start)


def _train(
    session: Session, batch: Batch, loss: int, schedule: Callable[[Plan, int], Program], start: Snapshot
) -> dict[str, Tensor]:
    def run(scale: float) -> dict[int, Microbatch]:
        session.begin(batch.compiled)
        microbatches = _from_loss(batch, loss, start.seeds, scale)
        session.run(batch.compiled, batch.program("train", schedule), microbatches)
        return microbatches

    not_scaled = batch.compiled.in_float16 or start.ambient.in_float16 or batch.compiled.has_own_backward
    scale = session.scale if not_scaled else 1.0
    microbatches = run(scale)
    found = _gradients(session, batch, microbatches)
    leaves = list({id(t): t for t in batch.model_tensors if id(t) in found}.values())

    def rescaled(scale: float) -> list[Tensor]:
        session.scale = scale
        with _again(session, start, Rerun.RESCALED):
            again = _gradients(session, batch, run(scale))
        return [again[id(leaf)] for leaf in leaves]

    with torch.no_grad():
        tensors = batch.finish(batch.join(microbatches), start.seeds)
    outputs = [t.detach().requires_grad_(o.requires_grad) for t, o in zip(tensors, batch.outputs, strict=True)]
    ready = [found[id(leaf)] for leaf in leaves]
    own = Delivered.apply(ready, rescaled if not_scaled else None, scale, outputs[loss], *leaves)  # type: ignore[no-untyped-call]
    rest = _beside(session, batch, start, [*outputs[:loss], *outputs[loss + 1 :]], loss)
    return batch.given([*rest[:loss], own, *rest[loss:]])


def _beside(session: Session, batch: Batch, start: Snapshot, outputs: Sequence[Tensor], loss: int) -> Sequence[Tensor]:
    """The outputs but the one at position ``loss``: a gradient into them runs the call again."""

    def backward(incoming: Gradients) -> Gradients:
        session.defers = True
        with _again(session, start, Rerun.BESIDE):
            tensors = _defer(session, batch, start)
            pairs = zip([*tensors[:loss], *tensors[loss + 1 :]], incoming, strict=True)
            given = [(tensor, gradient) for tensor, gradient in pairs if gradient is not None]
            roots, gradients = [tensor for tensor, _ in given], [gradient for _, gradient in given]
            return torch.autograd.grad(roots, batch.reached, gradients, allow_unused=True)

    if not any(output.requires_grad for output in outputs):
        return outputs
    return cast(Sequence[Tensor], Deferred.apply(backward, len(outputs), *outputs, *batch.reached))  # type: ignore[no-untyped-call]


def defer(session: Session, batch: Batch) -> dict[str, Tensor]:
    """Forwards now; the backwards run when gradients of what the stages gave come in, from the caller or the tail."""
    start = Snapshot.of(batch.compiled, batch.call, batch.draw, session.devices)
    with start.kept_on_failure():
        return batch.given(_defer(session, batch, start))


def _defer(session: Session, batch: Batch, start: Snapshot) -> list[Tensor]:
    """The outputs of a call whose backwards wait."""
    waiting = _forward(session, batch, start.seeds)
    joined = batch.join(waiting)

    def run(microbatches: Mapping[int, Microbatch], incoming: Gradients) -> Gradients:
        _seed(batch, microbatches, incoming)
        with torch.enable_grad():
            session.run(batch.compiled, batch.program("backward", backward_only), microbatches)
        found = _gradients(session, batch, microbatches)
        assert found.keys() <= set(map(id, leaves)), "each gradient has a leaf to arrive at"
        return [found.get(id(leaf)) for leaf in leaves]

    def backward(incoming: Gradients) -> Gradients:
        with Generators.kept_on_failure(session.devices, batch.compiled.runs_python):
            if waiting:
                microbatches = dict(waiting)
                waiting.clear()  # also where this backward fails: another one runs the call again
                return run(microbatches, incoming)
            with _again(session, start, Rerun.SECOND):
                return run(_forward(session, batch, start.seeds), incoming)

    leaves = batch.reached
    given = Deferred.apply(backward, len(joined), *joined.values(), *leaves)  # type: ignore[no-untyped-call]
    return batch.finish(dict(zip(joined, given, strict=True)), start.seeds)


@contextmanager
def _again(session: Session, start: Snapshot, why: Rerun) -> Iterator[None]:
    """In which a call is run once more."""
    session.repeated[why] += 1
    with session.turn.taken(), start.restored():
        yield


def stream(session: Session, batch: Batch, loss: int) -> dict[str, Tensor]:
    """The next segment of the stream; the losses are those of weights that differ from microbatch to microbatch."""
    if session.stream.compiled is not batch.compiled:
        flush(session)
        session.begin(batch.compiled)
        session.stream.compiled = batch.compiled
    under_way = session.stream
    drawn = batch.draw()
    name = str(batch.outputs[loss].node)
    entering = range(under_way.next, under_way.next + len(batch.rows))
    parts = zip(entering, microbatches_of(batch, drawn), strict=True)
    new = {number: replace(part, seeds={name: 1.0}) for number, part in parts}
    under_way.microbatches.update(new)
    program = batch.compiled.lowered(pipedream(batch.compiled.plan, entering, under_way.carried))
    try:
        session.run(batch.compiled, program, under_way.microbatches)
    except BaseException:
        session.stream = Stream()
        raise
    under_way.advance(program, len(new))
    return batch.given([tensor.detach() for tensor in batch.finish(batch.join(new), drawn)])


def flush(session: Session) -> None:
    """Ends every microbatch that is under way, with its update."""
    under_way, session.stream = session.stream, Stream()
    if under_way.compiled is not None and under_way.carried:
        with torch.enable_grad():
            program = under_way.compiled.lowered(drain(under_way.compiled.plan, under_way.carried))
            session.run(under_way.compiled, program, under_way.microbatches)


def _forward(session: Session, batch: Batch, drawn: Sequence[int | None]) -> dict[int, Microbatch]:
    if session.optimizer is None:
        session.begin(batch.compiled)
    microbatches = dict(enumerate(microbatches_of(batch, drawn)))
    session.run(batch.compiled, batch.program("forward", forward_only), microbatches)
    return microbatches


def microbatches_of(batch: Batch, drawn: Sequence[int | None]) -> list[Microbatch]:
    """The parts of a batch, each with the seed of its random functions."""
    parts = scatter(batch.call, batch.rows, batch.compiled.run_before(batch.call), batch.division.before)
    return [Microbatch(part, seed) for part, seed in zip(parts, drawn, strict=True)]


def _from_loss(batch: Batch, loss: int, drawn: Sequence[int | None], scale: float) -> dict[int, Microbatch]:
    """The parts of a batch, whose backwards start from their shares of a gradient into the loss."""
    name = batch.division.places[str(batch.outputs[loss].node)]
    weights = batch.rows.weights if batch.joins[name] != Partial() else (1.0,) * len(batch.rows)
    parts = zip(microbatches_of(batch, drawn), weights, strict=True)
    return {i: replace(part, seeds={name: weight * scale}) for i, (part, weight) in enumerate(parts)}


def _seed(batch: Batch, microbatches: Mapping[int, Microbatch], incoming: Sequence[Tensor | None]) -> None:
    """Gives each microbatch its part of the gradients that came in."""
    parts = list(microbatches.values())
    for (name, kind), gradient in zip(batch.joins.items(), incoming, strict=True):
        if gradient is not None:
            pieces = spread(kind, gradient, [m.outputs[name] for m in parts], batch.rows)
            for microbatch, piece in zip(parts, pieces, strict=True):
                microbatch.seeds = {**microbatch.seeds, name: piece}


def _gradients(session: Session, batch: Batch, microbatches: Mapping[int, Microbatch]) -> dict[int, Tensor]:
    """Takes what a program has gathered, for parameters and inputs by their ``id``; where nothing arrived, none."""
    found: dict[int, Tensor] = {}

    def add(tensor: Tensor, gradient: Tensor) -> None:
        found[id(tensor)] = found[id(tensor)] + gradient if id(tensor) in found else gradient

    for stage, version in next(iter(microbatches.values())).versions.items():
        for name, leaf in version.leaves.items():
            if leaf.grad is not None:
                tensor = session.weights[stage].tensors[name]
                add(tensor, leaf.grad.to(tensor.device))
                leaf.grad = None
    for name, tensor in batch.call.tensors.items():
        if tensor.requires_grad and any(microbatch.input_gradients.get(name) for microbatch in microbatches.values()):
            add(tensor, _input_gradient(name, batch, microbatches))
    return found


def _input_gradient(name: str, batch: Batch, microbatches: Mapping[int, Microbatch]) -> Tensor:
    """The gradient of a model input: rows of the microbatches side by side, or for a shared input their sum."""
    tensor = batch.call.tensors[name]
    parts: list[Tensor] = []
    for microbatch in microbatches.values():
        total = torch.zeros_like(microbatch.inputs[name])
        for gradient in microbatch.input_gradients.get(name, ()):
            total = total + gradient.to(tensor.device)
        parts.append(total)
    return torch.cat(parts) if name in batch.call.batched else sum(parts[1:], parts[0])
