"""``compile``: the one call that splits a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pipecompile.devices import parse_devices
from pipecompile.errors import InputError
from pipecompile.pipeline import Pipeline
from pipecompile.profile import How
from pipecompile.runtime import MakeOptimizer
from pipecompile.schedule import ASYNCHRONOUS, SCHEDULES


def compile(
    model: nn.Module,
    devices: Sequence[torch.device | str | int],
    *,
    schedule: str = "1f1b",
    microbatches: int | None = None,
    example_inputs: tuple[Sequence[Any], Mapping[str, Any]] | Mapping[str, Any] | Sequence[Any] | None = None,
    loss_fn: Callable[..., Any] | None = None,
    loss: str | None = None,
    optimizer: MakeOptimizer | None = None,
    leaf_modules: Sequence[str] = (),
    allow_microbatch: Sequence[str] = (),
    profile: How | None = None,
) -> Pipeline:
    """A pipeline that trains ``model`` split over ``devices``, and is called as the model is.

    Args:
        devices: one for each stage: ``["cuda:0", "cuda:1"]``, ``[0, 1]``, ``["cpu", "cpu"]``; a device may stand twice.
        schedule: "sequential", "gpipe", "1f1b" (with a flush) or "pipedream" (asynchronous).
        microbatches: parts of each batch; by default two for each stage. A batch with fewer rows has fewer parts.
        example_inputs: arguments of a call, ``(args, kwargs)`` or either alone; captures now, not at the first call.
        loss_fn: ``loss_fn(output, target)``, run in the last stage; the pipeline is then called with ``target=``
            beside the model's own arguments and returns what ``loss_fn`` returns.
        loss: the name of the output that is the loss, where it is not called "loss" and not the only single number.
        optimizer: for "pipedream", which steps inside the pipeline: makes an optimizer from a stage's parameters.
        leaf_modules: paths of modules to keep whole, each run as ordinary Python inside one stage. Modules that depend
            on activations in ways that no graph can record are found and kept whole without being named.
        allow_microbatch: paths of modules that mix samples in the middle of the model and may do so within each
            microbatch; without it such a model is refused, since microbatches cannot give what the whole batch gives.
        profile: "measure" or "count" the costs; by default measured on the first device.

    Raises:
        InputError: a device is not there, or arguments do not fit together.
        CaptureError, PlanError: with ``example_inputs``, as the first call would raise them.
    """
    _check_options(model, schedule, microbatches, optimizer, profile)
    present = parse_devices(devices)
    count = microbatches or 2 * len(present)
    _check_paths(model, allow_microbatch)
    pipeline = Pipeline(
        model, present, schedule, count, loss_fn, loss, optimizer, leaf_modules, profile, allow_microbatch
    )
    if example_inputs is not None:
        args, kwargs = _arguments(example_inputs)
        pipeline.prepare(*args, **kwargs)
    return pipeline


def _check_options(
    model: nn.Module, schedule: str, microbatches: int | None, optimizer: MakeOptimizer | None, profile: str | None
) -> None:
    if not isinstance(model, nn.Module):
        raise InputError(f"the model must be an nn.Module, got {type(model).__name__}: {model!r:.80}")
    if profile not in (None, "measure", "count"):
        raise InputError(f"profile={profile!r} is not known; there are 'measure' and 'count'")
    if optimizer is not None and not callable(optimizer):
        raise InputError(
            f"optimizer= takes a function from parameters to an optimizer, such as "
            f"lambda params: torch.optim.SGD(params, lr=0.1), not a {type(optimizer).__name__}"
        )
    names = [*SCHEDULES, *ASYNCHRONOUS]
    if schedule not in names:
        raise InputError(f"schedule={schedule!r} is not known; there are {', '.join(names)}")
    if microbatches is not None and (not isinstance(microbatches, int) or microbatches < 1):
        raise InputError(f"microbatches={microbatches!r}: a batch is cut into a whole number of parts, at least one")
    if schedule in ASYNCHRONOUS and optimizer is None:
        raise InputError(
            f"schedule={schedule!r} steps inside the pipeline; "
            f"pass optimizer=lambda params: torch.optim.SGD(params, lr=0.1)"
        )
    if schedule not in ASYNCHRONOUS and optimizer is not None:
        raise InputError(
            f"schedule={schedule!r} leaves stepping to you: make an optimizer of pipe.parameters() instead"
        )


def _check_paths(model: nn.Module, paths: Sequence[str]) -> None:
    known = dict(model.named_modules())
    for path in paths:
        if path not in known:
            raise InputError(f"allow_microbatch= names {path!r}, which is no module of the model")


def _arguments(example: Any) -> tuple[Sequence[Any], Mapping[str, Any]]:
    if isinstance(example, Mapping):
        return (), example
    if len(example) == 2 and isinstance(example[0], list | tuple) and isinstance(example[1], Mapping):
        return example[0], example[1]
    return (example,) if isinstance(example, Tensor) else example, {}
