"""Measures the effect of rounding alone on the unsplit model's step.

A split model adds in another order, so it rounds differently. If the difference exceeds ``comparison.allowed``
(gradients that cancel, sums with large terms, 16-bit dtypes), the unsplit model tells how far apart two correct results
may be: one copy runs the step in float64, others run it with every parameter and input off by one unit in the last
place, until the difference is explained or ``SHAKES`` of them have run.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from pipecompile.batching import Rows
from pipecompile.verify.comparison import Run, allowed, coarsest_type, distance, magnitude
from pipecompile.verify.results import Difference
from pipecompile.verify.side_by_side import Seeds, Trial, unsplit_step

WIDER = 5.0  # times the distance between the unsplit step and its float64 step
SHAKEN = 16.0  # times the effect of one unit in the last place of parameters and inputs
SHAKES = 4  # runs with such changes, each with others

Noise = Mapping[tuple[str, str], float]  # by kind and name
Numbers = dict[tuple[str, str], Tensor]
ROUNDED = ("output", "gradient", "input gradient", "buffer")


def with_noise(
    found: Sequence[Difference], trial: Trial, parts: Rows, seeds: Seeds, whole: Run
) -> tuple[Difference, ...]:
    """The differences of a step, with tolerances raised by the unsplit model's own rounding.

    Args:
        parts, seeds: the arguments of the unsplit step.
        whole: its results.
    """
    raised = tuple(found)
    for noise in _noise(trial, parts, seeds, whole):
        raised = tuple(replace(it, allowed=it.allowed + noise.get((it.kind, it.name), 0.0)) for it in found)
        if all(it.verdict != "different" for it in raised):
            break
    return raised


def _noise(trial: Trial, parts: Rows, seeds: Seeds, whole: Run) -> Iterator[Noise]:
    """The distance that rounding may cause in each value, from more and more runs; nothing if it cannot be measured.

    A single number that cancels is a few units of rounding, and one changed run may round to the very same number.
    """
    numbers = _tensors(whole)
    if _is_another(numbers, _tensors(unsplit_step(trial.fresh(), parts, seeds))):
        return  # runs of the model differ by more than rounding
    coarse = coarsest_type(numbers.values())
    tried: list[tuple[float, Callable[[Tensor], Tensor]]] = [(SHAKEN, partial(_shaken, i)) for i in range(SHAKES)]
    if coarse is not None and torch.finfo(coarse).eps > torch.finfo(torch.float64).eps:
        tried.insert(1, (WIDER, Tensor.double))
    found: dict[tuple[str, str], float] = {}
    for times, change in tried:
        try:
            other = _tensors(_changed(trial, parts, seeds, change))
        except Exception:  # the model cannot be copied, or does not support float64
            continue
        for key in numbers.keys() & other.keys():
            if numbers[key].shape == other[key].shape:
                gap = distance(numbers[key].to(other[key].dtype), other[key])
                found[key] = max(found.get(key, 0.0), times * gap)
        yield found


def _is_another(numbers: Numbers, again: Numbers) -> bool:
    """Whether a second run of the step has given other values."""
    pairs = [(numbers[key], again[key]) for key in numbers.keys() & again.keys()]
    return any(distance(a, b) > allowed(a.dtype, magnitude(a)) for a, b in pairs if a.shape == b.shape)


def _changed(trial: Trial, parts: Rows, seeds: Seeds, change: Callable[[Tensor], Tensor]) -> Run:
    """Runs the unsplit step on a copy of the model with changed parameters, buffers and inputs."""

    def changed(tensor: Tensor) -> Tensor:
        return change(tensor.detach()).requires_grad_(tensor.requires_grad) if tensor.is_floating_point() else tensor

    def copied(module: nn.Module) -> nn.Module:
        module = copy.deepcopy(module)
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.data = changed(tensor.data)
        return module

    call = trial.fresh().batch.call
    batch = replace(trial.batch, call=replace(call, tensors={n: changed(t) for n, t in call.tensors.items()}))
    loss_fn = copied(trial.loss_fn) if isinstance(trial.loss_fn, nn.Module) else trial.loss_fn
    other = replace(trial, model=copied(trial.model), loss_fn=loss_fn, batch=batch, reach=None)
    with ExitStack() as stack:
        if change is Tensor.double:
            for kind in {tensor.device.type for tensor in other.tensors}:
                stack.enter_context(torch.autocast(kind, enabled=False))
            seeds = {i: changed(seed) for i, seed in seeds.items()}
        return unsplit_step(other, parts, seeds)


def _shaken(number: int, tensor: Tensor) -> Tensor:
    """A tensor with every element off by one unit in the last place, up or down as ``number`` draws."""
    signs = torch.randint(0, 2, tensor.shape, generator=torch.Generator().manual_seed(number)).to(tensor.device) * 2 - 1
    return tensor + tensor * signs.to(tensor.dtype) * torch.finfo(tensor.dtype).eps


def _tensors(run: Run) -> Numbers:
    parts = ((kind, part) for kind, part in run.parts() if kind in ROUNDED)
    return {(kind, name): value for kind, part in parts for name, value in part.items() if isinstance(value, Tensor)}
