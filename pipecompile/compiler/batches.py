"""``Batches`` makes batches of calls: it reads a call, finds its capture or makes one, and divides it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pipecompile.batching import Rows
from pipecompile.capture import Call, read_call
from pipecompile.capture.call_memory import CallMemory
from pipecompile.capture.locks import CAPTURING
from pipecompile.capture.state.fingerprints import Same
from pipecompile.capture.state.model_state import named_tensors
from pipecompile.capture.state.quiet_torch import seldom_collecting
from pipecompile.capture.state.reachable import Reach, reach_of
from pipecompile.compiler.capture_cache import Captures, Key, States, refuse_default_device, settings
from pipecompile.compiler.compile_call import compile_call
from pipecompile.compiler.options import Options
from pipecompile.compiler.surroundings import check_parameters, check_surroundings
from pipecompile.compiler.told_options import told_options
from pipecompile.distributed.share import Share
from pipecompile.errors import CaptureError, InputError
from pipecompile.ops.away import lacks_values
from pipecompile.ops.randomness import undrawn
from pipecompile.ops.torch_internals import pytree
from pipecompile.runtime import Ambient
from pipecompile.runtime.batch import Batch, Part
from pipecompile.runtime.compiled import Compiled
from pipecompile.runtime.observers import unobserved
from pipecompile.runtime.peers import Peers

LARGER = 2  # times the rows of the batch for which the number of microbatches was chosen


class Batches:
    """The captures of one pipeline, found by calls.

    Args:
        model: the unsplit model.
        devices: one per rank.
        options: the options of ``compile``.
        peers: the processes of the pipeline.
        share: what this process has of the model, if they are several.

    Attributes:
        forward: what is captured, with ``loss_fn``; else the forward of the model.
        first: the capture whose plan all others follow.
        last: the capture of the last call.
        placement: a capture of another pipeline, whose plan the first one follows.
        own: the model's tensors when they were last checked, by all of their names.
        takes_meta: whether arguments may be on the meta device, because the model has no values either.
        compared: the number of microbatches before another one was chosen, and the rows of the batch that it was for.
        reached: what the model may read and change, as the capture of this call has found it.
    """

    def __init__(
        self,
        model: nn.Module,
        devices: Sequence[torch.device],
        options: Options,
        peers: Peers,
        share: Share | None,
    ) -> None:
        self.model = model
        self.devices = devices
        self.options = options
        self.peers = peers
        self.share = share
        self.forward = None if options.loss_fn is None else _with_loss(model, options.loss_fn)
        self.captures = Captures()
        self.states = States()
        self.first: Compiled | None = None
        self.last: Compiled | None = None
        self.placement: Compiled | None = None
        self.reached: Reach | None = None
        self.own: Mapping[str, Tensor] = dict(named_tensors(model))
        self.takes_meta = False
        self.compared: tuple[int, int] | None = None
        self._batched: dict[tuple[str, int], bool] = {}
        self._calls = CallMemory()

    @property
    def signature(self) -> Callable[..., Any]:
        """A callable with the signature of a call. The model's forward may be replaced at any time."""
        return self.model.forward if self.forward is None else _with_target(self.model.forward)

    def copied(self) -> Batches:
        """Batches with the same captures, for calls whose captures later calls do not use."""
        copy: Batches = object.__new__(Batches)
        copy.__dict__.update(
            self.__dict__, captures=self.captures.copied(), _batched=dict(self._batched), _calls=CallMemory()
        )
        return copy

    def replace_first(self, options: Options, compiled: Compiled) -> None:
        """Puts a capture with another plan in the place of the first one, and drops all others."""
        assert self.first is not None
        self.options, self.captures = options, self.captures.only(self.first, compiled)
        self.first = self.last = compiled

    def adopt(self, options: Options, captures: Captures, first: Compiled) -> None:
        """Puts captures that have been cut along another plan in the places of all.

        Args:
            captures: in place of the present ones.
            first: of these, the one whose plan the others follow.
        """
        self.options, self.captures = options, captures
        self.first = self.last = first

    def move_first(self, compiled: Compiled, following: Callable[[Compiled], Compiled | None]) -> None:
        """Puts a capture with another plan in the place of the first one, and all others on that plan.

        Args:
            compiled: the first capture, cut anew.
            following: returns another capture cut anew; None drops it, and a call will make it again.
        """
        assert self.first is not None
        self.captures = self.captures.recut(self.first, compiled, following)
        self.first = self.last = compiled

    def of(self, args: Sequence[Any], kwargs: Mapping[str, Any], microbatches: int | None = None) -> Batch:
        """A call with its microbatches and the capture that it uses, which is made if necessary.

        Args:
            microbatches: instead of those of the options.

        Raises:
            InputError, CaptureError, PlanError: the call cannot be read, captured or planned.
        """
        self.reached = None
        refuse_default_device(self.devices)
        check_surroundings(pytree.tree_leaves((args, kwargs)))
        in_dims = self.options.batching.in_dims
        call = self._calls.read(self.model.forward, lambda: self.signature, args, kwargs, self._batched, in_dims)
        if not self.takes_meta:
            refuse_meta(call)
        sizes: tuple[int, ...] = ()
        part: Part | None = None
        if self.share is not None:
            part = None if self.share.part is None else Part(self.share.part, call.tensors)
            call, sizes = self.share.read(call, self._again)
        ambient = Ambient.of_caller(frozenset(device.type for device in self.devices))
        key = Key(call.key, Same(self.states.look(self.model, self._check)), ambient.autocast, settings())
        known = self.captures.of(key)
        count = microbatches or self._count(call.batch or 1)
        rows = Rows.of_parts(sizes, count) if sizes else Rows.of(call.batch, count)
        for compiled in known:
            for candidate in compiled.cuts(rows):
                if not compiled.broken(call, candidate, self.states.number):
                    self._settle(call)
                    self.last = compiled
                    self.captures.use(key)
                    return Batch(compiled, call, candidate, part)
        broken = known[-1].broken(call, rows) if known else ""
        batch = self._capture(call, rows)
        self._settle(call)
        self.captures.add(key, batch.compiled, broken)
        self.first = self.first or batch.compiled
        self.last = batch.compiled
        return replace(batch, part=part)

    def _count(self, rows: int) -> int:
        """The number of microbatches of a batch. What was chosen for small batches says little of much larger ones."""
        if self.compared is not None and rows >= LARGER * self.compared[1]:
            return max(self.compared[0], self.options.microbatches)
        return self.options.microbatches

    def _again(self, call: Call, tensors: Mapping[str, Tensor]) -> Call:
        """Reads a call again with other tensors, in which the same ones have a batch."""
        args, kwargs = call.rebuild(tensors)
        known = {(name, tensor.ndim): name in call.batched for name, tensor in call.tensors.items()}
        return read_call(self.signature, args, kwargs, known, self.options.batching.in_dims)

    def _check(self, model: nn.Module) -> None:
        check_parameters(model)
        self.own = dict(named_tensors(model))

    def _settle(self, call: Call) -> None:
        """Records which tensors have a batch, as decided by the first call that could be captured."""
        for name, tensor in call.tensors.items():
            self._batched.setdefault((name, tensor.ndim), name in call.batched)

    def _capture(self, call: Call, rows: Rows) -> Batch:
        """A new capture. If its trace is valid only for one size, all microbatches get that size."""
        if self.share is not None:
            self.share.check(call, told_options(self.options))
        independent = self.options.policy.updates_each and self.model.training
        reach = reach_of(self.model, [] if self.forward is None else [self.forward])
        if self.forward is None and not lacks_values(self.model):  # one that does is filled before it runs
            self.reached = reach
        why = ""
        for candidate in (rows, rows.equal()):
            with CAPTURING.taken(), undrawn(self.devices), unobserved(), seldom_collecting():
                compiled = compile_call(
                    self.model,
                    call,
                    candidate,
                    self.devices,
                    self.options,
                    self.forward,
                    self.first or self.placement,
                    whole=(self.options.microbatches > 1 or bool(rows.parts)) and not independent,
                    peers=self.peers,
                    reach=reach,
                )
            if self.share is not None:
                self.share.add(compiled)
            self.options = self.options.with_found(compiled.planned.schedule)
            if self.first is None and compiled.planned.work.microbatches != self.options.microbatches:
                self.compared = self.options.microbatches, call.batch or 1
                self.options = replace(self.options, microbatches=compiled.planned.work.microbatches)
                sizes, count = rows.by_part.counts, self.options.microbatches
                candidate = Rows.of_parts(sizes, count) if rows.parts else Rows.of(call.batch, count)
            for cut in compiled.cuts(candidate):
                if not (why := compiled.broken(call, cut)):
                    return Batch(compiled.without_values(), call, cut)
        raise CaptureError(
            f"the trace is not valid for the call that it was made for: {why}; if forward itself changes this, keep it "
            f"in a buffer or in an attribute of a module, and please report it otherwise"
        )


def refuse_meta(call: Call) -> None:
    """Raises ``InputError`` if an argument has no values."""
    for name, tensor in call.tensors.items():
        if tensor.is_meta:
            raise InputError(
                f"argument {name!r} is on the meta device, so it has no values; pass a tensor on a real device"
            )


def _with_loss(model: nn.Module, loss_fn: Callable[..., Any]) -> Callable[..., Any]:
    def forward(*args: Any, target: Any, **kwargs: Any) -> Any:
        return loss_fn(model(*args, **kwargs), target)

    return forward


def _with_target(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A callable with the model's signature and an additional keyword ``target``."""
    signature = inspect.signature(forward)
    if "target" in signature.parameters:  # a forward that is set on the pipe and wraps its forward
        return forward
    parameters = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    rest = [p for p in signature.parameters.values() if p.kind is inspect.Parameter.VAR_KEYWORD]
    target = inspect.Parameter("target", inspect.Parameter.KEYWORD_ONLY)

    def described() -> None: ...

    described.__signature__ = signature.replace(parameters=[*parameters, target, *rest])  # type: ignore[attr-defined]
    if hasattr(forward, "__wrapped__"):
        described.__wrapped__ = forward  # type: ignore[attr-defined]
    return described
