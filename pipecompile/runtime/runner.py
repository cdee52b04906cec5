"""Runs one stage: the forward and backward of a microbatch, and the tensors saved in between."""

from __future__ import annotations

import linecache
import re
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from pipecompile.errors import ExecutionError
from pipecompile.ops.randomness import seed_microbatch
from pipecompile.ops.source_lines import failing_line
from pipecompile.ops.split_backward import Queue, queued
from pipecompile.ops.torch_internals import _engine_run_backward
from pipecompile.runtime.anomalies import looks_for_nan, watch_backward, watched_forward
from pipecompile.runtime.lane import Lane, Sent, Value, Values
from pipecompile.runtime.lift import lift, only_sized, read_only
from pipecompile.runtime.observers import hooks_on_saved
from pipecompile.runtime.offload import Kept, Leaving, address_of, holders, hooks_refused, is_plain
from pipecompile.runtime.out_of_memory import OutOfMemoryError
from pipecompile.runtime.split import Stage
from pipecompile.runtime.weights import Version, Weights

Function = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True, slots=True)
class Saved:
    """The tensors that a forward saves for its backward."""

    inputs: Mapping[str, Tensor]  # leaves of the model inputs that require gradients
    received: Mapping[int, Values]  # leaves of the values from each source stage
    returned: Sequence[Tensor]


@dataclass
class Microbatch:
    """One microbatch in flight: its inputs, the gradients that its backward starts from, and its results."""

    inputs: Mapping[str, Tensor]
    randomness: int | None = None  # the seed of its random functions
    seeds: Mapping[str, Tensor | float] = field(default_factory=dict)  # model output -> its gradient
    outputs: dict[str, Tensor] = field(default_factory=dict)  # model outputs, detached
    input_gradients: dict[str, dict[int, Tensor]] = field(
        default_factory=dict
    )  # by input, then by the stage that reads it
    saved: dict[int, Saved] = field(default_factory=dict)  # by stage, until its backward
    versions: dict[int, Version] = field(
        default_factory=dict
    )  # by stage: the weights that its forward used, until their optimizer step
    queues: dict[int, Queue] = field(default_factory=dict)  # by stage: gradients of weights that its backward leaves
    retained: dict[str, Tensor | None] = field(default_factory=dict)  # by output: its gradient without its seed
    kept: dict[int, Kept] = field(default_factory=dict)  # by stage: what its backward needs, if it goes to the host


class Runner:
    """One stage at run time, with all that can be looked up before it runs."""

    def __init__(self, stage: Stage, weights: Weights, lane: Lane) -> None:
        self.stage = stage
        self.weights = weights
        self.lane = lane
        self.parameters = tuple(stage.names.values())
        self.read_only = read_only(stage)
        self.only_sized = only_sized(stage)
        argument = {name: place for place, name in enumerate(stage.arguments)}
        returned = {name: place for place, name in enumerate(stage.returns)}
        self.takes = {source: [argument[name] for name in names] for source, names in stage.receives.items()}
        self.sends = {target: [returned[name] for name in names] for target, names in stage.sends.items()}
        self.outputs = {name: returned[name] for name in stage.outputs}

    @cached_property
    def function(self) -> Function:
        """The stage as a function of its arguments and its weights."""
        return lift(self.stage)

    @cached_property
    def split_function(self) -> Function:
        """The same, whose backward leaves gradients of weights in the queue of its forward."""
        return lift(self.stage, splits=True)

    def forward(
        self, microbatch: Microbatch, received: Mapping[int, Values], splits: bool = False, leaves: bool = False
    ) -> dict[int, Values]:
        """Runs one microbatch's forward; returns the values for each later stage.

        Args:
            splits: whether its backward leaves gradients of weights for ``backward_weight``.
            leaves: whether ``offload`` takes to the host what it saves.
        """
        stage = self.stage
        inputs = [self._input(name, microbatch) for name in stage.inputs]
        arguments: list[Value] = [*inputs, *[None] * (len(stage.arguments) - len(inputs))]
        values_of = {source: tuple(map(_leaf, values)) for source, values in received.items()}
        for source, values in values_of.items():
            for place, value in zip(self.takes[source], values, strict=True):
                arguments[place] = value
        seed_microbatch(microbatch.randomness)
        kept = Kept() if leaves and self._offloads else None
        if splits:
            microbatch.queues[stage.index] = Queue()
        if splits and not looks_for_nan():  # torch looks for NaN in backwards, so these must be whole
            returned = self._call(self.split_function, arguments, kept, microbatch.queues[stage.index])
        else:
            returned = self._call(self.function, arguments, kept)
        if torch.is_grad_enabled():
            wanted = {name: t for name, t in zip(stage.inputs, inputs, strict=True) if t.requires_grad}
            microbatch.saved[stage.index] = Saved(wanted, values_of, returned)
            microbatch.versions[stage.index] = self.weights.current
            if kept is not None:
                microbatch.kept[stage.index] = kept
        for name, place in self.outputs.items():
            microbatch.outputs[name] = _cut_off(_alone(returned[place]))
        return {target: tuple([returned[place] for place in places]) for target, places in self.sends.items()}

    @property
    def _offloads(self) -> bool:
        """Whether what forwards save can go to the host: not without gradients, and where a user has hooks on it."""
        return self.lane.offloads and torch.is_grad_enabled() and not hooks_on_saved()

    def offload(self, microbatch: Microbatch) -> Leaving | None:
        """Begins to copy to the host what a forward has saved; None if there is nothing."""
        kept, saved = microbatch.kept.get(self.stage.index), microbatch.saved.get(self.stage.index)
        if kept is None or saved is None:
            return None
        staying = [
            *self.weights.current.leaves.values(),
            *self.stage.module.buffers(),
            *microbatch.inputs.values(),
            *saved.inputs.values(),
            *(value for values in saved.received.values() for value in values if value is not None),
            *saved.returned,
        ]
        return kept.leave(self.lane, set(map(address_of, staying)))

    def fetch(self, microbatch: Microbatch) -> Sent | None:
        """Begins to copy back what a backward needs; None if there is nothing."""
        kept = microbatch.kept.get(self.stage.index)
        return None if kept is None else kept.come_back(self.lane)

    def backward(self, microbatch: Microbatch, received: Mapping[int, Values]) -> dict[int, Values]:
        """Runs one microbatch's backward; returns the gradients of the values from each earlier stage.

        A gradient, received or returned, may be None.
        """
        saved = microbatch.saved.pop(self.stage.index)
        if (kept := microbatch.kept.pop(self.stage.index, None)) is not None:
            self.lane.wait(kept.ready)
        version = microbatch.versions[self.stage.index]
        self.weights.check(version)
        without = [leaf for leaf in version.leaves.values() if leaf.grad is None]
        returned = saved.returned
        gradients: dict[int, Tensor] = {}  # by place
        for name, seed in microbatch.seeds.items():
            place = self.outputs.get(name)
            if place is not None and returned[place].requires_grad:
                gradients[place] = self._seed(seed, returned[place])
        for target in sorted(received, reverse=True):  # the latest use first, as autograd adds them up
            for place, gradient in zip(self.sends[target], received[target], strict=True):
                if gradient is not None:
                    gradients[place] = gradients[place] + gradient if place in gradients else gradient
        roots = [place for place in gradients if returned[place].requires_grad]
        retained = [name for name in microbatch.retained if name in self.outputs]
        for name in retained:
            returned[self.outputs[name]].retain_grad()
        if roots:
            self._differentiate([returned[place] for place in roots], [gradients[place] for place in roots])
        self.weights.touch(version)
        _separate(without)
        for name in retained:
            total = returned[self.outputs[name]].grad
            if total is not None and name in microbatch.seeds:
                total = total - self._seed(microbatch.seeds[name], total)
            microbatch.retained[name] = total
        for name, leaf in saved.inputs.items():
            if leaf.grad is not None:
                microbatch.input_gradients.setdefault(name, {})[self.stage.index] = leaf.grad
        return {
            source: tuple([None if leaf is None else leaf.grad for leaf in leaves])
            for source, leaves in saved.received.items()
        }

    def backward_weight(self, microbatch: Microbatch) -> None:
        """Computes the gradients of weights that a microbatch's backward has left."""
        try:
            with _without_autocast(self.lane.device.type):
                microbatch.queues.pop(self.stage.index).empty()
        except Exception as error:
            where = f"in the gradients of weights of {self.stage.modules}"
            raise _named(error)(f"{where}: {type(error).__name__}: {error}") from error

    def update(self, microbatches: Sequence[Microbatch]) -> None:
        """Steps the stage's optimizer, for forwards after the next ``step``."""
        self.weights.update(self._needed(microbatches))

    def step(self, microbatches: Sequence[Microbatch]) -> None:
        """Lets forwards use the next version of the weights, for which the optimizer steps if it has not yet."""
        self.weights.step(self._needed(microbatches))

    def _needed(self, microbatches: Sequence[Microbatch]) -> list[Version]:
        """The versions of the weights that pending backwards need; microbatches let go of others."""
        index = self.stage.index
        for microbatch in microbatches:
            if index not in microbatch.saved:
                microbatch.versions.pop(index, None)
        return [m.versions[index] for m in microbatches if index in m.saved]

    def _input(self, name: str, microbatch: Microbatch) -> Tensor:
        """An input of the model on this device; a leaf if it requires a gradient."""
        tensor = microbatch.inputs[name]
        if name in self.only_sized and not tensor.requires_grad:
            return tensor
        tensor = self.lane.fetch(tensor)
        return tensor if name in self.read_only and not tensor.requires_grad else _cut_off(tensor)

    def _call(
        self, function: Function, arguments: Sequence[Value], kept: Kept | None, queue: Queue | None = None
    ) -> tuple[Tensor, ...]:
        try:
            current = self.weights.current.leaves
            weights = [current[name] for name in self.parameters]
            if kept is None and queue is None and not looks_for_nan():
                return function(*arguments, *weights)
            with ExitStack() as contexts:
                results: list[Tensor] = []
                if kept is not None:
                    contexts.enter_context(kept.watched())
                if queue is not None:  # it sees the hooks on what is saved
                    contexts.enter_context(queued(queue))
                if looks_for_nan():
                    results = contexts.enter_context(watched_forward(self.stage, arguments))
                returned = function(*arguments, *weights)
                results += returned
            return returned
        except Exception as error:
            where = self._where(error)
            error = (kept and hooks_refused(error)) or error
            raise _named(error)(f"{where + ': ' if where else ''}{type(error).__name__}: {error}") from error

    def _differentiate(self, roots: list[Tensor], gradients: list[Tensor]) -> None:
        try:
            watch_backward(roots, self.stage.origins)
            with _without_autocast(self.lane.device.type):
                # torch.autograd.backward without its checks, for gradients that have the shapes of their roots
                _engine_run_backward(
                    tuple(roots), tuple(gradients), False, False, (), allow_unreachable=True, accumulate_grad=True
                )
        except Exception as error:
            line = failing_line(error)
            where = f"in the backward of {self.stage.modules}" + (f", {line}" if line else "")
            raise _named(error)(f"{where}: {type(error).__name__}: {error}") from error

    def _seed(self, seed: Tensor | float, output: Tensor) -> Tensor:
        if isinstance(seed, Tensor):
            return self.lane.fetch(seed)
        return torch.full_like(output, seed, memory_format=torch.contiguous_format)

    def _where(self, error: BaseException) -> str:
        """The origin of the node that raised, found by its line in the generated code."""
        for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
            if "eval_with_key" in frame.f_code.co_filename:
                code = linecache.getline(frame.f_code.co_filename, line, frame.f_globals)
                match = re.match(r"\s*(\w+)\s*(?::[^=]*)?=", code)
                origin = self.stage.origins.get(match[1] if match else "")
                return str(origin) if origin else ""
        return ""


def _named(error: Exception) -> type[ExecutionError]:
    """The class of the error that tells the user of another one."""
    return OutOfMemoryError if isinstance(error, torch.OutOfMemoryError) else ExecutionError


def _without_autocast(device_type: str) -> AbstractContextManager[None]:
    """A context for backwards and gradients of weights: autocast is for forwards only."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def _separate(leaves: Sequence[Tensor]) -> None:
    """Gives gradients that autograd has just put into leaves memory of their own. Later backwards add to it in place.

    Until then others may read what shares it: another stage its gradient, and a queue one that gradients of weights
    are computed from.
    """
    for leaf in leaves:
        gradient = leaf.grad
        if gradient is not None and is_plain(gradient) and holders(gradient) > 1:
            leaf.grad = gradient.clone()


def _leaf(value: Value) -> Value:
    return None if value is None else _cut_off(value)


def _alone(value: Tensor) -> Tensor:
    """A scalar without the memory of what it sums: torch's ``mse_loss`` keeps its unreduced values in the storage."""
    if value.ndim or value.layout != torch.strided or value.untyped_storage().nbytes() <= value.nbytes:
        return value
    return value.detach().clone().requires_grad_(value.requires_grad)


def _cut_off(value: Tensor) -> Tensor:
    """A detached value: a leaf that accumulates a gradient if the value requires one."""
    return value.detach().requires_grad_() if value.requires_grad else value.detach()
