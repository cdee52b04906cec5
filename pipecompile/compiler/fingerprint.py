"""Hashes of what measured costs, links and plans depend on: equal hashes, equal work on equal devices.

Costs depend on the functions of a graph with their arguments, shapes, strides and dtypes, the kind of device, threads,
torch's settings and the versions of torch and of this package. Plans depend on these, on the devices, and on the
options of planning. Where a difference cannot be seen (a kernel that was replaced), a plan may be slower than it could
be, but is never wrong: a plan is checked against the graph before it is used.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import CodeType
from typing import Any

import torch

from pipecompile.capture import Captured
from pipecompile.capture.origin import origin_of
from pipecompile.ir.cluster import Cluster
from pipecompile.ir.graph import Graph, SharedOutput
from pipecompile.ir.plan_options import PlanOptions
from pipecompile.ops.accelerators import is_accelerator
from pipecompile.ops.device_args import threads_each
from pipecompile.planning.training_spec import Workload

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def graph_hash(captured: Captured, graph: Graph) -> str:
    """A hash of what a graph computes, on tensors of which shapes, strides and dtypes. Source lines may differ."""
    nodes = {node.name: node for node in captured.graph.nodes}
    lines: list[object] = []
    for node in graph.nodes:
        own = nodes.get(node.name)
        lines.append((node.op, node.inputs, node.outputs, node.parameters, node.path, node.rematerialized, node.writes))
        if own is not None:
            lines.append((own.op, own.args, own.kwargs, _code(own.target), origin_of(own).region))
    tensors = {**captured.tensors, **captured.call.tensors}
    lines += [
        (name, tuple(t.shape), t.stride() if t.layout == torch.strided else t.layout, t.dtype, t.requires_grad)
        for name, t in tensors.items()
    ]
    modules = dict(captured.model.named_modules())
    lines += [(path, _code(type(modules[path]).forward)) for path in captured.leaves if path in modules]
    lines += [graph.inputs, graph.outputs, graph.parameters, graph.together, sorted(captured.recomputed.items())]
    lines.append(captured.microbatch)
    return _hashed(lines)


def trace_hash(captured: Captured) -> str:
    """A hash of all that a trace computes, with the values of numbers, whether stages compute it or not."""
    lines: list[object] = []
    for node in captured.graph.nodes:
        lines.append((node.op, node.name, node.args, node.kwargs, _code(node.target), origin_of(node).region))
    modules = dict(captured.model.named_modules())
    return _hashed(
        [*lines, *((path, _code(type(modules[path]).forward)) for path in captured.leaves if path in modules)]
    )


def costs_key(graph: str, devices: Sequence[torch.device]) -> str:
    """The key of the costs of a graph, measured on the first device."""
    return f"costs-{_hashed([graph, device_kind(devices[0]), threads_each(devices), *_torch()])}"


def links_key(devices: Sequence[torch.device]) -> str:
    """The key of the measured links between devices of this machine."""
    kinds = [(str(device), device_kind(device)) for device in devices]
    return f"links-{_hashed([platform.node(), kinds, *_torch()])}"


def plan_key(
    costs: str,
    cluster: Cluster,
    work: Workload,
    options: PlanOptions,
    backend: str,
    shared_outputs: Sequence[SharedOutput] = (),
) -> str:
    """The key of a plan; empty if it depends on a function of the user's.

    Args:
        costs: the key of the costs.
        cluster: the devices. Their links are not compared, since measured ones always differ a little.
        work: the workload.
        options: the constraints on the plan, and its objective.
        backend: what compiles the stages, if anything does.
        shared_outputs: what processes give each other, if they are several.
    """
    if callable(options.objective):
        return ""
    limited = any(device.memory is not None for device in cluster.devices)
    weighed = limited or work.asynchronous  # steps inside the pipeline take what the optimizer's state tells apart
    state = work.state if weighed or not callable(work.optimizer_state) else None
    how = (
        work.schedule,
        work.placement,
        work.microbatches,
        work.recompute,
        work.offload,
        work.tail,
        work.fused,
        work.asynchronous,
        work.asynchronous and work.update is None,
    )
    training = (*how, state)  # of a schedule: its functions by name
    asked = [training, sorted(asdict(options).items()), backend, *shared_outputs]
    return f"plan-{_hashed([costs, cluster.devices, *asked])}"


@cache
def package_version() -> str:
    """The version of this package; empty where it is not installed."""
    try:
        return version("pipecompile")
    except PackageNotFoundError:
        return ""


@cache
def device_kind(device: torch.device) -> str:
    """The model of a device."""
    if is_accelerator(device):
        named = getattr(torch.get_device_module(device), "get_device_name", None)
        return f"{device.type} {named(device) if named else ''}".strip()
    return f"{device.type} {_processor()}, {os.cpu_count()} cores"


def _processor() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def _torch() -> tuple[object, ...]:
    return (
        package_version(),
        torch.__version__,
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
        torch.backends.mkldnn.enabled,
    )


def _code(target: Any) -> object:
    """A function by name and byte code; anything else by its text."""
    code = getattr(target, "__code__", None)
    name = getattr(target, "__qualname__", None) or getattr(target, "__name__", None) or str(target)
    if not isinstance(code, CodeType):
        return getattr(target, "__module__", None), name
    return getattr(target, "__module__", None), name, code.co_code, [c for c in code.co_consts if not _is_code(c)]


def _is_code(value: object) -> bool:
    return isinstance(value, CodeType)


def _hashed(things: Sequence[object]) -> str:
    """A hash of texts of things, without the addresses in them."""
    digest = sha256()
    for thing in things:
        digest.update(_ADDRESS.sub("", repr(thing)).encode())
        digest.update(b"\n")
    return digest.hexdigest()[:32]
