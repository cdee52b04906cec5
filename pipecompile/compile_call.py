"""What the verbs make of a call, step by step.

    capture -> summarize -> profile -> make_plan -> split        once for a kind of call
    schedule -> simulate -> lower                                once for a number of microbatches

The first capture of a model is profiled and partitioned, the others follow its plan.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from pipecompile.batching import Division, Rows, defer_running, divide, twins_differ, undivided
from pipecompile.capture import Call, Captured, capture, summarize
from pipecompile.capture.ancestors import ancestors
from pipecompile.capture.capture import SYMBOLIC_ATTEMPTS
from pipecompile.capture.joins import with_batch_dims
from pipecompile.capture.origin import origin_of
from pipecompile.compiled import Compiled, find_loss, misfit
from pipecompile.devices import cluster_of
from pipecompile.errors import InputError
from pipecompile.graph import CostedGraph, Graph
from pipecompile.options import Options
from pipecompile.partition import carry_over
from pipecompile.plan import Plan
from pipecompile.planning import Request, Workload, make_plan
from pipecompile.profile import profile
from pipecompile.replicate import Candidate, with_best_replicas
from pipecompile.retarget import threads_each
from pipecompile.schedule import gpipe
from pipecompile.split import Piece, cut_out, split


def compile_call(
    model: nn.Module,
    call: Call,
    rows: Rows,
    devices: Sequence[torch.device],
    options: Options | None = None,
    forward: Callable[..., Any] | None = None,
    first: Compiled | None = None,
    whole: bool = True,
) -> Compiled:
    """Captures a call and cuts it into stages.

    Args:
        rows: the microbatches that the call will be run in; the trace is taken at the largest.
        devices: one for each rank.
        forward: what is traced in place of the model's own forward: that and a loss function.
        first: an earlier capture of the model, whose placement this one takes over.
        whole: several microbatches are to give what the whole batch gives; else each is a batch of its own.

    Raises:
        CaptureError: the model cannot be traced, or what it computes of the whole batch cannot be divided.
        PlanError: it cannot be cut into so many stages, or not along the earlier placement.
    """
    options = options or Options()
    trace = _Tracer(model, call, forward, options.leaf_modules)
    if whole:
        division = _divided(trace, rows, options)
    else:
        captured = with_batch_dims(trace(rows.counts if call.batch else None), trace)
        division = undivided(captured, options.out_dims)
    body = division.body
    graph = summarize(body)
    candidates: tuple[Candidate, ...] = ()
    if first is None:
        work = _work(division, options)
        costed = _costed(body, graph, options, devices)
        cluster = options.cluster or cluster_of(devices, measure=costed.measured)
        if options.replicas == "auto":
            plan, candidates = with_best_replicas(costed, cluster, work, options.wishes, options.budget)
        else:
            request = Request(options.replicas or (1,) * len(devices), options.wishes, options.budget)
            plan = make_plan(costed, request, cluster, work)
        reference = plan
    else:
        plan, costed, reference = carry_over(first.plan, first.graph, graph), first.costed, first.reference
        cluster, work, candidates = first.cluster, first.work, first.candidates
    place(body, plan, graph, devices)
    stages = split(body, graph, plan, devices)
    before, tail = _pieces(division, stages[-1].device)
    return Compiled(division, graph, plan, costed, reference, cluster, work, candidates, stages, before, tail)


def _costed(captured: Captured, graph: Graph, options: Options, devices: Sequence[torch.device]) -> CostedGraph:
    """The costs of a capture: measured, counted, or those of an earlier profile, if it is one of this graph."""
    if isinstance(options.profile, CostedGraph):
        return reused(options.profile, graph)
    kind = options.cluster.devices[0].kind if options.cluster else ""
    return profile(captured, graph, options.profile, devices[0], threads=threads_each(devices), kind=kind)


def reused(costed: CostedGraph, graph: Graph) -> CostedGraph:
    """The costs of an earlier profile for a graph.

    Raises:
        InputError: the profile is of another model or call; names the first node that differs.
    """
    try:
        costed.check_fits(graph)
    except ValueError as error:
        taken = f" ({costed.setting.model} on {', '.join(costed.setting.inputs)})" if costed.setting else ""
        raise InputError(f"the profile{taken} is not of this model and call: {error}; take it anew") from None
    return replace(costed, graph=graph)


def _work(division: Division, options: Options) -> Workload:
    """How this capture is trained: where the stages do not end in the loss, all forwards come before the backwards."""
    try:
        loss = find_loss(division.captured, options.loss)
    except InputError:  # the call that trains says so
        loss = None
    outputs = [output for output in division.captured.outputs if output.node is not None]
    inside = loss is not None and division.places[str(outputs[loss].node)] in division.joins
    schedule = options.work.schedule if inside else gpipe
    return replace(options.work, tail=_tail_bytes(division), schedule=schedule)


def _tail_bytes(division: Division) -> int:
    """Bytes of all that is computed once from the whole batch: what it reads, joined, and each value on the way."""
    if division.tail is None:
        return 0
    nbytes = {node.name: node.nbytes for node in summarize(division.whole).nodes}
    return sum(nbytes.get(name, 0) for name in {*division.tail.nodes, *division.tail.joined})


@dataclass(frozen=True)
class _Tracer:
    """Captures of one call, of the whole batch or at the rows of its microbatches."""

    model: nn.Module
    call: Call
    forward: Callable[..., Any] | None
    leaves: Sequence[str]

    def __call__(self, rows: Sequence[int] | None = None, attempts: Sequence[str] = SYMBOLIC_ATTEMPTS) -> Captured:
        return capture(self.model, self.call, rows, self.forward, self.leaves, attempts)


def _divided(trace: _Tracer, rows: Rows, options: Options) -> Division:
    """The division of a model: of one trace for any rows, or of two, at a microbatch's and at the batch's."""
    call, whole = trace.call, trace()
    if call.batch is None or (whole.is_fixed and len(rows) == 1):
        return undivided(whole, one_part=True)
    if not whole.is_fixed and not misfit(whole, call.split(rows.counts), call.tensors):
        small = large = replace(whole, microbatch=rows.counts[0], checked={})
    else:
        narrower = SYMBOLIC_ATTEMPTS[SYMBOLIC_ATTEMPTS.index(whole.symbolic) :]  # for the same nodes
        small, large = trace(rows.counts, narrower), whole
        if differ := twins_differ(small, large):
            warnings.warn(f"{differ}; so every batch of {call.batch} rows is run as one microbatch", stacklevel=2)
            return undivided(whole, one_part=True)
    if options.batch_norm == "deferred":
        alone = small is large
        small = defer_running(small)
        large = small if alone else defer_running(large)
    division = divide(small, large, options.allow_microbatch, options.out_dims)
    return division if call.batch >= division.at_least else undivided(whole, one_part=True)


def _pieces(division: Division, last: torch.device) -> tuple[Piece | None, Piece | None]:
    """The modules of what comes before the stages and after them."""
    whole, tail = division.whole, division.tail
    before = None
    if division.before:
        wanted = list(dict.fromkeys(name for each in division.before for name in each.nodes))
        needed = ancestors(n for n in whole.graph.nodes if n.name in wanted)
        before = cut_out(whole, [n.name for n in needed], wanted, whole.device)
    if tail is None:
        return before, None
    for name in tail.writes:
        _move(whole.tensors[name], last)
    return before, cut_out(whole, tail.nodes, tail.outputs, last)


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
