"""Runs one stage: the forward and backward of a microbatch, and the tensors saved in between."""

from __future__ import annotations

import linecache
import re
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.func import functional_call

from pipecompile.errors import ExecutionError
from pipecompile.ops.randomness import seed_microbatch
from pipecompile.ops.source_lines import failing_line
from pipecompile.runtime.anomalies import watch_backward, watched_forward
from pipecompile.runtime.lane import Lane, Value, Values
from pipecompile.runtime.out_of_memory import OutOfMemoryError
from pipecompile.runtime.split import Stage
from pipecompile.runtime.weights import Version, Weights


@dataclass(frozen=True, slots=True)
class Saved:
    """The tensors that a forward saves for its backward."""

    inputs: Mapping[str, Tensor]  # leaves of the model inputs that require gradients
    received: Mapping[int, Values]  # leaves of the values from each source stage
    returned: Mapping[str, Tensor]


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


class Runner:
    """One stage at run time."""

    def __init__(self, stage: Stage, weights: Weights, lane: Lane) -> None:
        self.stage = stage
        self.weights = weights
        self.lane = lane

    def forward(self, microbatch: Microbatch, received: Mapping[int, Values]) -> dict[int, Values]:
        """Runs one microbatch's forward; returns the values for each later stage."""
        stage = self.stage
        inputs = {name: _cut_off(self.lane.fetch(microbatch.inputs[name])) for name in stage.inputs}
        leaves = {source: tuple(map(_leaf, values)) for source, values in received.items()}
        named: dict[str, Value] = dict(inputs)
        for source, values in leaves.items():
            named.update(zip(stage.receives[source], values, strict=True))
        seed_microbatch(microbatch.randomness)
        returned = dict(zip(stage.returns, self._call([named[name] for name in stage.arguments]), strict=True))
        if torch.is_grad_enabled():
            wanted = {name: t for name, t in inputs.items() if t.requires_grad}
            microbatch.saved[stage.index] = Saved(wanted, leaves, returned)
            microbatch.versions[stage.index] = self.weights.current
        for name in stage.outputs:
            microbatch.outputs[name] = _cut_off(_alone(returned[name]))
        return {target: tuple(_cut_off(returned[v]) for v in values) for target, values in stage.sends.items()}

    def backward(self, microbatch: Microbatch, received: Mapping[int, Values]) -> dict[int, Values]:
        """Runs one microbatch's backward; returns the gradients of the values from each earlier stage.

        A gradient, received or returned, may be None.
        """
        saved = microbatch.saved.pop(self.stage.index)
        self.weights.check(microbatch.versions[self.stage.index])
        gradients: dict[str, Tensor] = {}
        for name, seed in microbatch.seeds.items():
            if name in self.stage.outputs and saved.returned[name].requires_grad:
                gradients[name] = self._seed(seed, saved.returned[name])
        for target in sorted(received, reverse=True):  # the latest use first, as autograd adds them up
            for name, gradient in zip(self.stage.sends[target], received[target], strict=True):
                if gradient is not None:
                    gradients[name] = gradients[name] + gradient if name in gradients else gradient
        roots = [saved.returned[name] for name in gradients if saved.returned[name].requires_grad]
        if roots:
            self._differentiate(roots, [gradients[n] for n in gradients if saved.returned[n].requires_grad])
        self.weights.touch(microbatch.versions[self.stage.index])
        for name, leaf in saved.inputs.items():
            if leaf.grad is not None:
                microbatch.input_gradients.setdefault(name, {})[self.stage.index] = leaf.grad
        return {
            source: tuple(leaf.grad if isinstance(leaf, Tensor) else None for leaf in leaves)
            for source, leaves in saved.received.items()
        }

    def step(self, microbatches: Sequence[Microbatch]) -> None:
        """Steps the stage's optimizer; versions of the weights that a microbatch still needs are kept."""
        index = self.stage.index
        for microbatch in microbatches:
            if index not in microbatch.saved:
                microbatch.versions.pop(index, None)
        self.weights.step([m.versions[index] for m in microbatches if index in m.saved])

    def _call(self, arguments: Sequence[Value]) -> tuple[Tensor, ...]:
        try:
            current = self.weights.current.leaves
            leaves = {name: current[first] for name, first in self.stage.names.items()}
            returned: tuple[Tensor, ...]
            with watched_forward(self.stage, arguments) as results:
                returned = functional_call(self.stage.module, leaves, tuple(arguments), tie_weights=False)
                results += returned
            return returned
        except Exception as error:
            where = self._where(error)
            raise _named(error)(f"{where + ': ' if where else ''}{type(error).__name__}: {error}") from error

    def _differentiate(self, roots: list[Tensor], gradients: list[Tensor]) -> None:
        try:
            watch_backward(roots, self.stage.origins)
            with torch.autocast(self.lane.device.type, enabled=False):  # autocast is for forwards only
                torch.autograd.backward(roots, gradients)
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


def _leaf(value: Value) -> Value:
    return None if value is None else _cut_off(value)


def _alone(value: Tensor) -> Tensor:
    """A scalar without the memory of what it sums: torch's ``mse_loss`` keeps its unreduced values in the storage."""
    if value.ndim or value.layout != torch.strided or value.untyped_storage().nbytes() <= value.nbytes:
        return value
    return value.detach().clone().requires_grad_(value.requires_grad)


def _cut_off(value: Tensor) -> Tensor:
    """A detached value: a leaf that accumulates a gradient if the value requires one."""
    return value.detach().requires_grad_(value.requires_grad)
