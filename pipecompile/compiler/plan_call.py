"""Plans one capture: costs, links, the plan, and the number of microbatches if the user leaves it open."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace

import torch
import torch.fx as fx
from torch import Tensor, nn

from pipecompile.batching import Division, Rows, norms
from pipecompile.capture import Captured
from pipecompile.capture.state.reachable import Reach
from pipecompile.capture.state.restore import generators_kept, left_as_before
from pipecompile.compiler.devices import cluster_of
from pipecompile.compiler.graph_of import graph_of
from pipecompile.compiler.options import Options
from pipecompile.compiler.recall import Recall, disturbed
from pipecompile.errors import ExecutionError, InputError, PlanError
from pipecompile.ir.cluster import Cluster
from pipecompile.ir.graph import CostedGraph, Graph
from pipecompile.ir.units import seconds_text
from pipecompile.ops.away import lacks_values
from pipecompile.ops.backends import name_of
from pipecompile.ops.device_args import threads_each
from pipecompile.ops.functional import is_traceable
from pipecompile.ops.operators import is_opaque
from pipecompile.ops.phases import LOGGER, phase
from pipecompile.planning.best_schedule import under_best, with_best_pair, with_best_schedule
from pipecompile.planning.by_rows import ByRows
from pipecompile.planning.candidates import Candidates
from pipecompile.planning.counted import Counted, numbers
from pipecompile.planning.joint_choice import told
from pipecompile.planning.microbatch_count import compared
from pipecompile.planning.planned import Planned, planned
from pipecompile.planning.schedule_choice import microbatches_text, weighed_again
from pipecompile.planning.short_stages import WORTH, all_short
from pipecompile.planning.training_spec import Workload
from pipecompile.profile import profile
from pipecompile.profile.budget import SECONDS

BRIEF = 0.1  # seconds of timed runs at a second size, of which the plan reads only how seconds depend on rows


@dataclass(frozen=True)
class Planner:
    """Plans captures of one model on its devices.

    Attributes:
        options: the options of ``compile``.
        devices: one per rank.
        reach: what the model's forward may change.
        cluster: the devices with their links, if these are known.
        apart: whether its ranks are in several processes.
        made: the costs so far, each of another graph or of other sizes.
    """

    options: Options
    devices: Sequence[torch.device]
    reach: Reach
    cluster: Cluster | None
    apart: bool
    made: list[CostedGraph] = field(default_factory=list)

    def choose(self, division: Division, graph: Graph, work: Workload, rows: Rows) -> tuple[Division, Graph, Planned]:
        """The plan with the schedule and the number of microbatches that the user leaves open, and what it plans.

        Args:
            division: the capture.
            graph: its body.
            work: with the schedule and the number that are used where nothing is to be chosen.
            rows: of the microbatches; of several parts of the batch, the first one is planned for.
        """
        batch = rows.by_part.counts[0] if division.captured.call.batch else 1
        counts = batch > 1 and self.options.finds_microbatches and self._may_vary(division)
        among = self._among(division, work)
        if among is not None and not among.one_plan:
            division, graph, found = self._each_with_its_plan(division, graph, work, among, batch, counts)
        elif counts:
            division, graph, found = self._with_best_count(division, graph, work, among, batch)
        else:
            found = self._plan(division, graph, work)
        if among is not None and among.one_plan:
            found = self._remembered_apart(division, graph, under_best(found, among), among)
        asked = self.options.candidates
        if among is None and asked is not None and not asked.one_plan:  # the caller computes the loss
            found = replace(found, schedule=asked.prefers)
        if found.schedule:
            LOGGER.info("schedule %s, of: %s", found.schedule, "; ".join(told(found.weighed)) or "no others")
        return division, graph, found

    def _among(self, division: Division, work: Workload) -> Candidates | None:
        """The schedules among which this plan chooses; None if it has no choice."""
        among = self.options.candidates
        fixed = self.apart or torch.are_deterministic_algorithms_enabled()
        measured = not fixed and is_real(division.body.model, self.options)
        if among is None or not among.are_open(work, cluster_of(self.devices), self.options.plan, measured):
            return None
        return among

    def _plan(self, division: Division, graph: Graph, work: Workload) -> Planned:
        """The plan of a division, remembered or new."""
        recall, options = self._recall(division.body, graph), self.options.plan

        def search() -> Planned:
            costed = self._costed(division.body, graph, recall)
            cluster = self._cluster(costed, recall)
            with phase("plan"):
                return planned(costed, cluster, work, options)

        return recall.planned(graph, cluster_of(self.devices), work, options, search)

    def _remembered_apart(self, division: Division, graph: Graph, found: Planned, among: Candidates) -> Planned:
        """The plan under the schedule that was chosen, as it is remembered for it: training may have moved it."""
        if found.schedule in ("", among.prefers):
            return found
        recall, options = self._recall(division.body, graph), self.options.plan
        kept = recall.planned(graph, cluster_of(self.devices), found.work, options, lambda: found)
        return replace(
            kept,
            remembered=(*found.remembered, *kept.remembered),
            counted=found.counted,
            schedule=found.schedule,
            weighed=weighed_again(found.weighed, kept.costed, kept.plan, kept.cluster, kept.work, options),
        )

    def _with_best_count(
        self, division: Division, graph: Graph, work: Workload, among: Candidates | None, batch: int
    ) -> tuple[Division, Graph, Planned]:
        """The plan with the number of microbatches that promises the shortest step, and what it is a plan of.

        The number stays as it is for steps so short that it hardly matters.

        Args:
            division: the capture.
            graph: its body.
            work: with the usual number.
            among: the schedules of which each number has the best; None: it has one schedule.
            batch: rows of the batch.
        """
        made: list[Planned] = []

        def count() -> tuple[Counted | None, str]:
            made.append(self._plan(division, graph, work))
            return self._counted(division, made[0], batch, among)

        recall = self._recall(division.body, graph)
        found = recall.counted(cluster_of(self.devices), work, self.options.plan, count, among)
        if found is not None and found.chosen != work.microbatches:
            there, other = self._at(division, batch, found.chosen)
            try:
                best = self._plan(there, other, replace(work, microbatches=found.chosen))
            except (ExecutionError, PlanError) as error:
                _tell_dropped(found.chosen, error)
                found = replace(found, chosen=work.microbatches)
            else:
                return there, other, replace(best, counted=_warned(found))
        first = made[0] if made else self._plan(division, graph, work)
        return division, graph, replace(first, counted=_warned(found))

    def _each_with_its_plan(
        self, division: Division, graph: Graph, work: Workload, among: Candidates, batch: int, counts: bool
    ) -> tuple[Division, Graph, Planned]:
        """The plan for the schedule that promises the shortest step, and the number of microbatches with it.

        Costs and links are remembered, the choice is not. Costs need not be measured.

        Args:
            division: the capture.
            graph: its body.
            work: with the usual number.
            among: the schedules, each with a plan of its own.
            batch: rows of the batch.
            counts: whether the number is open too.
        """
        recall, options, usual = self._recall(division.body, graph), self.options.plan, work.microbatches
        costed = self._costed(division.body, graph, recall)
        cluster = self._cluster(costed, recall)
        short = costed.seconds / len(cluster) < WORTH or costed.corrections
        by_rows, tried = None, list[int]()
        if counts and not short:
            by_rows, tried, _ = self._by_rows(division, costed, cluster, usual, batch)
        if by_rows is None:
            with phase("plan"):
                found = with_best_schedule(costed, cluster, work, options, among)
            return division, graph, replace(found, remembered=tuple(recall.said))

        def costs_of(number: int) -> CostedGraph:
            if number == usual:
                return costed
            there, other = self._at(division, batch, number)
            return self._costed(there.body, other, self._recall(there.body, other))

        with phase("plan"):
            found = with_best_pair(by_rows, cluster, work, options, tried, costs_of, _tell_dropped, among)
        if found.work.microbatches != usual:
            division, graph = self._at(division, batch, found.work.microbatches)
        return division, graph, replace(found, counted=_warned(found.counted), remembered=tuple(recall.said))

    def _at(self, division: Division, batch: int, number: int) -> tuple[Division, Graph]:
        """The capture for microbatches of which a batch has so many, and its body."""
        there = division.at_rows(-(-batch // number))
        return there, graph_of(there, self.options, self.apart)

    def _cluster(self, costed: CostedGraph, recall: Recall) -> Cluster:
        """The devices with their links, measured if the costs are."""
        with phase("profile"):
            measures, there = costed.measured and not self.apart, cluster_of(self.devices)
            return self.cluster or recall.cluster(there, lambda: cluster_of(self.devices, measure=measures))

    def _may_vary(self, division: Division) -> bool:
        """Whether results are the same for any number of microbatches, but for draws and batch statistics.

        Unless the schedule is chosen with it, another number is only taken by measured costs.
        """
        options, body = self.options, division.body
        if options.policy.is_asynchronous or isinstance(options.costs, CostedGraph):
            return False
        if not options.is_auto and (self.apart or not is_real(body.model, options)):
            return False
        if torch.are_deterministic_algorithms_enabled() or options.batching.may_mix:
            return False
        return not (division.one_part or body.is_fixed or division.at_most)

    def _counted(
        self, division: Division, found: Planned, batch: int, among: Candidates | None
    ) -> tuple[Counted | None, str]:
        """Compares numbers of microbatches, and says why this is not to be remembered, or "".

        There is no comparison if steps are too short to tell, or a second size cannot run.
        """
        usual = found.work.microbatches
        if all_short(found.stage_costs) or found.costed.corrections:
            return None, ""
        by_rows, tried, why = self._by_rows(division, found.costed, found.cluster, usual, batch)
        return (None, why) if by_rows is None else (compared(found, by_rows, tried, among), why)

    def _by_rows(
        self, division: Division, costed: CostedGraph, cluster: Cluster, usual: int, batch: int
    ) -> tuple[ByRows | None, list[int], str]:
        """Costs of microbatches of any size, the numbers to compare, and why they are not to be remembered, or "".

        There are none if there is nothing to compare, or a second size cannot run.
        """
        rows = -(-batch // usual)
        fewer = bool(norms(division.body))  # nearer to the whole batch's
        limited = any(device.memory is not None for device in cluster.devices)  # and fewer need more
        tried = numbers(batch, len(cluster), usual, most=usual if fewer else batch)
        if costed.measured:  # where there may be no room for larger ones, which are only known for sure once measured
            tried = [number for number in tried if not limited or number >= usual]
        grow = rows == 1 or (fewer and not limited)  # larger ones take longer to measure, and might not fit
        size = 2 * rows if grow else rows // 2
        if len(tried) < 2 or not 1 <= size <= batch:
            return None, tried, ""

        def at(size: int) -> Graph:
            return graph_of(division.at_rows(size), self.options, self.apart)

        body, graph = replace(division.body, microbatch=size), at(size)
        try:
            other = self._costed(body, graph, self._recall(body, graph), BRIEF, (division.body, costed))
        except ExecutionError as error:
            LOGGER.info("two microbatches per stage, since costs of another size cannot be measured: %s", error)
            return None, tried, ""

        why = disturbed(costed) or disturbed(other)
        return ByRows(one=costed, other=other, rows=(rows, size), batch=batch, at=at), tried, why

    def _costed(
        self,
        captured: Captured,
        graph: Graph,
        recall: Recall,
        seconds: float = SECONDS,
        beside: tuple[Captured, CostedGraph] | None = None,
    ) -> CostedGraph:
        """The costs of a capture: measured for so many seconds, counted, or given by the user for the same graph.

        Args:
            beside: the same capture with microbatches of another size, and its costs, beside which it is measured.
        """
        given = self.options.costs
        if isinstance(given, CostedGraph):
            return reused(given, graph)
        kind = self.options.cluster.devices[0].kind if self.options.cluster else ""

        def measure() -> CostedGraph:
            with self._kept(captured):
                threads, device = threads_each(self.devices), self.devices[0]
                return profile(
                    captured, graph, given, device, threads=threads, kind=kind, seconds=seconds, beside=beside
                )

        for costed in self.made:
            if costed.graph == graph:
                return costed
        with phase("profile"):
            costed = recall.costed(graph, measure)
        self.made.append(costed)
        return costed

    def _kept(self, captured: Captured) -> AbstractContextManager[None]:
        """A context for a profile, which leaves the model as it was: it runs functions that are not torch's."""
        tensors = all(type(tensor) in (Tensor, nn.Parameter) for tensor in captured.tensors.values())
        if tensors and not any(map(_runs_python, captured.graph.nodes)):
            return generators_kept(self.reach.generators)
        return left_as_before(captured.model, reach=self.reach)

    def _recall(self, captured: Captured, graph: Graph) -> Recall:
        """What earlier processes have measured and planned; nothing, unless all is measured on this machine."""
        if not is_real(captured.model, self.options):
            return Recall()
        compiled_by = "" if self.options.stage_compile is False else name_of(self.options.stage_compile)
        return Recall.of(captured, graph, self.devices, compiled_by)


def _runs_python(node: fx.Node) -> bool:
    """Whether a node runs Python that is neither torch's nor ours: a part kept whole, a custom operator."""
    called = node.op == "call_function" and is_opaque(node.target) and not is_traceable(node.target)
    return called or node.op == "call_module"


def is_real(model: nn.Module, options: Options) -> bool:
    """Whether costs are measured on this machine, for devices of this machine."""
    return not isinstance(options.costs, CostedGraph) and are_measured(model, options) and options.cluster is None


def are_measured(model: nn.Module, options: Options) -> bool:
    """Whether the costs of the first capture are measured, now or before they were saved."""
    if isinstance(options.costs, CostedGraph):
        return options.costs.measured
    return options.costs in (None, "measure") and not lacks_values(model)


def reused(costed: CostedGraph, graph: Graph) -> CostedGraph:
    """Costs that the user gave, for a graph of the same model and call.

    Raises:
        InputError: the costs are of another model or call; the message names the first node that differs.
    """
    try:
        costed.check_fits(graph)
    except ValueError as error:
        taken = f" ({costed.setting.model} on {', '.join(costed.setting.inputs)})" if costed.setting else ""
        raise InputError(
            f"the given costs{taken} are not of this model and call: {error}; save the costs of this model instead"
        ) from None
    return replace(costed, graph=graph)


def _tell_dropped(number: int, error: Exception) -> None:
    LOGGER.info("%s dropped, with their own costs: %s", microbatches_text(number), error)


def _warned(found: Counted | None) -> Counted | None:
    """The comparison, after a warning if one device alone is faster."""
    if found is not None and found.loses:
        warnings.warn(
            f"this step is predicted to take {seconds_text(found.step)} with {found.chosen} microbatches, but "
            f"{seconds_text(found.one_device)} on one device that runs the batch at once: small microbatches cost more "
            f"per row than the devices gain together; use larger batches, or one device if the model fits it "
            f"(pipe.pipeline.report.microbatches)",
            stacklevel=2,
        )
    return found
