"""The report on a capture: what is specialized, guarded or recomputed, and where it differs from the unsplit model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields
from itertools import combinations
from typing import Any

import sympy

from pipecompile.batching import Partial, norms
from pipecompile.capture import Captured
from pipecompile.capture.loss import could_be_losses
from pipecompile.capture.origin import Origin, origin_of
from pipecompile.capture.purity import is_random
from pipecompile.compiler.options import Options
from pipecompile.ir.cluster import HANDED_OVER, Cluster, Link
from pipecompile.ir.plan_quality import known
from pipecompile.ir.timeline import Timeline
from pipecompile.ir.timing import Timing
from pipecompile.ir.units import bytes_text, count_text, names_text, plural, seconds_text
from pipecompile.ir.weight_versions import delays, versions
from pipecompile.partition.stage_nodes import Placed
from pipecompile.partition.tied_nodes import tied_nodes
from pipecompile.planning.joint_choice import told
from pipecompile.render.labels import replica_notes
from pipecompile.render.notebook import topics_html
from pipecompile.runtime.compiled import Compiled
from pipecompile.runtime.lift import only_sized
from pipecompile.runtime.split import Stage
from pipecompile.schedule.own import Own
from pipecompile.schedule.policy import last_round


def _across_microbatches(compiled: Compiled) -> list[str]:
    """How several microbatches compute what the whole batch computes, and where they do not."""
    captured, division = compiled.captured, compiled.division
    if captured.call.batch in (None, captured.microbatch):
        return []
    notes = [] if (found := compiled.planned.counted) is None else [str(found)]
    notes += [f"reweighted to match the whole batch: {line}" for line in division.reweighted]
    if any(kind == Partial(mean=True) for kind in division.joins.values()):
        notes.append("microbatches are independent batches; scalar outputs are means over all rows")
    if division.tail is not None and division.tail.why:
        notes += [f"computed once from the whole batch, with GPipe's memory: {why}" for why in division.tail.why]
    if division.tail is not None and division.tail.weights:
        notes.append(f"work on the whole batch, behind the stages: {', '.join(division.tail.weights)}")
    if division.tail is not None and division.tail.writes:
        notes.append(f"written once per batch: {', '.join(division.tail.writes)}")
    notes += [f"found by experiment: samples do not mix in {what}" for what in division.tried]
    kept = {origin_of(n).path for n in captured.graph.nodes if n.op == "call_module" and origin_of(n).writes}
    notes += [f"module {path!r} is kept whole and may write its buffers once per microbatch" for path in sorted(kept)]
    if normalizing := norms(captured):
        notes.append(f"batch normalization uses each microbatch's statistics ({origin_of(normalizing[0])})")
    body = [n for n in division.body.graph.nodes if n.op != "call_module"]
    written = dict.fromkeys(name for n in body for name in origin_of(n).writes)
    if written:
        notes.append(f"written once per microbatch, and read at the time of its forward: {', '.join(written)}")
    random = [node for node in captured.graph.nodes if is_random(node)]
    if random:
        calls = f"{plural(len(random), 'random call')}, first in {origin_of(random[0])}"
        notes.append(f"random numbers differ from the unsplit model's ({calls})")
    return notes


def _losses(compiled: Compiled) -> list[str]:
    """Outputs that are not returned, or a note if the caller computes the loss because several outputs could be it."""
    dropped = [output.name for output in compiled.captured.outputs if output.is_dropped]
    if dropped:
        return [f"None because of outputs='loss': {names_text(dropped)}"]
    names = could_be_losses(compiled.captured)
    if len(names) < 2 or "loss" in names:
        return []
    return [
        f"outputs {', '.join(names)} could each be the loss: backwards wait for the caller's gradients, with GPipe's "
        f"memory; to avoid this, name the loss with loss_output="
    ]


def _attribute_guards(captured: Captured) -> list[str]:
    """The Python attributes that are guarded, with the number of each name, and what is guarded of followed numbers."""
    attributes = captured.attributes
    counts = Counter(attribute.name for attribute, _ in attributes.read)
    names = ", ".join(name if count == 1 else f"{name} ({count})" for name, count in sorted(counts.items()))
    read = [f"Python attributes that forward reads: {names}"] if names else []
    followed = [number.label for number in attributes.numbers] + ["random numbers"] * bool(attributes.draws.made)
    asked = plural(len(attributes.questions), "operation")
    return read + [f"the results of {asked} on {names_text(followed)}"] * bool(attributes.questions)


def _checkpoints(captured: Captured) -> list[str]:
    """The parts that the model itself recomputes in the backward."""
    origins: dict[int, list[Origin]] = {}
    for node in captured.graph.nodes:
        if node.name in captured.recomputed:
            origins.setdefault(captured.recomputed[node.name], []).append(origin_of(node))
    return [f"{plural(len(o), 'call')} from {o[0]} on, which the model checkpoints" for o in origins.values()]


def _memory(compiled: Compiled) -> list[str]:
    """The predicted peak memory of each stage, of ranks with several stages, and of devices if known."""
    plan, memory = compiled.plan, compiled.memory
    limits = [device.memory for device in compiled.planned.cluster.devices]
    of = ["" if limit is None else f" of {bytes_text(limit)}" for limit in limits]
    shared = len(set(plan.rank_of)) < plan.num_stages
    lines = []
    for stage, held in enumerate(memory.stages):
        parts = ", ".join(f"{kind} {bytes_text(nbytes)}" for kind, nbytes in held.by_kind() if nbytes)
        lines.append(f"stage {stage}: {bytes_text(held.total)}{'' if shared else of[plan.rank_of[stage]]} ({parts})")
    for rank, nbytes in enumerate(memory.ranks) if shared else ():
        stages = ", ".join(str(stage) for stage, at in enumerate(plan.rank_of) if at == rank)
        lines.append(f"rank {rank}, with stages {stages}: {bytes_text(nbytes)}{of[rank]}")
    return lines


def _updates(compiled: Compiled) -> list[str]:
    """How old the weights of an update's gradients are in each stage, if stages step inside the pipeline."""
    work = compiled.planned.work
    if not work.asynchronous:
        return []
    program = work.schedule(compiled.plan, work.microbatches)
    live, late = versions(program).live, delays(program)
    return [
        f"stage {stage}: by its own optimizer, with gradients of weights that are {plural(updates, 'update')} older; "
        f"{plural(live[stage], 'version')} of the weights; gradients are clipped by the norm of this stage, if at all"
        for stage, updates in sorted(late.items())
    ]


def _links(cluster: Cluster) -> list[str]:
    """The latency and bandwidth of the links between ranks, and their origin; equal links share a line."""
    names = [device.name for device in cluster.devices]
    alike: dict[Link, dict[str, None]] = {}
    for one, two in combinations(range(len(cluster)), 2):
        alike.setdefault(cluster.between(one, two), {})[f"{names[one]} to {names[two]}"] = None
    return [
        f"{names_text(list(pairs))}: {seconds_text(link.latency)} + bytes / {count_text(link.bandwidth)}B/s, "
        + ("passed by reference, not copied" if link == HANDED_OVER else cluster.origin)
        for link, pairs in alike.items()
    ]


def _calibration(compiled: Compiled, timeline: Timeline | None) -> list[str]:
    """The measured seconds of each stage in the last training step, and the predicted ones."""
    times = compiled.times(timeline) if timeline is not None else ()
    return [
        f"stage {stage}: {seconds_text(t.measured.seconds)} per microbatch, "
        f"{seconds_text(t.predicted.seconds)} predicted ({t.ratio - 1:+.0%})"
        for stage, t in enumerate(times)
    ]


def _compiled(stage: Stage) -> list[str]:
    """What is compiled of a stage, what stays between its parts, and what torch could not compile."""
    if not stage.backend:
        return []
    parts = stage.compiled
    graphs, seconds = sum(part.graphs for part in parts), sum(part.seconds for part in parts)
    made = f"{plural(graphs, 'graph')} so far, {seconds_text(seconds)}" if graphs else "not called yet"
    between = [f"{count} {why}" for why, count in stage.uncompiled.items()]
    rest = f"; calls between them: {', '.join(between)}" if between else ""
    failed = [f"{part.where} runs uncompiled: {part.why}" for part in parts if part.why]
    return [f"stage {stage.index}: {plural(len(parts), 'part')} by {stage.backend} ({made}){rest}", *failed]


def _leaves(captured: Captured) -> list[str]:
    """The modules and functions kept whole, each with its first call, and the number of its calls."""
    calls: dict[str, list[Origin]] = {}
    for node in captured.graph.nodes:
        if captured.leaf_call(node) is not None:
            path = origin_of(node).path if node.op == "call_module" else ""
            name = f"module {path!r}" if path else f"function {getattr(node.target, '__name__', node.name)}"
            calls.setdefault(name, []).append(origin_of(node))
    return [
        f"{name} is kept whole in one stage: {plural(len(origins), 'call')}, first from "
        + (origins[0].source if name.startswith("module") and origins[0].source else str(origins[0]))
        for name, origins in calls.items()
    ]


def _warnings(compiled: Compiled) -> Iterator[str]:
    """What the user should look at, besides comparisons that could not be made."""
    planned, counted = compiled.planned, compiled.planned.counted
    if counted is not None and counted.loses:
        yield f"one device that runs the batch at once is predicted to be faster; microbatches: {counted}"
    if compiled.division.one_part and planned.work.microbatches > 1 and compiled.captured.call.batch:
        yield "every batch is run as one microbatch, because this capture holds for whole batches only: stages wait"
    for rank, nbytes in enumerate(compiled.memory.ranks):
        limit = planned.cluster.devices[rank].memory
        if limit is not None and nbytes > limit:
            yield f"rank {rank} is predicted to need {bytes_text(nbytes)}, but its device has {bytes_text(limit)}"
    for stage in compiled.stages:
        yield from (
            f"stage {stage.index}: {part.where} runs uncompiled: {part.why}" for part in stage.compiled if part.why
        )


def _caches(compiled: Compiled) -> Iterator[str]:
    """How many tensors of a key-value cache each stage reads, and where they stay between calls."""
    held = {name for name, key in compiled.captured.call.cached.items() if not key.is_number}
    for stage in compiled.stages:
        if own := held.intersection(stage.inputs) - only_sized(stage):
            yield f"stage {stage.index} reads {plural(len(own), 'tensor')} of the cache, which stay on {stage.device}"


NOT_TIMED = Timing()


@dataclass(frozen=True)
class Report:
    """Notes on the capture in use: what is specialized, approximated, kept whole or recomputed.

    Each attribute is one topic and holds one string per fact. ``print(report)`` omits empty topics.

    Attributes:
        warnings: what to look at: comparisons that could not be made, memory that a device does not have, and the like.
        leaves: modules and functions that are kept whole, and where they are called.
        captures: why the model was captured, for each capture.
        verified: what was compared with the unsplit model, for each capture.
        notes: what was kept whole, fixed or given up to capture the model.
        microbatches: how microbatches compute what the whole batch computes, and where they do not.
        guards: conditions under which a later call can use this capture.
        attributes: Python attributes that a call sets.
        rematerialized: the number of cheap values that each stage which reads them computes for itself.
        recomputed: activations that the backward recomputes.
        offloaded: activations that are in the host's memory between the passes.
        plan: the bottleneck, and how far from optimal it may be.
        updates: for schedules that step inside the pipeline, how old the weights of gradients are, and the versions.
        schedule: the schedule, where its stages are, where a batch cannot run it as it is meant, and the schedules that
            were weighed against it.
        memory: peak bytes of each stage, by kind.
        links: latency and bandwidth between ranks, and what they do not use of a host.
        costs: where the costs come from.
        caches: tensors of a key-value cache that the call passes, by the stage that reads them.
        learned: what the first training steps told of the plan, and whether the cut moved.
        calibration: measured and predicted seconds of each stage in the last training step.
        tied: parameters that several stages use.
        replicas: devices of each stage, and the alternatives that were tried.
        compiled: what ``torch.compile`` compiles of each stage, and what it does not.
        remembered: what earlier processes have measured or planned, and what was ignored or could not be kept.
        rerun: why calls were rerun in a backward, and how often.
        mapped: why batches of ``map`` ran one after another, and how many.
        observed: what observed the calling thread, which therefore ran all stages itself, and how often.
        timing: the seconds of the first call, by phase.
    """

    warnings: tuple[str, ...] = ()
    leaves: tuple[str, ...] = ()
    captures: tuple[str, ...] = ()
    verified: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    microbatches: tuple[str, ...] = ()
    guards: tuple[str, ...] = ()
    attributes: tuple[str, ...] = ()
    rematerialized: tuple[str, ...] = ()
    recomputed: tuple[str, ...] = ()
    offloaded: tuple[str, ...] = ()
    plan: tuple[str, ...] = ()
    updates: tuple[str, ...] = ()
    schedule: tuple[str, ...] = ()
    memory: tuple[str, ...] = ()
    links: tuple[str, ...] = ()
    costs: tuple[str, ...] = ()
    caches: tuple[str, ...] = ()
    learned: tuple[str, ...] = ()
    calibration: tuple[str, ...] = ()
    tied: tuple[str, ...] = ()
    replicas: tuple[str, ...] = ()
    compiled: tuple[str, ...] = ()
    remembered: tuple[str, ...] = ()
    rerun: tuple[str, ...] = ()
    mapped: tuple[str, ...] = ()
    observed: tuple[str, ...] = ()
    timing: Timing = NOT_TIMED

    @property
    def topics(self) -> dict[str, list[str]]:
        """The lines of each topic, empty topics included, without the seconds of the phases."""
        return {field.name: list(getattr(self, field.name)) for field in fields(self) if field.name != "timing"}

    def to_dict(self) -> dict[str, Any]:
        """The lines of each topic, empty topics included, and the seconds of each phase, ready for JSON."""
        return {**self.topics, "timing": self.timing.by_phase()}

    @property
    def said(self) -> dict[str, list[str]]:
        """The lines of each topic that has some, the seconds of the phases included."""
        said = {**self.topics, "timing": [str(self.timing)] if self.timing.total else []}
        return {topic: lines for topic, lines in said.items() if lines}

    def __str__(self) -> str:
        return "\n".join("\n    ".join([topic, *lines]) for topic, lines in self.said.items())

    def _repr_html_(self) -> str:
        """The topics, for notebooks."""
        return topics_html(self.said)


def _tied(compiled: Compiled) -> Iterator[str]:
    plan = compiled.plan
    for tied in plan.tied_by_model:
        yield f"{tied.parameter} over stages {', '.join(map(str, tied.stages))}, gradients summed"
    placed = Placed(compiled.graph)
    for name, things in tied_nodes(placed).items() if compiled.planned.work.asynchronous else ():
        stages = {plan.stage_of[placed.nodes[thing]] for thing in things}
        if len(stages) == 1:
            yield f"{name} in stage {stages.pop()} with all {len(things)} nodes that read it, since stages step apart"


def _named(captured: Captured, expression: sympy.Basic) -> str:
    """What the sizes in a guard are of: ``", s0 is dimension 0 of 'x'"``."""
    symbols = sorted(expression.free_symbols & captured.sizes.keys(), key=str)
    named = ((symbol, *captured.sizes[symbol]) for symbol in symbols)
    return "".join(f", {symbol} is dimension {dim} of {name!r}" for symbol, name, dim in named)


def capture_topics(captured: Captured) -> dict[str, tuple[str, ...]]:
    """The topics of a report that need no plan: ``leaves``, ``notes``, ``guards`` and ``attributes``."""
    guards = [f"{expr} = {answer}{_named(captured, expr)}" for expr, answer in captured.guards]
    reads = [f"the model reads {value} from its inputs" for value in captured.read_values]
    return {
        "leaves": tuple(_leaves(captured)),
        "notes": captured.notes,
        "guards": (*guards, *reads, *_attribute_guards(captured)),
        "attributes": tuple(f"{e.place.label} is set once per call" for e in captured.attributes.updates),
    }


def scheduled(options: Options, compiled: Compiled) -> Iterator[str]:
    """The schedule of a capture, and what it was weighed against."""
    planned, ranks = compiled.planned, len(set(compiled.plan.rank_of))
    yield f"{options.schedule}, {options.placement}"
    for count in dict.fromkeys(key[1] for key in compiled.programs if key[0] == "train"):
        if isinstance(options.schedule, Own) and not options.schedule.fits(count):
            yield f"a batch of {count} microbatches runs as 1f1b, since this is {options.schedule}"
        elif str(options.schedule).startswith("interleaved"):
            round, last = last_round(ranks, count)
            if last < round:
                yield (
                    f"the last round of a batch of {count} microbatches has {last} of {round}, so the bubble "
                    f"is larger than for a multiple of {ranks}"
                )
    if planned.schedule and not planned.weighed:
        yield "chosen without comparison, since the caller computes the loss: forwards all run before backwards"
    yield from told(planned.weighed)


def describe(compiled: Compiled, timeline: Timeline | None = None) -> Report:
    """The report on a capture, without what the pipeline knows and adds.

    Args:
        compiled: the capture.
        timeline: of the last call, for ``calibration``.
    """
    graph, plan = compiled.graph, compiled.plan
    topics = capture_topics(compiled.captured)
    copies = sum(node.rematerialized and node.op != "input" for node in graph.nodes)
    copied = f"{plural(copies, 'cheap value')} (masks, positions, sizes), computed by each stage that reads them"
    return Report(
        warnings=tuple(_warnings(compiled)),
        leaves=topics["leaves"],
        notes=(*topics["notes"], *_losses(compiled)),
        microbatches=tuple(_across_microbatches(compiled)),
        guards=topics["guards"],
        attributes=topics["attributes"],
        rematerialized=(copied,) if copies else (),
        offloaded=tuple(f"stage {s}, from a forward to its backward" for s in plan.offloaded),
        recomputed=(*_checkpoints(compiled.captured), *(f"stage {s}, to fit its memory" for s in plan.recomputed)),
        plan=(known(plan.quality),),
        updates=tuple(_updates(compiled)),
        memory=tuple(_memory(compiled)),
        links=tuple(_links(compiled.planned.cluster)),
        costs=(compiled.planned.costed.origin,),
        caches=tuple(_caches(compiled)),
        calibration=tuple(_calibration(compiled, timeline)),
        tied=tuple(_tied(compiled)),
        remembered=compiled.planned.remembered,
        compiled=tuple(line for stage in compiled.stages for line in _compiled(stage)),
        replicas=(*replica_notes(plan), *map(str, compiled.planned.candidates)),
    )
