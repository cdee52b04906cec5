"""What the user should know about a capture: what is specialised, guarded, recomputed, or not the unsplit model's."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, fields
from itertools import combinations

from pipecompile.batching import Partial, uses_batch_statistics
from pipecompile.capture import Captured
from pipecompile.capture.origin import Origin, origin_of
from pipecompile.capture.purity import is_random
from pipecompile.ir.cluster import HANDED_OVER, Cluster, Link
from pipecompile.ir.plan_quality import known
from pipecompile.ir.timeline import Timeline
from pipecompile.ir.units import bytes_text, count_text, names_text, seconds_text
from pipecompile.render.labels import replica_notes
from pipecompile.runtime.compiled import Compiled, could_be_losses


def _across_microbatches(compiled: Compiled) -> list[str]:
    """What several microbatches do to be the whole batch, and where they are not."""
    captured, division = compiled.captured, compiled.division
    if captured.call.batch in (None, captured.microbatch):
        return []
    notes = [f"parts of the whole batch's: {line}" for line in division.reweighted]
    if any(kind == Partial(mean=True) for kind in division.joins.values()):
        notes.append("each microbatch is a batch of its own; single numbers are means over the rows")
    if division.tail is not None and division.tail.why:
        notes += [f"computed once from the whole batch, at GPipe's memory: {why}" for why in division.tail.why]
    if division.tail is not None and division.tail.writes:
        notes.append(f"written once a batch: {', '.join(division.tail.writes)}")
    notes += [f"tried out: samples stay apart in {what}" for what in division.tried]
    kept = {origin_of(n).path for n in captured.graph.nodes if n.op == "call_module" and origin_of(n).writes}
    notes += [f"module {path!r}, kept whole, may write its buffers for each microbatch" for path in sorted(kept)]
    norms = [n for n in captured.graph.nodes if uses_batch_statistics(n)]
    if norms:
        notes.append(f"batch normalisation uses each microbatch's statistics ({origin_of(norms[0])})")
    body = [n for n in division.body.graph.nodes if n.op != "call_module"]
    written = dict.fromkeys(name for n in body for name in origin_of(n).writes)
    if written:
        notes.append(f"written once a microbatch, and read as its forward finds them: {', '.join(written)}")
    random = [node for node in captured.graph.nodes if is_random(node)]
    if random:
        first = origin_of(random[0])
        notes.append(f"{len(random)} functions draw random numbers, others than in the unsplit model ({first})")
    return notes


def _losses(compiled: Compiled) -> list[str]:
    """Why the loss is the caller's, where the model computes more than one number that could be it."""
    names = could_be_losses(compiled.captured)
    if len(names) < 2 or "loss" in names:
        return []
    return [
        f"outputs {', '.join(names)} could each be the loss: the backwards wait for their gradients, at GPipe's memory "
        f"(unless loss_output= names one)"
    ]


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


def _memory(compiled: Compiled) -> list[str]:
    """What each stage will hold at its fullest, and of how much."""
    lines = []
    for stage, held in enumerate(compiled.memory.stages):
        limit = compiled.cluster.devices[compiled.plan.rank_of[stage]].memory
        parts = ", ".join(f"{kind} {bytes_text(nbytes)}" for kind, nbytes in held.by_kind() if nbytes)
        of = f" of {bytes_text(limit)}" if limit is not None else ""
        lines.append(f"stage {stage}: {bytes_text(held.total)}{of} ({parts})")
    return lines


def _links(cluster: Cluster) -> list[str]:
    """What each link between two ranks is taken to be, and from where; those that are alike in one line."""
    names = [device.name for device in cluster.devices]
    alike: dict[Link, dict[str, None]] = {}
    for one, two in combinations(range(len(cluster)), 2):
        alike.setdefault(cluster.between(one, two), {})[f"{names[one]} to {names[two]}"] = None
    return [
        f"{names_text(list(pairs))}: {seconds_text(link.latency)} + bytes / {count_text(link.bandwidth)}B/s, "
        + ("handed over, not copied" if link == HANDED_OVER else cluster.origin)
        for link, pairs in alike.items()
    ]


def _calibration(compiled: Compiled, timeline: Timeline | None) -> list[str]:
    """What stages took in the last training step, beside the prediction."""
    times = compiled.times(timeline) if timeline is not None else ()
    return [
        f"stage {stage}: a microbatch took {seconds_text(t.measured.seconds)}, predicted "
        f"{seconds_text(t.predicted.seconds)} ({t.ratio - 1:+.0%})"
        for stage, t in enumerate(times)
    ]


@dataclass(frozen=True)
class Report:
    """What a user should know about the capture in use: what is specialized, approximated, kept whole or recomputed.

    Each attribute holds sentences. ``print(report)`` prints those that say something.

    Attributes:
        captures: why the model was captured, for each capture.
        verified: what was compared with the unsplit model, for each first call.
        notes: what was kept whole, fixed or given up to capture the model.
        microbatches: what microbatches do to be the whole batch, and where they are not.
        guards: what a later call must have in common with the captured one to run on it.
        attributes: Python attributes that a call sets.
        rematerialized: what each stage that reads it computes for itself.
        recomputed: activations that the backward recomputes.
        plan: the bottleneck, and how far from optimal it may be.
        memory: bytes of each stage at its peak, by kind.
        links: seconds and bandwidth between ranks.
        costs: where the costs come from.
        calibration: seconds of the stages in the last training step, beside the prediction.
        tied: parameters that several stages use.
        replicas: devices of each stage, and the alternatives that were tried.
        rerun: calls that had to be run again in a backward, with the number of times.
    """

    captures: tuple[str, ...] = ()
    verified: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    microbatches: tuple[str, ...] = ()
    guards: tuple[str, ...] = ()
    attributes: tuple[str, ...] = ()
    rematerialized: tuple[str, ...] = ()
    recomputed: tuple[str, ...] = ()
    plan: tuple[str, ...] = ()
    memory: tuple[str, ...] = ()
    links: tuple[str, ...] = ()
    costs: tuple[str, ...] = ()
    calibration: tuple[str, ...] = ()
    tied: tuple[str, ...] = ()
    replicas: tuple[str, ...] = ()
    rerun: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, list[str]]:
        """The sentences by topic, empty topics too, as JSON holds them."""
        return {field.name: list(getattr(self, field.name)) for field in fields(self)}

    def __str__(self) -> str:
        topics = [(topic, lines) for topic, lines in self.to_dict().items() if lines]
        return "\n".join("\n    ".join([topic, *lines]) for topic, lines in topics)


def describe(compiled: Compiled, timeline: Timeline | None = None) -> Report:
    """The report on a capture, without what happened to it in the pipeline; ``timeline`` is that of the last call."""
    graph, plan = compiled.graph, compiled.plan
    copies = sum(node.rematerialized and node.op != "input" for node in graph.nodes)
    guards = [f"{expr} = {answer}" for expr, answer in compiled.captured.guards]
    reads = [f"the model reads {value} from its inputs" for value in compiled.captured.read_values]
    copied = f"{copies} values (masks, positions, sizes) are computed in each stage that reads them"
    return Report(
        notes=(*compiled.captured.notes, *_losses(compiled)),
        microbatches=tuple(_across_microbatches(compiled)),
        guards=(*guards, *reads, *_attribute_guards(compiled)),
        attributes=tuple(f"{e.place.label} is set once per call" for e in compiled.captured.attributes.updates),
        rematerialized=(copied,) if copies else (),
        recomputed=(*_checkpoints(compiled.captured), *(f"stage {s}, to fit its memory" for s in plan.recomputed)),
        plan=(known(plan.quality),),
        memory=tuple(_memory(compiled)),
        links=tuple(_links(compiled.cluster)),
        costs=(compiled.costed.origin,),
        calibration=tuple(_calibration(compiled, timeline)),
        tied=tuple(
            f"{t.parameter} over stages {', '.join(map(str, t.stages))}, gradients summed" for t in plan.tied_by_model
        ),
        replicas=(*replica_notes(plan), *map(str, compiled.candidates)),
    )
