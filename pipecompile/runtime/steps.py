"""The kinds of calls: how a pipeline runs a batch.

evaluate      no gradients: forwards only
train         the loss is an output: the whole schedule runs, ``loss.backward()`` returns the gradients
defer         the caller computes the loss, or a dispatch mode looks on: forwards now, backwards when gradients arrive
stream        asynchronous: the next segment of the stream; the stages update for each microbatch, or each batch

A call is rerun (``Snapshot``) for three gradients that its backwards did not cover: of an output other than the loss,
or at one (``retain_grad()``), if backwards ran from the loss (later calls are then deferred); of a loss computed with
float16, at another scale than the last one; and a second one, with ``retain_graph=True``, after the backwards have run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from pipecompile.errors import ExecutionError
from pipecompile.ops.elsewhere import elsewhere
from pipecompile.ops.randomness import Generators
from pipecompile.ops.torch_internals import when_backward_ends
from pipecompile.runtime import Microbatch
from pipecompile.runtime.anomalies import refuse_nan
from pipecompile.runtime.batch import Batch
from pipecompile.runtime.delivery import Gradients, Saved, connected
from pipecompile.runtime.gradients import OF_A_PART, give_gradients, take_gradients
from pipecompile.runtime.joined import joined_of
from pipecompile.runtime.microbatches import each_from_loss, from_loss, microbatches_of
from pipecompile.runtime.outputs import Outputs
from pipecompile.runtime.peers import Peers
from pipecompile.runtime.rerun import Snapshot
from pipecompile.runtime.retained import Retained
from pipecompile.runtime.session import Rerun, Session, Stream
from pipecompile.schedule import MakeProgram, Schedule, backward_only, forward_only

OF_A_MOVE = (
    "the loss is of a call before replan(), but its gradients belong to parameters that have moved to other processes "
    "since then; call backward() before replan()"
)

OF_THE_BATCH = (
    "the loss of {} is computed from the whole batch, after the stages, so no microbatch has a share of it from which "
    "its backward could start; use schedule='pipedream', in which each microbatch is a batch of its own, or "
    "schedule='1f1b', or a loss that is a mean or a sum over the samples"
)


def run(
    session: Session,
    batch: Batch,
    loss: int | None,
    schedule: MakeProgram,
    policy: Schedule | None = None,
) -> dict[str, Tensor]:
    """Runs a batch as the kind of call that it needs, in the modes of the calling thread; returns tensors by node.

    The batch does not refer to these tensors; their autograd graph refers to the batch, for reruns.

    Args:
        loss: the position of the loss among the outputs' tensors; None if the caller computes it.
        schedule: makes the program of a step.
        policy: an asynchronous schedule, in which the stages step their own optimizers.
    """
    with session.watched():
        given = _run(session, batch.on_copies(), loss, schedule, policy)
    if not session.peers.are_several:
        return given
    return {name: elsewhere(tensor) if tensor.is_meta else tensor for name, tensor in given.items()}


def _run(
    session: Session, batch: Batch, loss: int | None, schedule: MakeProgram, policy: Schedule | None
) -> dict[str, Tensor]:
    if batch.trains and policy is not None and loss is not None and policy.by_batch and not batch.ends_in_body(loss):
        raise ExecutionError(OF_THE_BATCH.format(type(batch.compiled.captured.model).__name__))
    session.agree(batch.compiled, batch.call.tensors.values())
    with session.promised():
        if policy is not None or batch.compiled.is_random or batch.compiled.written:
            session.peers.agreed()  # before the stream, the caller's generator or buffers change
        if not batch.trains:
            return evaluate(session, batch)
        if policy is not None and loss is not None:
            return stream(session, batch, loss, policy)
        if loss is None or not batch.ends_in_body(loss) or session.defers or session.is_watched:
            return defer(session, batch)
        return train(session, batch, loss, schedule)


def evaluate(session: Session, batch: Batch) -> dict[str, Tensor]:
    """Runs forwards only."""
    start = _snapshot(session, batch)
    with start.kept_on_failure(), torch.no_grad():
        joined = joined_of(session, batch, *_forward(session, batch, start.seeds))
        return batch.given(batch.finish(joined.values, start.seeds))


def train(session: Session, batch: Batch, loss: int, schedule: MakeProgram) -> dict[str, Tensor]:
    """Runs the whole schedule; backwards start from the output at position ``loss``, which the stages compute."""
    start = _snapshot(session, batch)
    with start.kept_on_failure():
        return _train(session, batch, loss, schedule, start)


def _train(session: Session, batch: Batch, loss: int, schedule: MakeProgram, start: Snapshot) -> dict[str, Tensor]:
    def run(scale: float, shares: bool = False) -> tuple[dict[int, Microbatch], Outputs | None]:
        microbatches = from_loss(batch, loss, start.seeds, scale)
        outputs = batch.shared(microbatches) if shares else None
        with session.pass_of(batch.compiled):
            program = batch.program("train", schedule, shares)
            session.run(batch.compiled, program, microbatches, outputs=outputs)
        return microbatches, outputs

    not_scaled = batch.compiled.in_float16 or start.ambient.in_float16 or batch.compiled.has_own_backward
    scale = session.scale if not_scaled else 1.0
    (microbatches, shared), moves = run(scale, session.peers.are_several), session.moves
    found = take_gradients(session, batch, microbatches)
    leaves = list({id(t): t for t in batch.model_tensors if id(t) in found}.values())
    retained, places = Retained(batch), [batch.division.places[str(output.node)] for output in batch.outputs]

    @session.watched()
    def deliver(saved: Saved, incoming: Gradients) -> Gradients:
        _refuse_moved(session, moves)
        (factor,) = incoming
        if factor is None:
            return [None] * len(leaves)
        session.peers.receives(leaves)
        if retained.asked({places[loss]}, session.peers.are_several):
            return _again_from(session, batch, start, {loss: factor}, leaves, retained)
        refuse_nan(saved.tensors, lambda place: batch.name_of(leaves[place]))
        if not not_scaled:
            return _multiplied(saved, factor)
        session.scale = factor.item()
        if session.scale == scale:
            return saved.tensors
        with _again(session, start, Rerun.RESCALED, f" by {session.scale:.9g}"):
            again = take_gradients(session, batch, run(session.scale)[0])
        return [again[id(leaf)] for leaf in leaves]

    with torch.no_grad():
        tensors = batch.finish(joined_of(session, batch, microbatches, shared).values, start.seeds)
    outputs = [t.detach().requires_grad_(o.requires_grad) for t, o in zip(tensors, batch.outputs, strict=True)]
    ready = [found[id(leaf)] for leaf in leaves]
    (own,) = connected([outputs[loss]], session.homes(leaves), deliver, ready)
    if session.peers.are_several and own.requires_grad:
        noted = partial(_noted, session.peers, start.call)
        own.register_hook(noted)  # type: ignore[no-untyped-call]  # also where nothing is trained, nothing delivered
    rest = _beside(session, batch, start, [*outputs[:loss], *outputs[loss + 1 :]], loss, retained)
    given = [*rest[:loss], own, *rest[loss:]]
    retained.hold({place: tensor for place, tensor in zip(places, given, strict=True) if place in batch.joins})
    return batch.given(given)


def _refuse_moved(session: Session, moves: int) -> None:
    """Refuses the backward of a call after parameters have moved to other processes."""
    if session.moves != moves:
        raise ExecutionError(OF_A_MOVE)


def _noted(peers: Peers, call: int, factor: Tensor) -> None:
    _note_backward(peers, f"the backward of call {call} with the gradient {factor.item():.9g}")


def _note_backward(peers: Peers, said: str) -> None:
    """Takes note of the present backward when it has ended: a hook of this process alone may raise before."""
    if peers.are_several:
        when_backward_ends(partial(peers.note, said))


def _multiplied(saved: Saved, factor: Tensor) -> Sequence[Tensor]:
    """Gradients times the gradient of the loss, which is usually 1; to read it would wait for an accelerator."""
    gradients = saved.tensors
    if factor.device.type == "cpu" and factor.item() == 1.0:
        return gradients
    factors = {(g.device, g.dtype): factor.to(g.device, g.dtype) for g in gradients}
    return [_times(g, factors[g.device, g.dtype], in_place=not saved.kept) for g in gradients]


def _times(gradient: Tensor, factor: Tensor, in_place: bool) -> Tensor:
    return gradient.mul_(factor) if in_place and gradient.layout == torch.strided else gradient * factor


def _beside(
    session: Session, batch: Batch, start: Snapshot, outputs: Sequence[Tensor], loss: int, retained: Retained
) -> Sequence[Tensor]:
    """Connects the outputs other than the loss to autograd: a gradient of one of them reruns the call."""

    moves = session.moves

    @session.watched()
    def backward(_: Saved, incoming: Gradients) -> Gradients:
        _refuse_moved(session, moves)
        given = {i if i < loss else i + 1: g for i, g in enumerate(incoming) if g is not None}
        return _again_from(session, batch, start, given, batch.reached, retained)

    if not any(output.requires_grad for output in outputs):
        return outputs
    return connected(outputs, session.homes(batch.reached), backward)


def _again_from(
    session: Session,
    batch: Batch,
    start: Snapshot,
    given: Mapping[int, Tensor],
    leaves: Sequence[Tensor],
    retained: Retained,
) -> Gradients:
    """The gradients of leaves in a rerun, from gradients of outputs by position. Later calls are deferred."""
    if batch.part is not None:
        raise ExecutionError(OF_A_PART)
    session.defers = True
    with _again(session, start, Rerun.BESIDE):
        tensors = _defer(session, batch, start, retained)
        roots = [tensors[i] for i in given]
        return torch.autograd.grad(roots, leaves, [*given.values()], allow_unused=True)


def defer(session: Session, batch: Batch) -> dict[str, Tensor]:
    """Runs forwards now, and backwards when gradients of the stages' outputs arrive, from the caller or the tail."""
    start = _snapshot(session, batch)
    with start.kept_on_failure():
        return batch.given(_defer(session, batch, start))


def _defer(session: Session, batch: Batch, start: Snapshot, rerun: Retained | None = None) -> list[Tensor]:
    """The outputs of a call whose backwards are deferred.

    Args:
        rerun: what the caller has of the outputs, if this is a rerun.
    """
    waiting, outputs = _forward(session, batch, start.seeds)
    joined = joined_of(session, batch, waiting, outputs)
    retained, moves = rerun or Retained(batch), session.moves

    def run(microbatches: Mapping[int, Microbatch], incoming: Gradients) -> Gradients:
        fed = [name for name, gradient in zip(joined.values, incoming, strict=True) if gradient is not None]
        asked = retained.asked(fed, session.peers.are_several)
        for microbatch in microbatches.values():
            microbatch.retained = dict.fromkeys(asked)
        give_gradients(batch, joined, microbatches, incoming)
        with torch.enable_grad():
            session.run(batch.compiled, batch.program("backward", backward_only), microbatches)
        retained.add(asked, [*microbatches.values()])
        found = take_gradients(session, batch, microbatches)
        assert found.keys() <= set(map(id, leaves)), "each gradient has a leaf to arrive at"
        session.peers.receives([leaf for leaf in leaves if id(leaf) in found])
        return [found.get(id(leaf)) for leaf in leaves]

    @session.watched()
    def backward(_: Saved, incoming: Gradients) -> Gradients:
        _refuse_moved(session, moves)
        _note_backward(session.peers, f"the backward of call {start.call}")
        with Generators.kept_on_failure(session.devices, batch.compiled.runs_python):
            if waiting:
                session.peers.agree(f"the backward of call {start.call}")
                microbatches = dict(waiting)
                waiting.clear()  # even if this backward fails: another one reruns the call
                with session.promised():
                    return run(microbatches, incoming)
            with _again(session, start, Rerun.SECOND):
                return run(_forward(session, batch, start.seeds, again=True)[0], incoming)

    leaves = batch.reached
    given = dict(zip(joined.values, connected([*joined.values.values()], session.homes(leaves), backward), strict=True))
    if rerun is None:
        retained.hold(given)
    return batch.finish(given, start.seeds)


@contextmanager
def _again(session: Session, start: Snapshot, why: Rerun, how: str = "") -> Iterator[None]:
    """Restores the state of a call for a rerun, and counts the rerun.

    Args:
        how: what the processes must rerun it with.

    Raises:
        ExecutionError: what the call has read has changed since then.
    """
    start.refuse_changes()  # in this process; the others run nothing, since they do not agree
    session.repeated[why] += 1
    session.peers.agree(f"to run call {start.call} again{how}: {why}")
    with session.promised(), session.turn.taken(), start.restored():
        yield


def stream(session: Session, batch: Batch, loss: int, policy: Schedule) -> dict[str, Tensor]:
    """Runs the next segment of the stream; each microbatch's loss is computed with its own version of the weights."""
    if session.stream.compiled is not batch.compiled:
        flush(session)
        session.begin(batch.compiled)
        session.stream.compiled = batch.compiled
    under_way = session.stream
    drawn = _drawn(session, batch)
    entering = range(under_way.next, under_way.next + len(batch.rows))
    parts = from_loss(batch, loss, drawn, 1.0) if policy.by_batch else each_from_loss(batch, loss, drawn)
    new = dict(zip(entering, parts.values(), strict=True))
    under_way.policy = policy
    under_way.microbatches.update(new)
    shares = session.peers.are_several
    bare = policy.next_segment(batch.compiled.plan, entering, under_way.carried)
    program = batch.compiled.lowered(replace(bare, lags=under_way.lags), shares)
    outputs = batch.shared(new) if shares else None
    try:
        session.run(batch.compiled, program, under_way.microbatches, streams=True, outputs=outputs)
    except BaseException:
        session.stream = Stream()
        raise
    under_way.advance(program, len(new))
    return batch.given(
        [tensor.detach() for tensor in batch.finish(joined_of(session, batch, new, outputs).values, drawn)]
    )


def flush(session: Session) -> None:
    """Flushes the stream: finishes every microbatch in flight, with its update."""
    session.peers.agree("to flush the pipeline")  # one that is refused leaves the microbatches in flight
    under_way, session.stream = session.stream, Stream()
    compiled, policy = under_way.compiled, under_way.policy
    if compiled is not None and policy is not None and under_way.carried:
        with session.promised(), torch.enable_grad(), session.watched():
            bare = policy.drain(compiled.plan, under_way.carried)
            program = compiled.lowered(replace(bare, lags=under_way.lags))
            session.run(compiled, program, under_way.microbatches, streams=True)


def _snapshot(session: Session, batch: Batch) -> Snapshot:
    drawn, peers = partial(_drawn, session, batch), session.peers
    return Snapshot.of(batch.compiled, batch.call, drawn, session.devices, peers, session.call)


def _drawn(session: Session, batch: Batch) -> Sequence[int | None]:
    """The seeds of the first process. All of them draw, so that their generators stay alike."""
    drawn = batch.draw()
    return session.peers.shared(lambda: drawn) if batch.compiled.is_random else drawn


def _forward(
    session: Session, batch: Batch, drawn: Sequence[int | None], again: bool = False
) -> tuple[dict[int, Microbatch], Outputs | None]:
    """The microbatches after their forwards, and their outputs in all processes, if these are several.

    Args:
        again: whether the outputs are known.
    """
    microbatches, shares = dict(enumerate(microbatches_of(batch, drawn))), session.peers.are_several and not again
    outputs = batch.shared(microbatches) if shares else None
    with session.pass_of(batch.compiled):
        program = batch.program("forward", forward_only, shares)
        session.run(batch.compiled, program, microbatches, outputs=outputs)
    return microbatches, outputs
