"""The verb: a captured model and its graph in, costs out."""

from __future__ import annotations

from datetime import UTC, datetime

import torch

from pipecompile.capture import Captured
from pipecompile.errors import InputError
from pipecompile.ir.device_specs import ACCELERATORS, Roofline
from pipecompile.ir.graph import Cost, CostedGraph, Footprint, Graph, Setting
from pipecompile.ops.device_args import threads_of
from pipecompile.profile.meters import Clock, Counter, How, Meter
from pipecompile.profile.walk import Walk

DEFAULT = "A100-40GB"  # whose roofline a model on the meta device is counted over, where no device is named


def profile(
    captured: Captured,
    graph: Graph,
    how: How | None = None,
    device: torch.device | None = None,
    roofline: Roofline | None = None,
    threads: int | None = None,
    kind: str = "",
) -> CostedGraph:
    """The graph with the cost of each node for one microbatch.

    Args:
        how: "measure" on ``device``, or "count"; by default measured unless the model is on the meta device.
        device: where to measure; by default where the model is.
        roofline: to count over; by default that of ``kind``.
        threads: within an operation on the CPU while it is measured; by default the caller's.
        kind: the accelerator to count for, a name of ``ACCELERATORS``.

    Raises:
        InputError: a model on the meta device cannot be measured.
    """
    on_meta = any(p.is_meta for p in captured.model.parameters())
    how = how or ("count" if on_meta else "measure")
    if how == "measure" and on_meta:
        raise InputError("a model on the meta device has no values to measure with; use costs='count'")
    if device is None:
        device = torch.device("cpu") if on_meta else captured.device
    meter: Meter = Clock(device) if how == "measure" else Counter(roofline or ACCELERATORS[kind or DEFAULT].roofline)
    with threads_of(threads or torch.get_num_threads()):
        setting = _setting(captured, kind if how == "count" else str(device))
        walk = Walk(captured, device, meter)
        walk.run()
    names = [node.name for node in graph.nodes]
    return CostedGraph(
        graph,
        tuple(walk.costs.get(name, Cost()) for name in names),
        f"measured: {device}, torch {torch.__version__}" if how == "measure" else f"counted: {kind}".rstrip(": "),
        tuple(walk.storages),
        tuple(walk.footprints.get(name, Footprint()) for name in names),
        setting,
        measured=how == "measure",
    )


def _setting(captured: Captured, device: str) -> Setting:
    shapes = {name: captured.sample_shape(name) for name in captured.call.tensors}
    inputs = (
        f"{name}: {str(tensor.dtype).removeprefix('torch.')}{list(shapes[name])}"
        for name, tensor in captured.call.tensors.items()
    )
    return Setting(
        device,
        torch.__version__,
        torch.get_num_threads(),
        datetime.now(UTC).isoformat(timespec="seconds"),
        type(captured.model).__qualname__,
        tuple(inputs),
    )
