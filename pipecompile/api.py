"""``compile``, which splits a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from pipecompile.compiler.devices import named_cluster, parse_devices
from pipecompile.compiler.options import Options, Outputs, Verify, read_costs
from pipecompile.distributed.grid import Grid
from pipecompile.distributed.processes import Processes
from pipecompile.errors import InputError
from pipecompile.facade import as_model
from pipecompile.ir.batching_options import DEFAULT_BATCHING, Batching
from pipecompile.ir.cluster import Cluster
from pipecompile.ir.graph import CostedGraph
from pipecompile.ir.plan_options import DEFAULT_PLAN, PlanOptions
from pipecompile.materialize.absent import absent
from pipecompile.ops.backends import Backend, check_backend
from pipecompile.pipeline import Pipeline
from pipecompile.profile import How
from pipecompile.runtime import MakeOptimizer
from pipecompile.schedule.order import Order
from pipecompile.schedule.own import MakeOrder, Own, is_grid, own


def compile(
    model: nn.Module,
    devices: Sequence[torch.device | str | int] | None = None,
    *,
    mesh: DeviceMesh | None = None,
    from_checkpoint: str | Path | None = None,
    schedule: str | Order | MakeOrder | None = None,
    microbatches: int | None = None,
    example_inputs: tuple[Sequence[Any], Mapping[str, Any]] | Mapping[str, Any] | Sequence[Any] | None = None,
    loss_fn: Callable[..., Any] | None = None,
    loss_output: str | None = None,
    outputs: Outputs | None = None,
    optimizer: MakeOptimizer | None = None,
    leaf_modules: Sequence[str] = (),
    batching: Batching = DEFAULT_BATCHING,
    plan: PlanOptions = DEFAULT_PLAN,
    costs: How | str | Path | CostedGraph | None = None,
    cluster: Cluster | str | None = None,
    verify: Verify = "first",
    stage_compile: bool | str | Backend = False,
    fully_shard: bool = False,
) -> Any:
    """Splits a model into a pipeline of stages on ``devices``, which is called and trained like the model.

    Args:
        model: the model to split.
        devices: one per rank: ``["cuda:0", "cuda:1"]``, ``[0, 1]``, ``["cpu", "cpu"]``; a device may be repeated. A
            rank runs one stage, or several if the schedule needs it. Stages are placed in this order. If the links
            between equal devices differ (see ``cluster``), equal devices are reordered, so that the largest transfers
            use the fastest links.
        mesh: instead of ``devices``, one process per rank: a mesh of ``torch.distributed``, one process for each of
            its places, as ``init_device_mesh("cpu", (4,), mesh_dim_names=("stage",))`` makes it. All processes run the
            same script and make the same calls on the same batches. With a second dimension, ``"data"``, the batch is
            passed in parts, one in each row of the mesh, and divided into ``microbatches`` each.
        from_checkpoint: the path of a safetensors file, or of a directory with one, or with shards and
            ``model.safetensors.index.json``. Its keys are those of ``model.state_dict()``. A model on the meta device
            gets its values from there, each process only those that it keeps; without it, from the model's own
            initialisers, in the first call or, with ``mesh`` and ``example_inputs``, in ``compile``. A model that has
            values is overwritten.
        schedule: by default 1F1B, or ZB-H1 if its step is predicted to be shorter (``report.schedule`` has both): on
            CPU devices of one process, for measured costs and steps that are not short, unless
            ``torch.use_deterministic_algorithms`` is on. With one stage on each rank: "sequential", "gpipe", "1f1b",
            "zb-h1" or "zb-h2" (with a flush), "pipedream", "pipedream-vertical-sync" or "pipedream-2bw" (asynchronous:
            they step inside the pipeline); with several: "bfs", "interleaved-1f1b" (also "-3", "-4"), "interleaved-zb",
            "zb-v", "v-half", "v-min", "dualpipe-v". "auto": the one that promises the shortest step within memory
            (``report.schedule`` has the others), chosen together with the number of microbatches if ``microbatches`` is
            left out. Or one of your own: a grid of text, an ``Order``, or a function that returns one of them for a
            number of ranks and of microbatches.
        microbatches: parts of each batch. By default the number that promises the shortest step, by the costs of
            microbatches of two sizes (``pipe.pipeline.report.microbatches``); two per stage if costs are not measured,
            for short steps, and for schedules that step inside the pipeline. A batch with fewer rows has fewer parts.
        example_inputs: arguments of a call, ``(args, kwargs)`` or one of them, to capture now instead of at the first
            call.
        loss_fn: ``loss_fn(output, target)``, run in the last stage. The pipeline then takes ``target=`` in addition to
            the model's arguments, and returns what ``loss_fn`` returns.
        loss_output: the name of the output that is the loss, if it is neither called "loss" nor the only scalar.
            Without it, if there are several scalars, backwards wait for the caller's gradients.
        outputs: "all", or "loss": a call that computes a loss returns only that, and the other tensors of its output
            are None. So logits are freed by the backward of their microbatch, and what only other outputs need is not
            computed. A call without a loss returns all. By default all; with ``mesh``, scalars in every process and
            other tensors in the process that makes them, elsewhere on the meta device, unless it is "all".
        optimizer: for an asynchronous schedule, which steps inside the pipeline: a function that makes an optimizer
            from the parameters of a stage.
        leaf_modules: paths of modules to keep whole as leaves, each run as ordinary Python inside one stage. Modules
            whose Python depends on activations are found and kept whole automatically.
        batching: which tensors have a batch dimension, and which modules may mix samples within a microbatch.
        plan: constraints on the plan, replicas, recomputation, and what to minimize.
        costs: "measure" or "count" the costs of each operation, or the path of saved costs; by default they are
            measured on the first device.
        cluster: the speeds, memory and links to plan for, with one device for each of ``devices``; or a name such as
            "8xH100", for devices that this machine does not have. By default, devices are equal, memory is known for
            CUDA devices, and links are measured if the costs are. ``report.links`` lists the links.
        verify: when to compare a call with a step of the unsplit model before the call returns: outputs, loss, every
            gradient, and written buffers, parameters and attributes. "first": the first call of each capture, on a
            slice of its batch (three microbatches, of three, two and two rows); a number n: also every nth call;
            "every" call; or "never". If they differ, raises an ``ExactnessError``; ``report.verified`` says what was
            compared.
        stage_compile: whether ``torch.compile`` compiles the stages, at the first call, with Inductor; or the name of
            another of its backends, or a backend. Results then differ by rounding from those of uncompiled stages.
            ``report.compiled`` says what is compiled.
        fully_shard: with a mesh that has the dimension "data": whether its processes divide the parameters of a stage,
            their gradients and the optimizer's state, as torch's ``fully_shard`` does. ``pipe.parameters()`` are then
            DTensors. A call gathers them when it begins, and frees them when it ends.

    Returns:
        A module that looks like the model and runs the pipeline when called. Its attribute ``pipeline`` is the
        ``Pipeline``.

    Raises:
        InputError: a device does not exist, or arguments are not valid or do not fit together; ``stage_compile`` needs
            a compiler that is not here; or ``from_checkpoint`` does not fit the model.
        CaptureError, PlanError: with ``example_inputs``, what the first call would raise.

    Sources of the schedules: "gpipe", and microbatches, GPipe (Huang et al., NeurIPS 2019), section 2.2; "1f1b", and
    "pipedream-2bw", Narayanan et al., "Memory-Efficient Pipeline-Parallel DNN Training" (ICML 2021), sections 3.2 and
    3.1; "pipedream", "pipedream-vertical-sync", PipeDream (Narayanan et al., SOSP 2019), sections 3.2 and 3.3; "bfs",
    Breadth-First Pipeline Parallelism (Lamy-Poirier, MLSys 2023); "interleaved-1f1b", Megatron (Narayanan et al., SC
    2021), section 2.2; "zb-h1", "zb-h2", "interleaved-zb", "zb-v", Zero Bubble (Qi et al., ICLR 2024), sections 2 and
    6; "v-half", "v-min", Pipeline Parallelism with Controllable Memory (Qi et al., NeurIPS 2024), section 3;
    "dualpipe-v", DeepSeek-V3 (2024), section 3.2.1. Of ``fully_shard``: ZeRO (Rajbhandari et al. 2020), section 5.
    """
    grid = None if mesh is None else Grid.of(mesh)
    present = _devices(devices, grid)
    known, usual, finds = _scheduled(schedule, len(present), microbatches)
    options = Options(
        asked=known,
        microbatches=usual,
        finds_microbatches=finds,
        loss_fn=loss_fn,
        loss_output=loss_output,
        outputs=outputs,
        optimizer=optimizer,
        leaf_modules=tuple(leaf_modules),
        batching=batching,
        plan=plan,
        costs=read_costs(costs),
        cluster=None if cluster is None else named_cluster(cluster, present),
        verify=verify,
        stage_compile=stage_compile,
        fully_shard=fully_shard,
        parts=0 if grid is None or grid.parts_mesh is None else grid.parts,
    )
    options.check(model, len(present), processes=0 if grid is None else grid.parts)
    check_backend(stage_compile, present)
    processes = None if grid is None else Processes(grid)
    values = absent(model, from_checkpoint, _alone if processes is None else processes.all.gathered)
    pipeline = Pipeline(model, present, options, processes, values)
    if example_inputs is not None:
        args, kwargs = _arguments(example_inputs)
        pipeline.prepare(*args, **kwargs)
    return as_model(pipeline)


def _alone(said: str) -> Sequence[str]:
    return [said]


def _scheduled(schedule: Any, ranks: int, microbatches: Any) -> tuple[str | Own | None, Any, bool]:
    """The schedule, if any: its name, or the user's own; the number of microbatches, and whether it may change."""
    usual = 2 * ranks if microbatches is None else microbatches
    if schedule is None or (isinstance(schedule, str) and not is_grid(schedule)):
        return schedule, usual, microbatches is None
    if not isinstance(schedule, str | Order) and not callable(schedule):
        raise InputError(
            f"schedule={schedule!r:.80}; it must be a name such as '1f1b', a grid of text, an Order, or a function "
            f"that returns one of them for a number of ranks and of microbatches"
        )
    found = own(schedule, ranks, usual if isinstance(usual, int) else 1)
    if found.function is not None:
        return found, usual, microbatches is None
    if microbatches not in (None, found.order.num_microbatches):
        raise InputError(
            f"microbatches={microbatches!r}, but the order schedule= has {found.order.num_microbatches}; leave "
            f"microbatches= out, or pass a function that makes an order for any number"
        )
    return found, found.order.num_microbatches, False


def _devices(devices: Any, grid: Grid | None) -> tuple[torch.device, ...]:
    if (devices is None) == (grid is None):
        raise InputError(
            f"devices={devices!r} with mesh={grid and '...'}; give one of them: devices= with one device per stage, or "
            f"mesh= with one process per stage"
        )
    return parse_devices(devices) if grid is None else (torch.device("cpu"),) * grid.ranks


def _arguments(example: Any) -> tuple[Sequence[Any], Mapping[str, Any]]:
    if isinstance(example, Mapping):
        return (), example
    if len(example) == 2 and isinstance(example[0], list | tuple) and isinstance(example[1], Mapping):
        return example[0], example[1]
    return (example,) if isinstance(example, Tensor) else example, {}
