"""Compiles one call.

    capture -> summarize -> profile -> make_plan -> split        once per kind of call
    rehearse -> corrected -> make_plan -> split                  until the predicted times hold
    schedule -> simulate -> lower                                once per number of microbatches

Only the first capture of a model is profiled, partitioned and rehearsed; later captures follow its plan.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from pipecompile.batching import Division, Rows, defer_running, divide, norms_kept_whole, twins_differ, undivided
from pipecompile.capture import Call, Captured, capture, summarize
from pipecompile.capture.ancestors import ancestors
from pipecompile.capture.batch_dims import rows_elsewhere
from pipecompile.capture.capture import SYMBOLIC_ATTEMPTS
from pipecompile.capture.captured import SymbolicSizes
from pipecompile.capture.loss import find_loss, with_only_the_loss
from pipecompile.capture.origin import origin_of
from pipecompile.capture.other_threads import set_by_others
from pipecompile.capture.output_batch_dims import with_batch_dims
from pipecompile.capture.state.quiet_torch import quiet
from pipecompile.capture.state.reachable import Reach, reach_of
from pipecompile.capture.state.restore import left_as_before
from pipecompile.compiler.devices import cluster_of
from pipecompile.compiler.fingerprint import trace_hash
from pipecompile.compiler.graph_of import graph_of
from pipecompile.compiler.once_per_batch import repeated_effect, set_parameters
from pipecompile.compiler.options import Options
from pipecompile.compiler.plan_call import Planner, are_measured, is_real
from pipecompile.compiler.recall import keep
from pipecompile.compiler.rehearse import Rehearsal, rehearsed
from pipecompile.errors import CaptureError, InputError, PlanError
from pipecompile.ir.graph import CostedGraph, Graph
from pipecompile.ir.plan import Plan
from pipecompile.ops.away import is_away
from pipecompile.ops.phases import phase
from pipecompile.partition import carry_over
from pipecompile.planning.memory import NO_TAIL, TailBytes
from pipecompile.planning.planned import Planned, planned
from pipecompile.planning.training_spec import Workload
from pipecompile.runtime.compile_stage import compile_stage
from pipecompile.runtime.compiled import Compiled, misfit
from pipecompile.runtime.peers import OneProcess, Peers
from pipecompile.runtime.split import Piece, cut_out, split
from pipecompile.schedule import gpipe


def compile_call(
    model: nn.Module,
    call: Call,
    rows: Rows,
    devices: Sequence[torch.device],
    options: Options | None = None,
    forward: Callable[..., Any] | None = None,
    first: Compiled | None = None,
    whole: bool = True,
    peers: Peers | None = None,
    reach: Reach | None = None,
) -> Compiled:
    """Captures a call and splits it into stages.

    Args:
        model: the unsplit model.
        call: the call to capture.
        rows: the rows of each microbatch; the largest is traced.
        devices: one per rank.
        options: the options of ``compile``.
        forward: traced instead of the model's own forward: that followed by a loss function.
        first: an earlier capture of the model, whose plan and placement are used.
        whole: whether microbatches together must compute what the whole batch computes; otherwise each is an
            independent batch.
        peers: the processes that run the ranks. All of them capture the call, and the first one plans.
        reach: what the model and ``forward`` may read and change, if already known.

    Raises:
        CaptureError: the model cannot be traced, or its computation on the whole batch cannot be divided.
        PlanError: the model cannot be split into the requested stages, or not with the placement of ``first``.
    """
    options, peers = options or Options(), peers or OneProcess()
    reach = reach or reach_of(model, [] if forward is None else [forward])
    trace = _Tracer(model=model, call=call, forward=forward, options=options, reach=reach)
    with phase("divide"), quiet(), set_by_others(model), left_as_before(model, reach=reach):  # runs parts kept whole
        division = _divided(trace, rows, options) if whole else _independent(trace, rows, options)
    graph = graph_of(division, options, peers.are_several)
    if peers.are_several:
        peers.same("the graph of the model", graph.to_json() + trace_hash(division.whole))
    if first is not None:
        carried = carry_over(first.plan, first.graph, graph, ties=not peers.are_several)
        return _cut(division, graph, first.planned, devices, options, carried, apart=peers.are_several)
    work = _work(division, options)
    given = options.cluster
    if given is None and peers.are_several and are_measured(model, options):
        given = peers.measured(cluster_of(devices))

    planner = Planner(options=options, devices=devices, reach=reach, cluster=given, apart=peers.are_several)
    if peers.are_several:
        found = peers.shared(lambda: planner.choose(division, graph, work, rows)[2].without_functions())
        options = replace(options.with_found(found.schedule), microbatches=found.work.microbatches)
        if found.work.microbatches != work.microbatches:
            division = division.at_rows(-(-rows.by_part.counts[0] // found.work.microbatches))
            graph = graph_of(division, options, apart=True)
        found = replace(found, work=_work(division, options))  # which has the user's functions
    else:
        division, graph, found = planner.choose(division, graph, work, rows)
        options = options.with_found(found.schedule)
    compiled = _cut(division, graph, found, devices, options, apart=peers.are_several)
    if options.tuning != "rehearse" or not is_real(model, options) or found.costed.corrections:
        return compiled
    compiled = _rehearsed(compiled, call, rows, devices, options, peers)
    peers.shared(lambda: keep(compiled.planned))
    return compiled


def replanned(
    compiled: Compiled,
    costed: CostedGraph,
    options: Options,
    devices: Sequence[torch.device],
    peers: Peers | None = None,
) -> Compiled:
    """The same capture with a new plan.

    Args:
        compiled: the capture.
        costed: the costs of its graph to plan from.
        options: the constraints on the plan and its objective.
        devices: one per rank.
        peers: the processes that run the ranks, of which the first one plans.

    Raises:
        PlanError: no plan satisfies the options.
        InputError: the options do not fit the model or one another.
    """
    cluster, work = compiled.planned.cluster, _work(compiled.division, options)
    with phase("plan"):
        if peers is not None and peers.are_several:
            found = peers.shared(lambda: planned(costed, cluster, work, options.plan).without_functions())
            found = replace(found, work=work)
        else:
            found = planned(costed, cluster, work, options.plan)
    return recut(compiled, found, options, devices)


def recut(compiled: Compiled, found: Planned, options: Options, devices: Sequence[torch.device]) -> Compiled:
    """The same capture cut along a plan. Moves parameters to their devices."""
    return _cut(compiled.division, compiled.graph, found, devices, options, apart=compiled.apart)


def following(
    compiled: Compiled, first: Compiled, options: Options, devices: Sequence[torch.device]
) -> Compiled | None:
    """Another capture cut along the plan of ``first``, or None if it has no such cut."""
    try:
        carried = carry_over(first.plan, first.graph, compiled.graph)
    except PlanError:
        return None
    apart = compiled.apart
    return _cut(compiled.division, compiled.graph, first.planned, devices, options, carried, apart=apart)


def _refuse_writes_between_versions(captured: Captured, options: Options) -> None:
    """Raises ``CaptureError`` if forward writes to weights of which the schedule keeps several versions."""
    trained = {name for name, parameter in captured.model.named_parameters() if parameter.requires_grad}
    for node in captured.graph.nodes if options.policy.is_asynchronous else ():
        for name in trained.intersection(origin_of(node).writes):
            raise CaptureError(
                f"{origin_of(node)}: forward writes to parameter {name!r}, of which schedule={options.schedule!r} "
                f"keeps several versions; use schedule='1f1b' or 'gpipe'"
            )


def _cut(
    division: Division,
    graph: Graph,
    found: Planned,
    devices: Sequence[torch.device],
    options: Options,
    carried: Plan | None = None,
    apart: bool = False,
) -> Compiled:
    """A capture cut into the stages of a plan. Moves parameters to their devices.

    Args:
        division: the capture.
        graph: its body.
        found: the plan.
        devices: one per rank.
        options: whether stages are compiled.
        carried: the plan carried over to this capture, if it was made for another one.
        apart: whether its ranks are in several processes.
    """
    plan = carried or found.plan
    with phase("split"):
        last = devices[plan.rank_of[-1]]
        place(division.body, plan, graph, devices)
        for name in _only_of_the_tail(division, graph):
            _move(division.whole.tensors[name], last)  # before a stage that reads it is made, which then copies it
        stages = split(division.body, graph, plan, devices)
        if options.stage_compile is not False:
            stages = tuple(compile_stage(stage, options.stage_compile) for stage in stages)
        before, tail = _pieces(division, last)
    return Compiled(
        division=division,
        graph=graph,
        plan=plan,
        planned=found,
        stages=stages,
        before=before,
        tail=tail,
        apart=apart,
    )


def _rehearsed(
    compiled: Compiled, call: Call, rows: Rows, devices: Sequence[torch.device], options: Options, peers: Peers
) -> Compiled:
    """The same, replanned from rehearsed times of its stages."""
    fitting = [cut for cut in compiled.cuts(rows) if not compiled.broken(call, cut)]
    if not fitting:
        return compiled
    loss = _loss(compiled.division, options)
    schedule = options.policy.with_flush if loss else gpipe
    starts = [loss] if loss else list(compiled.division.joins)

    def replan(costed: CostedGraph) -> Compiled:
        with phase("plan"):
            found = peers.shared(lambda: again(compiled.planned, costed, options))
        return _cut(compiled.division, compiled.graph, found, devices, options, apart=compiled.apart)

    with phase("rehearse"):
        return rehearsed(compiled, call, fitting[0], Rehearsal(starts, schedule, devices, peers), replan)


def again(found: Planned, costed: CostedGraph, options: Options) -> Planned:
    """Another plan from other costs, which any process can read, by the user's objective, which it cannot.

    Raises:
        PlanError: no plan was found.
    """
    asked = replace(found.request.options, objective=options.plan.objective)
    made = replace(found, request=replace(found.request, options=asked)).again(costed)
    return replace(made, request=found.request)


def _work(division: Division, options: Options) -> Workload:
    """The workload of this capture. If the stages do not compute the loss, forwards all run before backwards."""
    work = replace(options.work, tail=_tail_bytes(division))
    return work if _loss(division, options) else replace(work, schedule=gpipe, loss_outside=True)


def _loss(division: Division, options: Options) -> str:
    """The output of the stages that is the loss; empty if they do not compute it."""
    try:
        loss = find_loss(division.captured, options.loss_output)
    except InputError:  # raised when a call trains
        return ""
    outputs = [output for output in division.captured.outputs if output.node is not None]
    name = "" if loss is None else division.places[str(outputs[loss].node)]
    return name if name in division.joins else ""


def _only_of_the_tail(division: Division, graph: Graph) -> tuple[str, ...]:
    """The tensors that are placed where the tail runs: what it writes, and the weights that no stage reads."""
    if division.tail is None:
        return ()
    of_stages = {name for node in graph.nodes for name in node.parameters}
    return (*division.tail.writes, *(name for name in division.tail.weights if name not in of_stages))


def _tail_bytes(division: Division) -> TailBytes:
    """Bytes of the tail, which is computed once from the whole batch: joined inputs, values and weights."""
    if division.tail is None:
        return NO_TAIL
    nbytes = {node.name: node.nbytes for node in summarize(division.whole).nodes}
    values = sum(nbytes.get(name, 0) for name in {*division.tail.nodes, *division.tail.joined})
    return TailBytes(values, tuple((name, division.whole.tensors[name].nbytes) for name in division.tail.weights))


@dataclass(frozen=True)
class _Tracer:
    """Captures one call, for the whole batch or for microbatches."""

    model: nn.Module
    call: Call
    forward: Callable[..., Any] | None
    options: Options
    reach: Reach

    def __call__(
        self, rows: Sequence[int] | None = None, attempts: Sequence[SymbolicSizes] = SYMBOLIC_ATTEMPTS
    ) -> Captured:
        leaves = self.options.leaf_modules
        with phase("capture"):
            captured = capture(self.model, self.call, rows, self.forward, leaves, attempts, self.reach)
        return with_only_the_loss(captured, self.options.loss_output) if self.options.outputs == "loss" else captured


def _independent(trace: _Tracer, rows: Rows, options: Options) -> Division:
    """The division of a model whose microbatches are independent batches."""
    captured = with_batch_dims(trace(rows.counts if trace.call.batch else None), trace)
    _refuse_writes_between_versions(captured, options)
    return undivided(captured, options.batching.out_dims)


def _divided(trace: _Tracer, rows: Rows, options: Options) -> Division:
    """The division of a model, from one trace for any rows, or from two, of a microbatch and of the batch."""
    call, whole = trace.call, trace()
    if call.batch is None:
        return undivided(whole, one_part=True)
    if (whole.is_fixed or whole.leaf_writes) and len(rows) == 1:
        return _of_one_row(whole)
    if len(rows) > 1 and (why := repeated_effect(whole)):
        warnings.warn(f"{why}; every batch of {call.batch} rows is run as one microbatch", stacklevel=2)
        return undivided(whole, one_part=True)
    if not whole.is_fixed and not misfit(whole, call.split(rows.counts), call.tensors):
        small = large = replace(whole, microbatch=rows.counts[0], checked={})
    else:
        narrower = SYMBOLIC_ATTEMPTS[SYMBOLIC_ATTEMPTS.index(whole.symbolic) :]  # for the same nodes
        small, large = _of_a_microbatch(trace, rows, narrower), whole
        if differ := twins_differ(small, large):
            warnings.warn(f"{differ}; every batch of {call.batch} rows is run as one microbatch", stacklevel=2)
            return undivided(whole, one_part=True)
    allowed = options.batching.allow_mixing
    if options.batching.batch_norm == "deferred":
        alone = small is large
        small = defer_running(small)
        large = small if alone else defer_running(large)
    else:
        allowed = (*allowed, *norms_kept_whole(small))
    try:
        division = divide(small, large, allowed, options.batching.out_dims)
    except CaptureError:
        if len(rows) == 1:
            return _of_one_row(whole)  # such as all tokens of a batch without padding
        if not (why := set_parameters(whole)):
            raise
        warnings.warn(f"{why}; every batch of {call.batch} rows is run as one microbatch", stacklevel=2)
        return undivided(whole, one_part=True)
    return division if call.batch >= division.at_least else _of_one_row(whole)


def _of_one_row(whole: Captured) -> Division:
    """A batch that cannot be divided into microbatches; larger ones may be, and need another capture."""
    return replace(undivided(whole, one_part=True), most_rows=whole.call.batch)


def _of_a_microbatch(trace: _Tracer, rows: Rows, attempts: Sequence[SymbolicSizes]) -> Captured:
    """A trace of a microbatch, for a model that has been traced on the whole batch.

    Raises:
        CaptureError: the model works only on the whole batch.
    """
    try:
        return trace(rows.counts, attempts)
    except CaptureError as error:
        call = trace.call
        dims = rows_elsewhere(call.tensors, {*call.batched, *call.cached}, call.batch)
        samples = f", or, if these are dimensions of samples, batching=Batching(in_dims={dims})" if dims else ""
        raise CaptureError(
            f"this model works for a batch of {call.batch} only; use microbatches=1{samples} (with the "
            f"{rows.counts[0]} rows of a microbatch: {str(error).removeprefix('the model cannot be captured: ')})"
        ) from error


def _pieces(division: Division, last: torch.device) -> tuple[Piece | None, Piece | None]:
    """The modules that run before and after the stages."""
    whole, tail = division.whole, division.tail
    before = None
    if division.before:
        wanted = list(dict.fromkeys(name for each in division.before for name in each.nodes))
        needed = ancestors(n for n in whole.graph.nodes if n.name in wanted)
        before = cut_out(whole, [n.name for n in needed], wanted, whole.device)
    if tail is None:
        return before, None
    return before, cut_out(whole, tail.nodes, tail.outputs, last)


def place(captured: Captured, plan: Plan, graph: Graph, devices: Sequence[torch.device]) -> None:
    """Moves the model's parameters, and the buffers that it writes, to the devices of their stages.

    A tied parameter is placed with its owner, the first stage that reads it. Other buffers are not moved; stages copy
    them.
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
    if tensor.device != device and not tensor.is_meta and not is_away(tensor):
        tensor.data = tensor.data.to(device)
