"""The runtime state of a pipeline, which lives from one call to the next.

Lanes and weights belong to the pipeline; the executors of its captures share them. A synchronous step leaves no state
behind; an asynchronous step leaves its stream.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from weakref import WeakSet, ref

import torch
from torch import Tensor

from pipecompile.capture.locks import Turn
from pipecompile.errors import ExecutionError, PlanError, ProgramError
from pipecompile.ir.instruction import Forward, Instruction
from pipecompile.ir.program import Program
from pipecompile.ir.timeline import Timeline
from pipecompile.ir.weight_versions import Versions, lags_after, versions
from pipecompile.ops.accelerators import in_autograd_thread
from pipecompile.ops.device_args import threads_each
from pipecompile.planning.planned import Planned
from pipecompile.runtime import Ambient, Executor, Lane, MakeOptimizer, Microbatch, Runner, Weights
from pipecompile.runtime.compiled import Compiled
from pipecompile.runtime.executor import RowRun, timeline_of
from pipecompile.runtime.lane import Callers
from pipecompile.runtime.notes import Notes, failed
from pipecompile.runtime.observers import Observers, hooks_on_saved
from pipecompile.runtime.outputs import Outputs
from pipecompile.runtime.peers import OneProcess, Peers
from pipecompile.runtime.rerun import STOPPED
from pipecompile.schedule import Schedule, carried_after


class Rerun(StrEnum):
    """Why a call is rerun."""

    BESIDE = "an output other than the loss got a gradient; later calls run their backwards when gradients arrive"
    RESCALED = "a loss computed with float16 or custom backwards got a gradient of another scale than the last call's"
    SECOND = "a second backward, with retain_graph=True, after the first had run"


@dataclass
class Stream:
    """The microbatches in flight of an asynchronous schedule between two calls."""

    compiled: Compiled | None = None
    next: int = 0  # the number of the next microbatch
    carried: frozenset[Instruction] = frozenset()
    microbatches: dict[int, Microbatch] = field(default_factory=dict)  # in flight, by number
    policy: Schedule | None = None
    versions: Versions | None = None  # of the weights that microbatches in flight use

    @property
    def lags(self) -> frozenset[tuple[Forward, int]]:
        """The ``lags`` of the next program."""
        return frozenset() if self.versions is None else lags_after(self.versions, self.carried)

    def advance(self, program: Program, entered: int) -> None:
        """Records that a program has run; drops microbatches whose backwards have ended."""
        self.versions = versions(program, self.versions)
        self.carried = carried_after(program)
        self.next += entered
        self.microbatches = {n: m for n, m in self.microbatches.items() if m.saved}


@dataclass(frozen=True, eq=False)
class _Set:
    """The weights and executors of one plan, which live as long as it does."""

    planned: ref[Planned]
    weights: dict[int, Weights]
    executors: dict[tuple[int, bool], Executor]


_SESSIONS: WeakSet[Session] = WeakSet()


def _renew_all() -> None:
    for session in list(_SESSIONS):
        session.renew()


class Session:
    """Runs the programs of one pipeline.

    Args:
        devices: one per rank.
        optimizer: for schedules that step inside the pipeline.
        peers: the processes that run its ranks.
    """

    def __init__(
        self, devices: Sequence[torch.device], optimizer: MakeOptimizer | None, peers: Peers | None = None
    ) -> None:
        self.turn = Turn()  # calls from several threads run one at a time
        self.devices = tuple(devices)
        self.optimizer = optimizer
        self.peers = peers or OneProcess()
        ranks = self.peers.ranks(len(devices))
        threads = threads_each([devices[rank] for rank in ranks])
        self.lanes = {rank: Lane(devices[rank], threads) for rank in ranks}
        self.weights: dict[int, Weights] = {}  # by stage, those of this process; shared by all captures
        self.executors: dict[tuple[int, bool], Executor] = {}  # by ``id`` of the capture, and whether for its stream
        self._sets: dict[int, _Set] = {}  # by ``id`` of what was planned
        self.numbers: dict[int, int] = {}  # of captures in the order of their first calls, by ``id``
        self.stream = Stream()
        self.scale = 1.0  # the last gradient of a loss computed with float16, expected again for the next call
        self.repeated: Counter[Rerun] = Counter()  # how many calls were rerun, and why
        self.observed: Counter[str] = Counter()  # programs that the calling thread ran, by what observed it
        self.is_observed = False  # whether something observed the thread that ran the last program
        self.defers = False  # whether backwards wait for gradients even if the model computes its loss
        self.call = 0  # the number of the last call, the same in all processes
        self.moves = 0  # how often parameters have moved to other processes
        self.callers = Callers([lane.device for lane in self.lanes.values()])
        self.notes = Notes()
        self.program: Program | None = None
        self.measured: Timeline | Mapping[int, RowRun] | None = None  # of that program
        self._earlier: Timeline | Mapping[int, RowRun] | None = None  # of the program before
        self._ran: ref[Compiled] | None = None  # the capture of the last program
        self.running = self.closed = False
        _SESSIONS.add(self)

    def homes(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        """What the caller's optimizer steps for tensors of the model."""
        return [self.peers.home(tensor) for tensor in tensors]

    def agree(self, compiled: Compiled, tensors: Iterable[Tensor]) -> None:
        """Makes sure that all processes are about to run the same capture, in the same modes, on the same tensors.

        Does not wait for the others; ``run`` does.
        """
        if self.peers.are_several:
            number = self.numbers.setdefault(id(compiled), len(self.numbers))
            modes = Ambient.of_caller(frozenset(device.type for device in self.devices))
            self.peers.begin_to_agree(f"a call of capture {number} with {modes}", tensors)
            self.call = self.peers.calls

    def begin(self, compiled: Compiled) -> None:
        """Begins a pass, with every stage on the parameters' present values."""
        self._own(compiled)
        for stage, weights in self.weights.items():
            weights.begin(compiled.tensors(stage), _written(compiled))

    @contextmanager
    def pass_of(self, compiled: Compiled) -> Iterator[None]:
        """A context for a pass that is not of a stream, on the parameters' present values; a stream waits meanwhile."""
        if self.optimizer is None:
            self.begin(compiled)
            yield
            return
        self._own(compiled)
        with ExitStack() as stack:
            for stage, weights in self.weights.items():
                stack.enter_context(weights.aside(compiled.tensors(stage), _written(compiled)))
            yield

    def run(
        self,
        compiled: Compiled,
        program: Program,
        microbatches: Mapping[int, Microbatch],
        streams: bool = False,
        outputs: Outputs | None = None,
    ) -> None:
        """Runs a lowered program in the modes of the calling thread.

        Args:
            outputs: get those that the ranks share, if the program has Shares.
            streams: whether it is a part of the stream. Others run on results of their own, so that a stream that waits
                stays as it is if they fail.

        Raises:
            ExecutionError: the session has been closed, or the call comes from a thread of autograd's own.
            InputError: other processes make another call.
        """
        if self.closed:
            raise ExecutionError("the pipeline has been closed, and its threads have ended; compile the model again")
        if self.callers.devices and torch.is_grad_enabled() and in_autograd_thread():
            raise ExecutionError(
                "the pipeline was called inside a backward on an accelerator, in a thread that its own backwards need, "
                "so it would never return; call it outside the custom function, hook or checkpoint around it "
                "(stages recompute with PlanOptions(recompute='always'))"
            )
        with self.turn.taken():
            self.peers.agreed()
            self._own(compiled)
            ambient = Ambient.of_caller(frozenset(device.type for device in self.devices))
            observers = Observers.here()
            self.is_observed = bool(observers)
            if observers:
                self.observed[str(observers)] += 1
            self.program = program
            self.running = True
            try:
                here = self.is_observed or self._runs_alone
                ran = self._executor(compiled, streams).run(program, microbatches, ambient, here, outputs)
                self._earlier, self.measured, self._ran = self.measured, ran, ref(compiled)
            except BaseException as error:
                self.notes.failed = True
                for weights in self.weights.values() if streams or self.optimizer is None else ():
                    weights.drop_gradients()  # but not those of a stream that waits
                if self.peers.are_several:  # in one process, no name of the error may hold its frames' tensors
                    self._end_all(error)
                raise
            finally:
                self.running = False
                for weights in self.weights.values():
                    weights.release()
                self.peers.ended()

    @property
    def _runs_alone(self) -> bool:
        """Whether the calling thread may be the one that runs this process's only rank.

        A second thread would cost what it takes to wake it, and memory of its own. Accelerators need it: autograd has
        one thread per device, and the caller may be in that. So does a checkpoint around the call, whose hooks on saved
        tensors are not for the stages'.
        """
        return self.peers.are_several and len(self.lanes) == 1 and not self.callers.devices and not hooks_on_saved()

    @contextmanager
    def promised(self) -> Iterator[None]:
        """A context for what the processes have agreed to do. Each waits for the others there, so an error ends all.

        Were it caught, this process would go on with something else, and the others take that for what they wait for.
        Refusals of a schedule follow from the plan alone, so all processes raise them, and none waits.
        """
        try:
            yield
        except (STOPPED, PlanError, ProgramError):
            raise
        except BaseException as error:
            if self.peers.are_several:
                self._end_all(error)
            raise

    def _end_all(self, error: BaseException) -> None:
        """Raises the error with which all processes end, if it is another one."""
        failure = self.peers.failure(error)
        if failure is not error:
            raise failure from error

    @property
    def is_watched(self) -> bool:
        """Whether a dispatch mode of the calling thread is to see backwards where ``backward()`` is called.

        Several processes run one program, whatever observes one of them.
        """
        return not self.peers.are_several and bool(Observers.here().modes)

    @property
    def timeline(self) -> Timeline | None:
        """The measured timeline of the last program. Waits until its work on accelerators has run."""
        if self.measured is not None and not isinstance(self.measured, Timeline):
            with self.watched():
                self.measured = timeline_of(self.measured, len(self.devices))
        return self.measured

    @property
    def programs(self) -> tuple[Timeline, ...]:
        """The measured timelines of the last step: of its program, or of its forwards and of its backwards.

        Empty before the first one. Waits like ``timeline``.
        """
        last, earlier = self.timeline, self._earlier
        if last is None:
            return ()
        if earlier is None or any(isinstance(span.instruction, Forward) for span in last.spans):
            return (last,)
        if not isinstance(earlier, Timeline):
            with self.watched():
                earlier = self._earlier = timeline_of(earlier, len(self.devices))
        return earlier, last

    @property
    def step(self) -> Timeline | None:
        """The measured timeline of the last program, and of the forwards before it if it runs backwards alone.

        The seconds of such a step are not its length, since the caller computes the loss in between. Waits like
        ``timeline``.
        """
        programs = self.programs
        if len(programs) < 2:
            return next(iter(programs), None)
        return Timeline(tuple(span for program in programs for span in program.spans), len(self.devices))

    @property
    def stopped_at(self) -> tuple[Instruction, ...]:
        """The instructions at which devices that have failed have stopped. Does not wait."""
        return tuple(stop.instruction for stop in self.notes.stops(failed(self.lanes.values())))

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Says which instruction had queued a kernel whose error is raised in the calling thread.

        Raises:
            ExecutionError: a kernel has failed.
        """
        try:
            yield
        except torch.AcceleratorError as error:
            if late := self.notes.explained([error], self.lanes.values()):
                raise late from error
            raise

    def optimizers(self, compiled: Compiled) -> tuple[torch.optim.Optimizer, ...]:
        """The optimizers that step inside the pipeline, of the stages of this process."""
        self._own(compiled)
        return tuple(weights.optimizer for weights in self.weights.values() if weights.optimizer is not None)

    def has_run(self, compiled: Compiled) -> bool:
        """Whether the last program was of a capture. A call that is refused runs none, in any process."""
        return self._ran is not None and self._ran() is compiled

    def forget(self) -> None:
        """Drops the stages; the next program brings its own. Those of earlier calls stay while these may need them."""
        self.weights, self.executors, self.numbers = {}, {}, {}
        self.program = self.measured = self._earlier = self._ran = None

    def renew(self) -> None:
        """Gives the copy in a forked process its own threads.

        A program that another thread was running at the fork is dropped, with the microbatches in flight.
        """
        if self.running:
            for each in self._sets.values():
                each.executors.clear()
            self.stream, self.running = Stream(), False
        for lane in self.lanes.values():
            lane.renew()

    def close(self) -> None:
        """Ends the ranks' threads; the session cannot run any more."""
        self.closed = True
        for lane in self.lanes.values():
            lane.thread.end()

    def _own(self, compiled: Compiled) -> None:
        """Takes the weights of the capture's placement, which all captures of one plan share."""
        found = self._set(compiled)
        self.weights, self.executors = found.weights, found.executors

    def weights_of(self, compiled: Compiled) -> Mapping[int, Weights]:
        """The weights of a capture's stages, also if those of another plan are in use by now."""
        return self._set(compiled).weights

    def _set(self, compiled: Compiled) -> _Set:
        found = self._sets.get(id(compiled.planned))
        if found is None or found.planned() is not compiled.planned:
            weights = {
                stage.index: Weights(compiled.tensors(stage.index), stage.device, self.optimizer, self.peers)
                for stage in compiled.stages
                if compiled.plan.rank_of[stage.index] in self.lanes
            }
            found = self._sets[id(compiled.planned)] = _Set(ref(compiled.planned), weights, {})
        if len(self._sets) > 1:  # those of earlier plans, until no call has them any more
            self._sets = {key: each for key, each in self._sets.items() if each.planned() is not None}
        return found

    def _executor(self, compiled: Compiled, streams: bool) -> Executor:
        if (id(compiled), streams) not in self.executors:
            rank_of = compiled.plan.rank_of
            other = self.executors.get((id(compiled), not streams))
            runners = {
                stage: Runner(compiled.stages[stage], weights, self.lanes[rank_of[stage]])
                for stage, weights in self.weights.items()
            }
            transport = self.peers.transport(self.lanes, compiled.plan)
            self.executors[id(compiled), streams] = Executor(
                compiled.plan, other.runners if other else runners, self.lanes, transport, self.callers, self.notes
            )
        return self.executors[id(compiled), streams]


def _written(compiled: Compiled) -> frozenset[str]:
    """Names of tensors that a call writes after its forwards."""
    tail = compiled.division.tail
    return frozenset(tail.writes if tail else ())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_all)
