"""What earlier processes have measured and planned for the same graph on the same devices.

    recall = Recall.of(...)                          # or Recall() where nothing may be remembered
    recall.planned(graph, ..., search)               # the plan that is remembered, or that ``search`` makes
        recall.costed(graph, measure)                # in ``search``: the costs, remembered or measured
        recall.cluster(measure)                      #   and the links

An entry that does not fit, for whatever reason, is as if it were not there, and ``said`` tells.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, TypeVar

import torch

from pipecompile.capture import Captured
from pipecompile.compiler.disk_cache import DiskCache
from pipecompile.compiler.fingerprint import costs_key, graph_hash, links_key, plan_key
from pipecompile.errors import PipecompileError
from pipecompile.ir.cluster import Cluster
from pipecompile.ir.graph import Cost, CostedGraph, Footprint, Graph, Setting, SharedOutput
from pipecompile.ir.json_io import converter
from pipecompile.ir.plan import Plan
from pipecompile.ir.plan_options import PlanOptions
from pipecompile.planning.candidates import Candidates
from pipecompile.planning.counted import Counted
from pipecompile.planning.planned import Planned
from pipecompile.planning.replicas import Candidate
from pipecompile.planning.search_spec import Request
from pipecompile.planning.training_spec import Workload

T = TypeVar("T")
NOWHERE = DiskCache(None)
BUSY = 0.1  # part of the measured seconds in which other programs had the processor, from which they are not kept


@dataclass(frozen=True)
class Costs:
    """The costs of a graph, without the graph. The fields are those of ``CostedGraph``."""

    costs: tuple[Cost, ...]
    source: str
    storages: tuple[int, ...]
    footprints: tuple[Footprint, ...]
    setting: Setting | None
    measured: bool
    corrections: tuple[str, ...]

    @staticmethod
    def of(costed: CostedGraph) -> Costs:
        return Costs(**{name: getattr(costed, name) for name in Costs.__dataclass_fields__})

    def on(self, graph: Graph) -> CostedGraph:
        """The costs of a graph.

        Raises:
            ValueError: they are not of a graph like this.
        """
        return CostedGraph(graph=graph, **{name: getattr(self, name) for name in Costs.__dataclass_fields__})


@dataclass(frozen=True)
class Made:
    """A plan with what it was made from, without the graph and the options, which are in the key."""

    plan: Plan
    costs: Costs
    cluster: Cluster
    replicas: tuple[int, ...]
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True)
class Recall:
    """The entries of one capture.

    Attributes:
        cache: where they are; nowhere, if nothing may be remembered.
        graph: the hash of the graph.
        shared_outputs: what processes give each other.
        devices: one per rank.
        backend: what compiles the stages.
        said: what was remembered or ignored so far, for the report.
    """

    cache: DiskCache = NOWHERE
    graph: str = ""
    shared_outputs: tuple[SharedOutput, ...] = ()
    devices: Sequence[torch.device] = ()
    backend: str = ""
    said: list[str] = field(default_factory=list)

    @staticmethod
    def of(captured: Captured, graph: Graph, devices: Sequence[torch.device], backend: str) -> Recall:
        """The entries of the user's cache."""
        cache = DiskCache.of_user()
        if cache.folder is None:
            return Recall()
        hashed = graph_hash(captured, graph)
        return Recall(cache=cache, graph=hashed, shared_outputs=graph.shared_outputs, devices=devices, backend=backend)

    def costed(self, graph: Graph, measure: Callable[[], CostedGraph]) -> CostedGraph:
        """The costs of the graph."""
        if self.cache.folder is None:
            return measure()
        key = costs_key(self.graph, self.devices)
        found = self._read("costs", key, lambda content: converter.structure(content, Costs).on(graph))
        if found is not None:
            return found
        costed = measure()
        if why := disturbed(costed):
            self.said.append(f"costs not kept: {why}")
        else:
            self._write("costs", key, Costs.of(costed), costed.setting)
        return costed

    def cluster(self, assumed: Cluster, measure: Callable[[], Cluster]) -> Cluster:
        """The devices with their measured links. Those of one device are not worth keeping."""
        if self.cache.folder is None or len(set(self.devices)) < 2:
            return measure()
        key = links_key(self.devices)

        def fits(content: Any) -> Cluster:
            found = converter.structure(content, Cluster)
            if len(found) != len(assumed):
                raise ValueError(f"it is of {len(found)} devices")
            return replace(found, devices=assumed.devices)

        found = self._read("links", key, fits)
        if found is not None:
            return found
        cluster = measure()
        self._write("links", key, cluster, None)
        return cluster

    def planned(
        self, graph: Graph, devices: Cluster, work: Workload, options: PlanOptions, search: Callable[[], Planned]
    ) -> Planned:
        """The plan of the graph; ``remembered`` of it says what of it was."""
        key = self._key(devices, work, options)
        if not key:
            return replace(search(), remembered=tuple(self.said))

        def fits(content: Any) -> Planned:
            made = converter.structure(content, Made)
            return Planned(
                plan=_checked(made.plan, graph, len(devices)),
                costed=made.costs.on(graph),
                request=Request(made.replicas, options, work.placement),
                cluster=replace(made.cluster, devices=devices.devices),
                work=work,
                candidates=made.candidates,
            )

        found = self._read("plan", key, fits)
        if found is None:
            found = replace(search(), key=key)
            if why := keep(found):
                self.said.append(f"plan not kept: {why}")
        return replace(found, remembered=tuple(self.said), key=key)

    def counted(
        self,
        devices: Cluster,
        work: Workload,
        options: PlanOptions,
        compare: Callable[[], tuple[Counted | None, str]],
        among: Candidates | None = None,
    ) -> Counted | None:
        """The comparison of numbers of microbatches, for a plan with the usual number.

        Args:
            compare: makes it, and says why it is not to be remembered, or "".
            among: the schedules of which it takes the best for each number.
        """
        key = self._key(devices, work, options)
        if not key:
            return compare()[0]
        key = key.replace("plan-", f"microbatches-of-{'-'.join(among.names)}-" if among else "microbatches-")
        found = self._read("microbatches", key, lambda content: converter.structure(content, Counted))
        if found is None:
            found, why = compare()
            if found is not None and not why:
                self._write("microbatches", key, found, None)
        return found

    def _key(self, devices: Cluster, work: Workload, options: PlanOptions) -> str:
        if self.cache.folder is None:
            return ""
        return plan_key(costs_key(self.graph, self.devices), devices, work, options, self.backend, self.shared_outputs)

    def _read(self, what: str, key: str, fits: Callable[[Any], T]) -> T | None:
        content, why = self.cache.read(key)
        if content is not None:
            try:
                found = fits(content)
            except (PipecompileError, ValueError, TypeError, KeyError, ExceptionGroup) as error:
                why = f"does not fit ({type(error).__name__}: {error})"
            else:
                self.said.append(f"{what}, from {self.cache.path(key)}")
                return found
        if why:
            self.said.append(f"{what} not remembered: {self.cache.path(key)} {why}")
        return None

    def _write(self, what: str, key: str, thing: object, setting: Setting | None) -> None:
        if why := self.cache.write(key, converter.unstructure(thing), _about(what, self.devices, setting)):
            self.said.append(f"{what} not kept: {why}")


def keep(found: Planned) -> str:
    """Remembers a plan, in place of an earlier one of the same request. Returns why it was not written, or ""."""
    if not found.key:
        return ""
    if why := disturbed(found.costed):
        return why
    made = Made(
        plan=found.plan,
        costs=Costs.of(found.costed),
        cluster=found.cluster,
        replicas=found.request.replicas,
        candidates=found.candidates,
    )
    names = [device.name for device in found.cluster.devices]
    about = _about("plan", names, found.costed.setting)
    return DiskCache.of_user().write(found.key, converter.unstructure(made), about)


def disturbed(costed: CostedGraph) -> str:
    """Why costs are not to be remembered, or ""."""
    if costed.waited <= BUSY:
        return ""
    return f"the machine was busy: in {costed.waited:.0%} of the measured seconds, other programs had the processor"


def _about(what: str, devices: Sequence[object], setting: Setting | None) -> dict[str, str]:
    """What an entry is about, for people."""
    known = {} if setting is None else {"model": setting.model, "inputs": ", ".join(setting.inputs)}
    return {
        "what": what,
        **known,
        "devices": ", ".join(map(str, devices)),
        "torch": torch.__version__,
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _checked(plan: Plan, graph: Graph, ranks: int) -> Plan:
    """The plan, if it is one of this graph on so many ranks.

    Raises:
        PlanError, ValueError: it is not.
    """
    again = Plan.of(graph, plan.stage_of, plan.rank_of, plan.replica_of)
    if replace(plan, quality=None, recomputed=(), offloaded=()) != again:
        raise ValueError("the plan does not follow from its stages")
    if not set(plan.rank_of) <= set(range(ranks)) or not set(plan.recomputed) <= set(range(plan.num_stages)):
        raise ValueError(f"the plan is not for {ranks} ranks")
    return plan
