"""What the verbs make of a call, step by step.

    capture -> summarize -> profile -> make_plan -> split        once for a kind of call
    rehearse -> corrected -> make_plan -> split                  until the plan's times hold
    schedule -> simulate -> lower                                once for a number of microbatches

The first capture of a model is profiled, partitioned and rehearsed, the others follow its plan.
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
from pipecompile.capture.captured import SymbolicSizes
from pipecompile.capture.origin import origin_of
from pipecompile.capture.output_batch_dims import with_batch_dims
from pipecompile.capture.state.restore import left_as_before
from pipecompile.compiler.devices import cluster_of
from pipecompile.compiler.options import Options
from pipecompile.compiler.rehearse import Rehearsal, rehearsed
from pipecompile.errors import CaptureError, InputError
from pipecompile.ir.cluster import Cluster
from pipecompile.ir.graph import CostedGraph, Graph
from pipecompile.ir.plan import Plan
from pipecompile.ir.plan_options import PlanOptions
from pipecompile.ops.device_args import threads_each
from pipecompile.partition import carry_over
from pipecompile.planning.plan_search import make_plan
from pipecompile.planning.replicas import Candidate, with_best_replicas
from pipecompile.planning.search_spec import Request
from pipecompile.planning.training_spec import Workload
from pipecompile.profile import profile
from pipecompile.runtime.compiled import Compiled, find_loss, misfit
from pipecompile.runtime.split import Piece, Stage, cut_out, split
from pipecompile.schedule import ASYNCHRONOUS, SCHEDULES, gpipe


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
    with left_as_before(model, [] if forward is None else [forward]):  # parts kept whole are tried out
        if whole:
            division = _divided(trace, rows, options)
        else:
            captured = with_batch_dims(trace(rows.counts if call.batch else None), trace)
            _refuse_writes_between_versions(captured, options)
            division = undivided(captured, options.batching.out_dims)
    graph = summarize(division.body)
    if first is not None:
        plan = carry_over(first.plan, first.graph, graph)
        stages, before, tail = _cut(division, graph, plan, devices)
        return replace(
            first, division=division, graph=graph, plan=plan, stages=stages, before=before, tail=tail, programs={}
        )
    work, costed = _work(division, options), _costed(division.body, graph, options, devices)
    cluster = options.cluster or cluster_of(devices, measure=costed.measured)
    request, plan, candidates = _planned(costed, cluster, work, options.plan)
    stages, before, tail = _cut(division, graph, plan, devices)
    compiled = Compiled(
        division=division,
        graph=graph,
        plan=plan,
        costed=costed,
        reference=plan,
        cluster=cluster,
        work=work,
        candidates=candidates,
        stages=stages,
        before=before,
        tail=tail,
    )
    return _rehearsed(compiled, request, call, rows, devices, options) if _is_real(model, options) else compiled


def replanned(compiled: Compiled, costed: CostedGraph, options: Options, devices: Sequence[torch.device]) -> Compiled:
    """The same capture under a plan made anew.

    Args:
        costed: the costs to plan from, of the graph of ``compiled``.
        options: what the plan must satisfy, and what it minimizes.

    Raises:
        PlanError: no plan satisfies the options.
        InputError: they do not fit the model or one another.
    """
    work = _work(compiled.division, options)
    _, plan, candidates = _planned(costed, compiled.cluster, work, options.plan)
    cut = _cut(compiled.division, compiled.graph, plan, devices)
    return replace(compiled.planned(costed, plan, cut, candidates), work=work)


def _planned(
    costed: CostedGraph, cluster: Cluster, work: Workload, options: PlanOptions
) -> tuple[Request, Plan, tuple[Candidate, ...]]:
    """The plan, what it answers, and for ``replicas="auto"`` all candidates."""
    if options.replicas == "auto":
        plan, candidates = with_best_replicas(costed, cluster, work, options)
        return Request(candidates[0].replicas, options), plan, candidates
    request = Request(options.counts or (1,) * len(cluster), options)
    return request, make_plan(costed, request, cluster, work), ()


def _refuse_writes_between_versions(captured: Captured, options: Options) -> None:
    """Raises ``CaptureError`` if a forward writes to weights of which the schedule keeps several versions."""
    trained = {name for name, parameter in captured.model.named_parameters() if parameter.requires_grad}
    for node in captured.graph.nodes if options.schedule in ASYNCHRONOUS else ():
        for name in trained.intersection(origin_of(node).writes):
            raise CaptureError(
                f"{origin_of(node)}: forward writes to parameter {name!r}, of which schedule={options.schedule!r} "
                f"keeps several versions at once; use a synchronous schedule"
            )


def _cut(
    division: Division, graph: Graph, plan: Plan, devices: Sequence[torch.device]
) -> tuple[tuple[Stage, ...], Piece | None, Piece | None]:
    """The stages, and the pieces before and after them; parameters are moved to their devices."""
    place(division.body, plan, graph, devices)
    stages = split(division.body, graph, plan, devices)
    return stages, *_pieces(division, stages[-1].device)


def _is_real(model: nn.Module, options: Options) -> bool:
    """Whether costs are measured here, for the devices that are here."""
    measured = options.costs in (None, "measure") and not any(p.is_meta for p in model.parameters())
    return measured and options.cluster is None


def _rehearsed(
    compiled: Compiled, request: Request, call: Call, rows: Rows, devices: Sequence[torch.device], options: Options
) -> Compiled:
    """The same planned from what its stages take together."""
    fitting = [cut for cut in compiled.cuts(rows) if not compiled.broken(call, cut)]
    if not fitting:
        return compiled
    schedule = SCHEDULES["1f1b"] if options.schedule in ASYNCHRONOUS else compiled.work.schedule
    loss = _loss(compiled.division, options)
    starts = [loss] if loss else list(compiled.division.joins)

    def replan(costed: CostedGraph) -> Compiled:
        plan = make_plan(costed, request, compiled.cluster, compiled.work)
        cut = _cut(compiled.division, compiled.graph, plan, devices)
        return compiled.planned(costed, plan, cut, compiled.candidates)

    return rehearsed(compiled, call, fitting[0], Rehearsal(starts, schedule, devices), replan)


def _costed(captured: Captured, graph: Graph, options: Options, devices: Sequence[torch.device]) -> CostedGraph:
    """The costs of a capture: measured, counted, or those of an earlier profile, if it is one of this graph."""
    if isinstance(options.costs, CostedGraph):
        return reused(options.costs, graph)
    kind = options.cluster.devices[0].kind if options.cluster else ""
    with left_as_before(captured.model):  # parts kept whole are run
        return profile(captured, graph, options.costs, devices[0], threads=threads_each(devices), kind=kind)


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
    schedule = options.work.schedule if _loss(division, options) else gpipe
    return replace(options.work, tail=_tail_bytes(division), schedule=schedule)


def _loss(division: Division, options: Options) -> str:
    """The value of the stages that is the loss; empty if they compute none."""
    try:
        loss = find_loss(division.captured, options.loss_output)
    except InputError:  # the call that trains says so
        return ""
    outputs = [output for output in division.captured.outputs if output.node is not None]
    name = "" if loss is None else division.places[str(outputs[loss].node)]
    return name if name in division.joins else ""


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

    def __call__(
        self, rows: Sequence[int] | None = None, attempts: Sequence[SymbolicSizes] = SYMBOLIC_ATTEMPTS
    ) -> Captured:
        return capture(self.model, self.call, rows, self.forward, self.leaves, attempts)


def _divided(trace: _Tracer, rows: Rows, options: Options) -> Division:
    """The division of a model: of one trace for any rows, or of two, at a microbatch's and at the batch's."""
    call, whole = trace.call, trace()
    if call.batch is None or ((whole.is_fixed or whole.leaf_writes) and len(rows) == 1):
        return undivided(whole, one_part=True)
    if len(rows) > 1 and (why := _each_for_itself(whole)):
        warnings.warn(f"{why}; so every batch of {call.batch} rows is run as one microbatch", stacklevel=2)
        return undivided(whole, one_part=True)
    if not whole.is_fixed and not misfit(whole, call.split(rows.counts), call.tensors):
        small = large = replace(whole, microbatch=rows.counts[0], checked={})
    else:
        narrower = SYMBOLIC_ATTEMPTS[SYMBOLIC_ATTEMPTS.index(whole.symbolic) :]  # for the same nodes
        small, large = _of_a_microbatch(trace, rows, narrower), whole
        if differ := twins_differ(small, large):
            warnings.warn(f"{differ}; so every batch of {call.batch} rows is run as one microbatch", stacklevel=2)
            return undivided(whole, one_part=True)
    if options.batching.batch_norm == "deferred":
        alone = small is large
        small = defer_running(small)
        large = small if alone else defer_running(large)
    division = divide(small, large, options.batching.allow_mixing, options.batching.out_dims)
    return division if call.batch >= division.at_least else undivided(whole, one_part=True)


def _of_a_microbatch(trace: _Tracer, rows: Rows, attempts: Sequence[SymbolicSizes]) -> Captured:
    """A trace at a microbatch's rows, of a model that has been traced at the whole batch's.

    Raises:
        CaptureError: it works for the whole batch alone.
    """
    try:
        return trace(rows.counts, attempts)
    except CaptureError as error:
        raise CaptureError(
            f"this model works for a batch of {trace.call.batch} only; use microbatches=1 (with the {rows.counts[0]} "
            f"rows of a microbatch: {str(error).removeprefix('the model cannot be traced: ')})"
        ) from error


def _each_for_itself(captured: Captured) -> str:
    """What of a part that is kept whole each microbatch would do for itself; empty if nothing."""
    if captured.draws_whole:
        return "a part kept whole draws random numbers of Python or numpy, which each microbatch would do for itself"
    for path, name in captured.leaf_writes.items():
        return (
            f"module {path!r} is kept whole and its forward writes to its parameter {name!r}, which each microbatch "
            f"would do for itself (where only the first batch does, run the model once before compile)"
        )
    return ""


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
    if tensor.device != device and not tensor.is_meta:
        tensor.data = tensor.data.to(device)
