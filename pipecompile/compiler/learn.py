"""Learning while training: the first steps time the stages, and the cut moves once, if that pays.

    step      1         2   3   4         5                   6   7   8          9
              warm-up   timed   ----> another plan?           timed ---------> worse? then back
                                      the cut moves

A profile does not know what stages do to each other, so their times are known only roughly before they run. Steps tell,
at no cost. When they have, nodes get corrected costs (``planning/calibration.py``) and the plan is made again. If its
slowest stage is predicted to take less than that of the present plan by at least ``PAYS``, stages are cut anew between
two steps. If they are then slower than before, the first cut comes back.

Parameters remain the same objects, and so does what optimizers keep for them. On several devices, parameters and their
gradients move to their new stages, and the state that an optimizer has for them follows at its next step
(``runtime/optimizer_follows.py``). The new stages are verified like those of any capture.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from pipecompile.compiler.batches import Batches
from pipecompile.compiler.compile_call import again, following, recut
from pipecompile.compiler.disk_cache import DiskCache
from pipecompile.compiler.plan_call import is_real
from pipecompile.compiler.recall import keep
from pipecompile.errors import PlanError
from pipecompile.ir.graph import CostedGraph
from pipecompile.ir.instruction import Backward
from pipecompile.ir.timeline import Span, Timeline
from pipecompile.ir.units import plural, seconds_text
from pipecompile.ops.phases import phase
from pipecompile.planning.calibration import Times, corrected
from pipecompile.planning.planned import Planned
from pipecompile.planning.short_stages import all_short
from pipecompile.runtime.compiled import Compiled
from pipecompile.runtime.optimizer_follows import OptimizersFollow
from pipecompile.runtime.session import Session

WARM_UP = 1  # training steps that are not timed: memory is allocated, caches fill
STEPS = 3  # timed ones
PAYS = 0.05  # a cut moves if the busiest rank is predicted to take less by this share of its measured seconds
OBSERVED = "not timed: a profiler or another observer took time of its own in a process"


@dataclass(frozen=True)
class Cut:
    """A plan, and the measured seconds per microbatch of its busiest rank."""

    planned: Planned
    seconds: float


class Learning:
    """What the first training steps of a pipeline tell.

    Args:
        batches: its captures.
        session: what runs them.

    Attributes:
        said: what was learnt, for the report.
        corrected: the costs by what all processes have measured, if they are several.
    """

    def __init__(self, batches: Batches, session: Session) -> None:
        self.batches = batches
        self.session = session
        self.said: list[str] = []
        self.corrected: CostedGraph | None = None
        self.follow = OptimizersFollow()
        self._done = batches.options.tuning != "train"
        self._steps = 0
        self._spans: list[Span] = []
        self._observed = False
        self._seen: object = None  # the last step that was timed
        self._before: Cut | None = None

    def look(self) -> bool:
        """Looks at the last program, before the next call. Returns whether the cut has moved.

        Several processes count the same steps, whatever the next call is in one of them: only programs are counted,
        which all of them have run.
        """
        first = self.batches.first
        if self._done or first is None or not self.session.has_run(first):
            return False
        if not self.session.peers.are_several and not self._may_move(first):
            return False
        if not self._tells(first):
            self._done = True
            return False
        self._count(first)
        if self._steps < WARM_UP + STEPS:
            return False
        if self.session.peers.are_several:
            self._tell(first)
            return False
        times = first.times(Timeline(tuple(self._spans), len(self.session.devices)))
        self._steps, self._spans = 0, []
        return self._decide(first, times)

    def _may_move(self, first: Compiled) -> bool:
        """Whether the next call goes on with a training that nothing observes, since an observer takes time."""
        trains = first.captured.model.training and torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        return trains and not self.session.is_observed

    def _count(self, first: Compiled) -> None:
        """Takes the times of the last step, once."""
        timeline = self.session.step
        if timeline is None or self.session.measured is self._seen or not self._is_whole(first, timeline):
            return
        self._seen = self.session.measured
        self._steps += 1
        self._observed = self._observed or self.session.is_observed
        if self._steps > WARM_UP:
            self._spans += timeline.spans

    def _is_whole(self, first: Compiled, timeline: Timeline) -> bool:
        """Whether the last step ran backwards: in all stages, of which other processes may have some."""
        if not self.session.peers.are_several:
            return bool(first.times(timeline))
        program = self.session.program
        return program is not None and any(isinstance(i, Backward) for row in program.ranks for i in row)

    def _tell(self, first: Compiled) -> None:
        """Says what all processes have measured. Nothing moves, since each has the weights of its own stages alone."""
        peers = self.session.peers
        spans = peers.of_each(None if self._observed else tuple(self._spans))
        self._done, self._spans = True, []  # now that all processes are here
        if None in spans:
            self.said.append(OBSERVED)
            return
        found = (span for each in spans if each is not None for span in each)
        times = first.times(Timeline(tuple(found), len(self.session.devices)))
        if times:
            self.corrected = corrected(first.planned.costed, first.plan, times, "training steps")
            self.said.append(peers.shared(lambda: self._told(first, times)))

    def _told(self, first: Compiled, times: Sequence[Times]) -> str:
        """What the first process says. It keeps a plan that pays, for the next start of the script."""
        slowest = first.plan.pace([it.measured.seconds for it in times])
        took = f"{_took(times)} in {plural(STEPS, 'training step')}"
        found = self._better(first, times, slowest)
        if found is None:
            return f"{took}: no plan found saves {PAYS:.0%}"
        planned, seconds = found
        kept = planned.key and DiskCache.of_user().folder is not None and not keep(planned)
        start = "; the next start of this script takes it" if kept else ""
        return (
            f"{took}: in another cut the slowest stage would take {seconds_text(seconds)}, which saves "
            f"{1 - seconds / slowest:.0%}{start}; pipe.pipeline.replan(optimizer=optimizer) moves to it, and "
            f"PlanOptions(tune='rehearse') finds it before weights are placed"
        )

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A context in which nothing moves, since other tensors are in the place of the parameters."""
        done, self._done = self._done, True
        try:
            yield
        finally:
            self._done = done

    def forget(self) -> None:
        """Ends learning: the plan is now one that the user has asked for."""
        self._done, self._before, self.corrected = True, None, None

    def _tells(self, first: Compiled) -> bool:
        """Whether a step can tell something of a capture's plan."""
        costs = first.planned.stage_costs
        if len(costs) < 2 or all_short(costs):
            return False
        options = self.batches.options
        if self.session.peers.are_several:  # whose models have lost values
            given = isinstance(options.costs, CostedGraph) or options.cluster is not None
            return first.planned.costed.measured and not given
        return is_real(first.captured.model, options)

    def _decide(self, first: Compiled, times: Sequence[Times]) -> bool:
        """Moves the cut, or back, or leaves it. Returns whether it has moved."""
        slowest = first.plan.pace([it.measured.seconds for it in times])
        took = _took(times)
        if self._before is not None:
            self._done = True
            if slowest <= self._before.seconds:
                self.said.append(f"since then, {took}")
                return False
            self.said.append(f"since then, {took}, longer than before: the first cut is back")
            self._adopt(first, self._before.planned)
            return True
        found = self._better(first, times, slowest)
        if found is None:
            self._done = True
            self.said.append(f"in {plural(STEPS, 'training step')}, {took}: no plan found saves {PAYS:.0%}")
            return False
        planned, seconds = found
        moved = sum(a != b for a, b in zip(first.plan.stage_of, planned.plan.stage_of, strict=True))
        self.said.append(
            f"in {plural(STEPS, 'training step')}, {took}: the cut moved over {plural(moved, 'node')}, the slowest "
            f"stage is predicted to take {seconds_text(seconds)}"
        )
        self._before = Cut(replace(first.planned), slowest)  # a copy, so that the weights of its stages are let go
        self._adopt(first, planned)
        return True

    def _better(self, first: Compiled, times: Sequence[Times], slowest: float) -> tuple[Planned, float] | None:
        """A plan that pays, and the predicted seconds of its busiest rank; None if there is none."""
        enough = slowest * (1 - PAYS)
        work = sum(it.measured.seconds for s, it in enumerate(times) if first.plan.replica_of[s] == s)
        if enough < work / len(first.planned.cluster):  # not even if all devices took the same time
            return None
        costed = corrected(first.planned.costed, first.plan, times, "training steps")
        try:
            with phase("plan"):
                planned = again(first.planned, costed, self.batches.options)
        except PlanError:  # a search with other costs may fail
            return None
        seconds = planned.plan.pace([cost.seconds for cost in planned.recosted(costed).run_costs])
        same = replace(planned.plan, quality=None) == replace(first.plan, quality=None)
        return None if same or seconds > enough else (planned, seconds)

    def _adopt(self, first: Compiled, planned: Planned) -> None:
        """Cuts all captures along another plan."""
        batches, options, devices = self.batches, self.batches.options, self.batches.devices
        with self.follow.moving(first.captured.model):
            compiled = recut(first, planned, options, devices)
            batches.move_first(compiled, lambda other: following(other, compiled, options, devices))
        self.session.forget()
        keep(planned)


def _took(times: Sequence[Times]) -> str:
    return f"stages took {', '.join(seconds_text(it.measured.seconds) for it in times)} per microbatch"
