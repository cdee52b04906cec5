"""Runs the batches of a loader through the stages, one behind the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipecompile.capture.origin import origin_of
from pipecompile.errors import InputError, PipecompileError
from pipecompile.runtime.batch import Batch
from pipecompile.runtime.flow import Flow
from pipecompile.runtime.session import Session

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Calls:
    """What a pipeline does with the arguments of a batch.

    Attributes:
        read: makes a batch of one microbatch, with its capture, which has been verified.
        alone: runs such a batch by itself.
        session: makes a session for the batches in flight.
        note: is told why batches run one after another.
    """

    read: Callable[[Arguments], Batch]
    alone: Callable[[Batch, Arguments], Any]
    session: Callable[[], Session]
    note: Callable[[str], None]


def mapped(calls: Calls, loader: Iterable[Any]) -> Iterator[Any]:
    """Yields the output of each batch of a loader, in order; see ``Pipeline.map``."""
    flow = Flow(calls.session())
    try:
        for number, each in enumerate(loader):
            try:
                arguments, batch = _read(calls, number, each)
            except PipecompileError:
                yield from _ended(flow)
                raise
            if why := _alone(batch):
                yield from _ended(flow)
                calls.note(why)
                yield _alone_output(calls, number, batch, arguments)
            else:
                yield from _entered(flow, number, batch)
        yield from _ended(flow)
    finally:
        flow.session.close()


# The consumer of a generator does not run in its contexts: each step enters no_grad for itself.


@torch.no_grad()
def _read(calls: Calls, number: int, each: Any) -> tuple[Arguments, Batch]:
    with _of_batch(number):
        arguments = arguments_of(each)
        return arguments, calls.read(arguments)


@torch.no_grad()
def _entered(flow: Flow, number: int, batch: Batch) -> list[Any]:
    return [batch.rebuild(given) for batch, given in flow.enter(number, batch)]


@torch.no_grad()
def _ended(flow: Flow) -> list[Any]:
    return [batch.rebuild(given) for batch, given in flow.drain()]


@torch.no_grad()
def _alone_output(calls: Calls, number: int, batch: Batch, arguments: Arguments) -> Any:
    with _of_batch(number):
        return calls.alone(batch, arguments)


@contextmanager
def _of_batch(number: int) -> Iterator[None]:
    """A context whose errors name the batch."""
    try:
        yield
    except PipecompileError as error:
        raise type(error)(f"batch {number} of the loader: {error}") from error.__cause__


def arguments_of(batch: Any) -> Arguments:
    """The positional and keyword arguments that a loader's batch stands for.

    Args:
        batch: a mapping of keyword arguments, a tuple or list of positional ones, or the only one, a tensor.

    Raises:
        InputError: it is something else.
    """
    if isinstance(batch, Mapping):
        return (), dict(batch)
    if isinstance(batch, tuple | list):
        return tuple(batch), {}
    if isinstance(batch, Tensor):
        return (batch,), {}
    raise InputError(
        f"the loader yields a {type(batch).__name__}, of which a call cannot be made; yield a dict of keyword "
        f"arguments, a tuple of arguments, or a tensor"
    )


def _alone(batch: Batch) -> str:
    """Why the next batch must not begin before this one has ended; empty if it may."""
    captured, division = batch.compiled.captured, batch.compiled.division
    if batch.call.has_cache:
        return "a batch has a key-value cache, which the next one may read"
    if len(batch.rows) > 1:
        return "the capture holds for microbatches only, and a batch would be several"
    written = [name for node in division.whole.graph.nodes for name in origin_of(node).writes]
    if written:
        return f"the forward writes {written[0]!r}, which the next batch reads"
    if captured.attributes.updates:
        return f"the forward sets {captured.attributes.updates[0].place.label}, which the next batch may read"
    if captured.left or division.whole.written_inputs:
        return "the forward stores tensors, which the next batch may read"
    if captured.leaf_writes or captured.draws_whole:
        return "a part kept whole changes state or draws random numbers, which the next batch may read"
    return ""
