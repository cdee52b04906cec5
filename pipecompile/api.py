"""``compile``: the one call that splits a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pipecompile.compiler.devices import named_cluster, parse_devices
from pipecompile.compiler.options import BatchNorm, Options, Verify, read_costs
from pipecompile.facade import as_model
from pipecompile.ir.cluster import Cluster
from pipecompile.ir.constraints import Wishes
from pipecompile.ir.graph import CostedGraph
from pipecompile.pipeline import Pipeline
from pipecompile.planning.search_spec import BUDGET, Goal
from pipecompile.planning.training_spec import Recompute
from pipecompile.profile import How
from pipecompile.runtime import MakeOptimizer


def compile(
    model: nn.Module,
    devices: Sequence[torch.device | str | int],
    *,
    replicas: Sequence[int] | Literal["auto"] | None = None,
    schedule: str = "1f1b",
    microbatches: int | None = None,
    example_inputs: tuple[Sequence[Any], Mapping[str, Any]] | Mapping[str, Any] | Sequence[Any] | None = None,
    loss_fn: Callable[..., Any] | None = None,
    loss: str | None = None,
    optimizer: MakeOptimizer | None = None,
    leaf_modules: Sequence[str] = (),
    allow_microbatch: Sequence[str] = (),
    in_dims: Mapping[str, int | None] | None = None,
    out_dims: Mapping[str, int | None] | None = None,
    batch_norm: BatchNorm = "microbatch",
    profile: How | str | Path | CostedGraph | None = None,
    cluster: Cluster | str | None = None,
    recompute: Recompute = "auto",
    optimizer_state: float | None = None,
    pins: Mapping[str, int] | None = None,
    uncut: Sequence[str] = (),
    together: Sequence[Sequence[str]] = (),
    most_stages: int | None = None,
    budget: float = BUDGET,
    objective: Goal = "pace",
    verify: Verify = "first",
) -> Any:
    """A pipeline that trains ``model`` split over ``devices``, and is called as the model is.

    Args:
        devices: one for each stage: ``["cuda:0", "cuda:1"]``, ``[0, 1]``, ``["cpu", "cpu"]``; a device may stand twice.
            The stages follow one another along them, but where the links between equal devices differ (see ``cluster``)
            those change places, so that heavy cuts lie on fast links.
        replicas: how many devices run each stage, data parallel, by default one: with ``[1, 2, 1]`` the second of three
            stages runs on the second and the third of four devices, which take microbatches in turn. "auto" finds the
            number of stages, and of devices for each, with the shortest predicted step.
        schedule: "sequential", "gpipe", "1f1b" (with a flush) or "pipedream" (asynchronous).
        microbatches: parts of each batch; by default two for each stage. A batch with fewer rows has fewer parts.
        example_inputs: arguments of a call, ``(args, kwargs)`` or either alone; captures now, not at the first call.
        loss_fn: ``loss_fn(output, target)``, run in the last stage; the pipeline is then called with ``target=``
            beside the model's own arguments and returns what ``loss_fn`` returns.
        loss: the name of the output that is the loss, where it is not called "loss" and not the only single number.
            Without it several such numbers wait for the caller's gradients, as every output does.
        optimizer: for "pipedream", which steps inside the pipeline: makes an optimizer from a stage's parameters.
        leaf_modules: paths of modules to keep whole, each run as ordinary Python inside one stage. Modules that depend
            on activations in ways that no graph can record are found and kept whole without being named.
        allow_microbatch: paths of modules that mix samples in the middle of the model and may do so within each
            microbatch; without it such a model is refused, since microbatches cannot give what the whole batch gives.
        in_dims: the dimension in which arguments have their batch, by name: ``{"x": 1}``; None for an argument that all
            microbatches share. By default tensors are split along dimension 0 where most have one size there.
        out_dims: the same for outputs, by name or number (``{"scores": 1}``), where what is found by analysis is not
            what is wanted. What leads to such an output alone may mix the samples of a microbatch; with None the first
            microbatch's stands for all.
        batch_norm: batch normalisation takes each microbatch's statistics in training, as GPipe does, and moves its
            running statistics once for each ("microbatch"), or once a batch, by the mean and variance of all rows
            ("deferred").
        profile: "measure" or "count" the costs, or the path of a profile that was saved; by default measured on the
            first device.
        cluster: the devices as planning sees them, one for each of ``devices``: their speeds, memory and links; or a
            name such as "8xH100", for devices that are not here. By default equal devices, of whose memory only that of
            CUDA devices is known, and whose links are measured where the profile is. ``report["links"]`` says what they
            are taken to be.
        recompute: whether the backward of a stage computes its forward again instead of keeping its activations:
            "never", "always", or "auto", where the step is shorter for it than within memory otherwise, or nothing else
            fits.
        optimizer_state: bytes that the optimizer will keep for each byte of parameters, of which plans within memory
            must know: 0 for SGD, 1 with momentum, 2 for Adam, the default. Found out where ``optimizer`` is given.
        pins: modules and the stages that compute them: ``{"encoder": 0}``. Like the next three it is kept to, or
            refused with the reason.
        uncut: paths of modules that lie in one stage each.
        together: groups of paths of modules that share a stage.
        most_stages: the plan may have fewer stages than there are devices, and no more than so many.
        budget: CPU seconds after which the search for a plan ends with the best so far; ``plan`` says how good that is.
        objective: what the plan makes least: the "pace", seconds of the busiest stage for one microbatch with what it
            sends added; the same where stages send while they compute ("overlap"); the predicted seconds of a whole
            "step", which counts where few microbatches fill the pipeline; or any function of a plan, which chooses
            among those that were found.
        verify: when a call is compared with the unsplit model's own step, before anything of it reaches the caller:
            outputs, loss, every gradient, buffers, parameters and attributes written. "first": the first call of each
            capture, on a slice of its batch of two rows a microbatch and one more; "every" call; each nth for a number
            n; "never". What differs is an ``ExactnessError``; ``report["verified"]`` says what was compared.

    Raises:
        InputError: a device is not there, or arguments do not fit together.
        CaptureError, PlanError: with ``example_inputs``, as the first call would raise them.
    """
    present = parse_devices(devices)
    options = Options(
        schedule=schedule,
        microbatches=2 * len(present) if microbatches is None else microbatches,
        loss_fn=loss_fn,
        loss=loss,
        optimizer=optimizer,
        leaf_modules=tuple(leaf_modules),
        allow_microbatch=tuple(allow_microbatch),
        in_dims=dict(in_dims or {}),
        out_dims={str(name): dim for name, dim in (out_dims or {}).items()},
        batch_norm=batch_norm,
        profile=read_costs(profile),
        cluster=None if cluster is None else named_cluster(cluster, present),
        recompute=recompute,
        optimizer_state=optimizer_state,
        replicas=replicas if isinstance(replicas, str) else tuple(replicas or ()),
        wishes=Wishes(pins or {}, uncut, together, most_stages),
        budget=budget,
        objective=objective,
        verify=verify,
    )
    options.check(model)
    options.check_replicas(len(present))
    pipeline = Pipeline(model, present, options)
    if example_inputs is not None:
        args, kwargs = _arguments(example_inputs)
        pipeline.prepare(*args, **kwargs)
    return as_model(pipeline)


def _arguments(example: Any) -> tuple[Sequence[Any], Mapping[str, Any]]:
    if isinstance(example, Mapping):
        return (), example
    if len(example) == 2 and isinstance(example[0], list | tuple) and isinstance(example[1], Mapping):
        return example[0], example[1]
    return (example,) if isinstance(example, Tensor) else example, {}
