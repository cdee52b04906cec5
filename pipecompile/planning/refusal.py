"""The error that no plan fits into memory: which stage exceeds it, by how much, and what would help, by how much."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import inf

from pipecompile.errors import InfeasibleError, PlanError
from pipecompile.ir.graph import CostedGraph
from pipecompile.ir.plan import Plan
from pipecompile.ir.units import bytes_text
from pipecompile.planning.memory_fit import Fitting
from pipecompile.schedule import one_f_one_b
from pipecompile.schedule.placement import PLAIN

MORE_MICROBATCHES = (2, 4, 8, 16)  # factors on their number
MORE_DEVICES = (2, 4)  # factors on their number
TRIED = 100_000  # Forwards of a program, up to which changes are tried: each is a search and a simulation of memory


@dataclass(frozen=True)
class Remedy:
    """A change that reduces memory.

    Args:
        change: what the user would do.
        largest: bytes of the fullest device in the plan with this change.
        fits: whether that plan fits.
    """

    change: str
    largest: int
    fits: bool

    def __str__(self) -> str:
        return f"{self.change} ({bytes_text(self.largest)} on the fullest device)"


def refusal(fitting: Fitting) -> PlanError:
    """The error that no plan fits, from the fastest plan."""
    fastest = fitting.fastest(fitting.most)
    held, over = fitting.held(fastest), fitting.excess(fastest)
    rank = max(range(len(over)), key=over.__getitem__)
    limit = fitting.cluster.devices[rank].memory
    stages = [stage for stage, r in enumerate(fastest.rank_of) if r == rank]
    most = max(stages, key=lambda stage: held.stages[stage].total)
    where = f"stage {most}" if len(stages) == 1 else f"rank {rank} with stages {', '.join(map(str, stages))}"
    kinds = Counter[str]()
    for stage in stages:
        kinds.update(dict(held.stages[stage].by_kind()))
    parts = ", ".join(f"{kind} {bytes_text(n)}" for kind, n in kinds.items() if n)
    room = sum(inf if device.memory is None else device.memory for device in fitting.cluster.devices)
    forwards = fitting.work.microbatches * len(fitting.request.replicas)
    remedies = _remedies(fitting, fastest) if forwards <= TRIED else []
    untried = "" if forwards <= TRIED else f"; other options were not tried for a program of {forwards:,} Forwards"
    kind = InfeasibleError if _least(fitting) > room else PlanError
    return kind(
        f"the model does not fit into the memory of its devices: in the fastest plan of {fastest.num_stages} stages, "
        f"{where} would hold {bytes_text(held.ranks[rank])} of {bytes_text(limit or 0)}, "
        f"{bytes_text(over[rank])} too much ({parts}), and no plan that fits was found; "
        f"{_help(remedies, max(held.ranks))}{untried}"
    )


def _help(remedies: list[Remedy], now: int) -> str:
    """What would help: what is enough, else what is not enough alone."""
    enough = [str(it) for it in remedies if it.fits]
    if enough:
        return f"it would fit with {', or with '.join(enough)}"
    partly = [str(it) for it in remedies if it.largest < now]
    return "use devices with more memory" + f"; not enough alone: {', '.join(partly)}" * bool(partly)


def _least(fitting: Fitting) -> float:
    """The least bytes that all devices must hold together: weights, gradients and optimizer state."""
    each = fitting.costed.graph.parameters
    return sum(p.spec.nbytes * (1 + p.spec.requires_grad * (1 + fitting.work.state)) for p in each)


def _remedies(fitting: Fitting, fastest: Plan) -> list[Remedy]:
    """Changes of options, together if none is enough alone; then other batches; as a last resort, more devices."""
    changes = dict(_changes(fitting))
    found = [remedy for change, other in changes.items() for remedy in _tried(change, other)]
    if len(changes) > 1 and not any(it.fits for it in found):
        together = fitting
        for other in changes.values():  # each changes fields of its own
            differing = {n: v for n, v in vars(other.work).items() if v != getattr(fitting.work, n)}
            costed = together.costed if other.costed is fitting.costed else other.costed
            request = together.request if other.request == fitting.request else other.request
            together = together.varied(costed=costed, request=request, work=replace(together.work, **differing))
        found += _tried(" and ".join(changes), together)
    found += _smaller_microbatches(fitting, fastest)
    return found if any(it.fits for it in found) else [*found, *_more_devices(fitting)]


def _changes(fitting: Fitting) -> Iterator[tuple[str, Fitting]]:
    """Changes of options that need neither other devices nor another batch."""
    work, lean = fitting.work, _only_scalars(fitting.costed)
    if lean is not None:
        yield "outputs='loss'", fitting.varied(costed=lean)
    if work.recompute == "never":
        yield "recompute='auto'", fitting.varied(work=replace(work, recompute="auto"))
    if work.offload == "never":
        yield "offload='auto'", fitting.varied(work=replace(work, offload="auto"))
    other = fitting.varied(
        request=replace(fitting.request, replicas=_plain(fitting), placement=PLAIN),
        work=replace(work, schedule=one_f_one_b, placement=PLAIN),
    )
    if fitting.in_flight > other.in_flight or not fitting.request.placement.is_plain:
        yield "schedule='1f1b' with the loss inside the pipeline (labels or loss_fn=)", other


def _plain(fitting: Fitting) -> tuple[int, ...]:
    """The devices of each stage if no device runs several."""
    request = fitting.request
    return request.replicas if request.placement.is_plain else (1,) * len(fitting.cluster)


def _only_scalars(costed: CostedGraph) -> CostedGraph | None:
    """The same model with only its scalar outputs, if there are any, and if others take memory."""
    graph = costed.graph
    scalars = tuple(i for i in graph.outputs if all(not spec.shape for spec in graph.nodes[i].outputs))
    return replace(costed, graph=replace(graph, outputs=scalars)) if 0 < len(scalars) < len(graph.outputs) else None


def _tried(change: str, fitting: Fitting) -> list[Remedy]:
    """A change as a remedy; none if there is no plan with it, such as one for more devices than the model has parts."""
    try:
        plan = fitting.attempt(fitting.most) or fitting.offloaded()
        held = fitting.held(plan or fitting.fastest(fitting.most))
    except PlanError:
        return []
    return [Remedy(change, max(held.ranks), plan is not None)]


def _smaller_microbatches(fitting: Fitting, fastest: Plan) -> Iterator[Remedy]:
    """The fewest microbatches of the same batch that would fit; an estimate, in which bytes of rows are divided."""
    for factor in MORE_MICROBATCHES:
        more = fitting.varied(work=replace(fitting.work, microbatches=factor * fitting.work.microbatches))
        held = more.held(fastest)
        freed = [0] * len(held.ranks)
        for rank, stage in zip(fastest.rank_of, held.stages, strict=True):
            freed[rank] += stage.of_rows * (factor - 1) // factor
        shrunk = [nbytes - less for nbytes, less in zip(held.ranks, freed, strict=True)]
        limits = [fitting.cluster.devices[rank].memory for rank in range(len(shrunk))]
        if all(limit is None or n <= limit for n, limit in zip(shrunk, limits, strict=True)):
            change = f"about {more.work.microbatches} microbatches per batch instead of {fitting.work.microbatches}"
            yield Remedy(change, max(shrunk), True)
            return


def _more_devices(fitting: Fitting) -> Iterator[Remedy]:
    cluster, request = fitting.cluster, fitting.request
    for factor in MORE_DEVICES:
        if request.placement.given:  # a schedule for these ranks
            return
        larger = replace(cluster, devices=cluster.devices * factor, pairs=())
        more = replace(request, replicas=request.replicas * factor)
        change = f"{len(larger)} such devices instead of {len(cluster)}"
        for tried in _tried(change, fitting.varied(request=more, cluster=larger)):
            if tried.fits:
                yield tried
                return
