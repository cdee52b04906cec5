"""One capture of a model, placed and ready to run: what the verbs make of a call, step by step.

    capture -> summarize -> profile -> partition -> split        once for a kind of call
    schedule -> simulate -> lower                                once for a number of microbatches

A model has several captures (training and evaluation, another tree of arguments, sizes that break a guard). They share
one placement: the first one is profiled and partitioned, the others follow its plan.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pipecompile.batch import Rows
from pipecompile.capture import Call, Captured, capture, summarize
from pipecompile.capture.origin import Origin, origin_of
from pipecompile.capture.purity import is_random
from pipecompile.cluster import Cluster
from pipecompile.errors import InputError
from pipecompile.graph import CostedGraph, Graph
from pipecompile.lower import lower
from pipecompile.partition import carry_over, partition
from pipecompile.plan import Plan, stage_costs
from pipecompile.profile import How, profile
from pipecompile.program import Program
from pipecompile.retarget import threads_each
from pipecompile.simulate import simulate
from pipecompile.split import Stage, split
from pipecompile.timeline import Timeline


@dataclass(frozen=True)
class Compiled:
    """A captured model cut into stages.

    ``costed`` is that of the capture that was partitioned; other captures borrow its costs for their simulations.
    """

    captured: Captured
    graph: Graph
    plan: Plan
    costed: CostedGraph
    reference: Plan  # the plan that ``costed`` belongs to
    cluster: Cluster
    stages: tuple[Stage, ...]
    programs: dict[Any, Program] = field(default_factory=dict)

    @cached_property
    def is_random(self) -> bool:
        """Whether the model draws random numbers, as for dropout."""
        return any(map(is_random, self.captured.graph.nodes))

    def program(self, schedule: Callable[[Plan], Program], key: Any) -> Program:
        """The lowered program of a schedule, made once for each key."""
        if key not in self.programs:
            self.programs[key] = self.lowered(schedule(self.plan))
        return self.programs[key]

    def lowered(self, bare: Program) -> Program:
        """A bare program with its transfers, in the order of the simulation."""
        return lower(bare, self.predict(bare))

    def predict(self, program: Program) -> Timeline:
        """What a program will take, by the profile."""
        return simulate(program, stage_costs(self.costed, self.reference), self.cluster)

    def tensors(self, stage: int) -> dict[str, Tensor]:
        """What a stage reads: parameters, and buffers that live on another device, by name."""
        module, device = self.stages[stage].module, self.stages[stage].device
        far = {name: b for name, b in module.named_buffers() if b.device != device}
        return {**dict(module.named_parameters()), **far}


def compile_call(
    model: nn.Module,
    call: Call,
    rows: Rows,
    devices: Sequence[torch.device],
    forward: Callable[..., Any] | None = None,
    leaves: Sequence[str] = (),
    how: How | None = None,
    first: Compiled | None = None,
) -> Compiled:
    """Captures a call and cuts it into stages.

    Args:
        rows: the microbatches that the call will be run in; the trace is taken at the largest.
        devices: one for each rank.
        first: an earlier capture of the model, whose placement this one takes over.

    Raises:
        CaptureError: the model cannot be traced.
        PlanError: it cannot be cut into so many stages, or not along the earlier placement.
    """
    captured = capture(model, call, rows.counts if call.batch else None, forward, leaves)
    graph = summarize(captured)
    if first is None:
        cluster = Cluster.of([str(device) for device in devices])
        costed = profile(captured, graph, how, devices[0], threads=threads_each(devices))
        plan = reference = partition(costed, len(devices), cluster)
    else:
        plan, costed, reference, cluster = (
            carry_over(first.plan, first.graph, graph),
            first.costed,
            first.reference,
            first.cluster,
        )
    place(captured, plan, graph, devices)
    return Compiled(captured, graph, plan, costed, reference, cluster, split(captured, graph, plan, devices))


def place(captured: Captured, plan: Plan, graph: Graph, devices: Sequence[torch.device]) -> None:
    """Moves the model's parameters, and the buffers that it writes, to the devices of their stages.

    A tied parameter lives with its owner, the first stage that reads it. Other buffers stay: stages replicate them.
    """
    model = captured.model
    if any(p.is_meta for p in model.parameters()):
        return
    tensors = captured.tensors
    written = {n.name: origin_of(n).writes for n in captured.graph.nodes}
    for node, stage in reversed(list(zip(graph.nodes, plan.stage_of, strict=True))):
        if stage is None:
            continue
        device = devices[plan.rank_of[stage]]
        for name in node.parameters:
            _move(tensors[name], device)
        for name in written[node.name]:
            _move(tensors[name], device)


def _move(tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        tensor.data = tensor.data.to(device)


def parse_devices(devices: Sequence[torch.device | str | int]) -> tuple[torch.device, ...]:
    """Devices by torch's name, or CUDA devices by number.

    Raises:
        InputError: none are given, or one is not there.
    """
    if not isinstance(devices, list | tuple) or not devices:
        raise InputError(
            f"devices= takes a list with one device a stage, such as ['cpu', 'cpu'] or [0, 1]; got {devices!r}"
        )
    parsed = []
    for name in devices:
        try:
            device = torch.device("cuda", name) if isinstance(name, int) else torch.device(name)
        except (RuntimeError, TypeError) as error:
            raise InputError(f"{name!r} is no device: {error}") from None
        parsed.append(_present(device))
    return tuple(parsed)


def _present(device: torch.device) -> torch.device:
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise InputError(f"{device} is asked for, but stages run on cpu and cuda devices")
    device = torch.device("cuda", device.index or 0)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.index >= count:
        raise InputError(
            f"{device} is asked for, but torch {torch.__version__} sees {count} CUDA devices; "
            f"use devices=['cpu', 'cpu'] to run the same pipeline on the CPU"
        )
    return device


class Modes(NamedTuple):
    """What about a model, beside the call, makes a capture its own."""

    training: tuple[bool, ...]
    modules: tuple[tuple[type, int], ...]
    hooks: tuple[int, ...]
    parameters: tuple[tuple[int, bool], ...]  # identity, and whether it is trained
    buffers: tuple[int, ...]


def modes(model: nn.Module) -> Modes:
    """The present modes, hooks and tensors of a model."""
    modules = list(model.modules())
    training = tuple(module.training for module in modules)
    hooks = tuple(id(hook) for m in modules for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values()))
    parameters = tuple((id(parameter), parameter.requires_grad) for parameter in model.parameters())
    kinds = tuple((type(module), id(module)) for module in modules)
    return Modes(training, kinds, hooks, parameters, tuple(map(id, model.buffers())))


def find_loss(captured: Captured, name: str | None) -> int | None:
    """The position of the loss among the outputs' tensors, or None if the model computes none.

    It is the output called ``name``, or "loss", or the only single number that wants a gradient.

    Raises:
        InputError: ``name`` is no output, or no loss, or several outputs could be the loss.
    """
    tensors = [output for output in captured.outputs if output.node is not None]
    losses = [i for i, output in enumerate(tensors) if output.is_scalar and output.requires_grad]
    wanted = name or "loss"
    named = [i for i, output in enumerate(tensors) if output.name == wanted]
    if named and named[0] in losses:
        return named[0]
    if name is not None:
        names = ", ".join(output.name for output in tensors)
        raise InputError(f"loss={name!r} is no output with a single number that wants a gradient; outputs are {names}")
    if len(losses) > 1:
        names = ", ".join(tensors[i].name or str(i) for i in losses)
        raise InputError(f"outputs {names} could each be the loss; say which one with loss=")
    return losses[0] if losses else None


def _across_microbatches(compiled: Compiled) -> list[str]:
    """What several microbatches do differently from the whole batch."""
    captured = compiled.captured
    if captured.call.batch in (None, captured.microbatch):
        return []
    notes = []
    if any(output.is_scalar and not output.is_shared for output in captured.outputs):
        notes.append(
            "the loss and other single numbers are taken as means over samples: microbatches weigh by their rows, "
            "which differs from the whole batch for sums, for losses over unequal numbers of valid tokens, and where "
            "samples mix"
        )
    for node in captured.graph.nodes:
        if node.target is torch.nn.functional.batch_norm and origin_of(node).writes:
            notes.append(f"batch normalisation uses each microbatch's statistics ({origin_of(node)})")
            break
    others = [n for n in captured.graph.nodes if n.target is not torch.nn.functional.batch_norm]
    written = dict.fromkeys(name for node in others for name in origin_of(node).writes)
    if written:
        notes.append(f"buffers are written once a microbatch, and read as its forward finds them: {', '.join(written)}")
    random = [node for node in captured.graph.nodes if is_random(node)]
    if random:
        first = origin_of(random[0])
        notes.append(f"{len(random)} functions draw random numbers, others than in the unsplit model ({first})")
    return notes


def _attribute_guards(compiled: Compiled) -> list[str]:
    """The names of the Python attributes that the trace holds for, and how often each was met."""
    attributes = compiled.captured.attributes
    counts = Counter(attribute.name for attribute, _ in attributes.read)
    names = ", ".join(name if count == 1 else f"{name} ({count})" for name, count in sorted(counts.items()))
    followed = [f"the answers to {len(attributes.questions)} questions about {n.label}" for n in attributes.numbers]
    return [f"Python attributes that forward reads: {names}"] * bool(names) + followed


def _checkpoints(captured: Captured) -> list[str]:
    """What the model itself asks to compute again in the backward."""
    origins: dict[int, list[Origin]] = {}
    for node in captured.graph.nodes:
        if node.name in captured.recomputed:
            origins.setdefault(captured.recomputed[node.name], []).append(origin_of(node))
    return [f"{len(nodes)} calls from {nodes[0]} on, which the model checkpoints" for nodes in origins.values()]


def describe(compiled: Compiled) -> Mapping[str, Sequence[str]]:
    """What the user should know about a capture, by topic."""
    graph, plan = compiled.graph, compiled.plan
    copies = sum(node.replicated and node.op != "input" for node in graph.nodes)
    guards = [f"{expr} = {answer}" for expr, answer in compiled.captured.guards]
    reads = [f"the model reads {value} from its inputs" for value in compiled.captured.read_values]
    return {
        "notes": compiled.captured.notes,
        "microbatches": _across_microbatches(compiled),
        "guards": [*guards, *reads, *_attribute_guards(compiled)],
        "attributes": [
            f"{attribute.label} is set once a call" for attribute, _ in compiled.captured.attributes.updates
        ],
        "recomputed": [
            *[f"{copies} values (masks, positions, sizes) are computed in each stage that reads them"] * (copies > 0),
            *_checkpoints(compiled.captured),
        ],
        "tied": [f"{t.parameter} over stages {', '.join(map(str, t.stages))}, gradients summed" for t in plan.tied],
    }
