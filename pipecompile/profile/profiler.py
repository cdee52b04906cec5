"""Computes the costs of a captured model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime

import torch

from pipecompile.capture import Captured
from pipecompile.errors import ExecutionError, InputError
from pipecompile.ir.device_specs import ACCELERATORS, Roofline
from pipecompile.ir.graph import Cost, CostedGraph, Footprint, Graph, Setting
from pipecompile.ops.away import lacks_values
from pipecompile.ops.device_args import threads_of
from pipecompile.ops.phases import LOGGER
from pipecompile.profile.budget import SECONDS
from pipecompile.profile.meters import Clock, Counter, How, Meter
from pipecompile.profile.walk import Walk, run_in_turn

DEFAULT = "A100-40GB"  # the kind of device to count for if none is named


def profile(
    captured: Captured,
    graph: Graph,
    how: How | None = None,
    device: torch.device | None = None,
    roofline: Roofline | None = None,
    threads: int | None = None,
    kind: str = "",
    seconds: float = SECONDS,
    beside: tuple[Captured, CostedGraph] | None = None,
) -> CostedGraph:
    """The graph with the cost of each node per microbatch.

    Args:
        captured: the captured model.
        graph: its graph.
        how: "measure" on ``device``, or "count"; by default "measure", or "count" for a model that has no values (on
            the meta device, or not yet loaded). One that is not yet loaded is measured with made-up values.
        device: the device to measure on; by default that of the model.
        roofline: the roofline to count with; by default that of ``kind``.
        threads: CPU threads per operation while measuring; by default the current number.
        kind: the accelerator to count for, a key of ``ACCELERATORS``.
        seconds: of all timed runs; each operation is run at least as often as ``meters.REPEATS`` says.
        beside: the same graph with microbatches of another size, and its costs, to measure relative to them: both sizes
            are timed in turn, operation by operation, and the seconds are those of the costs times the ratio. What else
            the machine does changes both alike, but two profiles one after the other by several percent.

    Raises:
        InputError: a model on the meta device cannot be measured.
    """
    on_meta = any(p.is_meta for p in captured.model.parameters())
    how = how or ("count" if lacks_values(captured.model) else "measure")
    if how == "measure" and on_meta:
        raise InputError("a model on the meta device has no values, so it cannot be measured; use costs='count'")
    if device is None:
        device = torch.device("cpu") if on_meta else captured.device
    counted = roofline or ACCELERATORS[kind or DEFAULT].roofline
    meter: Meter = Clock(device) if how == "measure" else Counter(counted, device)
    with threads_of(threads or torch.get_num_threads()):
        setting = _setting(captured, kind if how == "count" else str(device))
        bodies = [captured] if beside is None or how == "count" else [captured, beside[0]]
        walk, *others = _walked(bodies, device, meter, seconds)
    names = [node.name for node in graph.nodes]
    costs = [walk.costs.get(name, Cost()) for name in names]
    if beside is not None and others:
        timed = [others[0].costs.get(name, Cost()) for name in names]
        costs = [_relative(*each) for each in zip(costs, timed, beside[1].costs, strict=True)]
    return CostedGraph(
        graph=graph,
        costs=tuple(costs),
        source=f"measured: {device}, torch {torch.__version__}"
        if how == "measure"
        else f"counted: {kind}".rstrip(": "),
        storages=tuple(walk.storages),
        footprints=tuple(walk.footprints.get(name, Footprint()) for name in names),
        setting=setting,
        measured=how == "measure",
        waited=walk.turns.waited if walk.turns else 0.0,
    )


def _walked(
    bodies: Sequence[Captured], device: torch.device, meter: Meter, seconds: float, repeats: bool = True
) -> list[Walk]:
    """A pass over each body, in turn; over all nodes if one of them cannot run on the values of another layer."""
    walks = [Walk(body, device, meter, seconds, repeats) for body in bodies]
    try:
        run_in_turn(walks[::-1])
    except ExecutionError as error:
        if not any(walk.repeats.used for walk in walks):
            raise
        LOGGER.info("all nodes are profiled, since one cannot run on the values of another layer: %s", error)
        return _walked(bodies, device, meter, seconds, repeats=False)
    return walks


def _relative(here: Cost, there: Cost, known: Cost) -> Cost:
    """A cost, timed in turn with one of another size of which the seconds are known better."""

    def scaled(now: float, then: float, seconds: float) -> float:
        return seconds * now / then if then and seconds else now

    forward = scaled(here.forward, there.forward, known.forward)
    return replace(here, forward=forward, backward=scaled(here.backward, there.backward, known.backward))


def _setting(captured: Captured, device: str) -> Setting:
    shapes = {name: captured.sample_shape(name) for name in captured.call.tensors}
    inputs = (
        f"{name}: {str(tensor.dtype).removeprefix('torch.')}{list(shapes[name])}"
        for name, tensor in captured.call.tensors.items()
    )
    return Setting(
        device=device,
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        model=type(captured.model).__qualname__,
        inputs=tuple(inputs),
    )
