"""The user's options for plans: constraints, and what to minimize."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from pipecompile.errors import InputError
from pipecompile.ir.plan import Plan

Objective = Literal["pace", "overlap"] | Callable[[Plan], float]
Goal = Objective | Literal["step"]
GOALS = ("pace", "overlap", "step")
Recompute = Literal["never", "always", "auto"]
RECOMPUTE = get_args(Recompute)
Offloading = Literal["never", "always", "auto"]
OFFLOAD = get_args(Offloading)
Tune = Literal["train", "rehearse", "never"]
TUNE = get_args(Tune)
SEARCH_SECONDS = 10.0
AT_RUN_TIME = {"at run time": True}  # of an option that means nothing where nothing is run


@dataclass(frozen=True)
class PlanOptions:
    """Constraints on a plan, and what to minimize.

    If a constraint cannot be satisfied, an error says why. A path names a module and all modules inside it:

        PlanOptions(pins={"encoder": 0}, colocate=[["embed", "head"]], replicas=(1, 2, 1))

    The command line shows the descriptions of these arguments too, so they fit both.

    Args:
        pins: the stage, counted from 0, that computes all of a module, by the path of the module.
        no_split: paths of modules that must not be split over several stages.
        colocate: groups of two or more paths of modules that must share a stage.
        max_stages: allow fewer stages than devices, and at most this number of them.
        stages_per_rank: the number of stages that each device runs. By default what the schedule needs: two for the V
            shapes, two or more for interleaved schedules and "bfs", one for all others.
        replicas: the number of data-parallel devices that run each stage, by default one: with 1, 2, 1, the second of
            three stages runs on the second and third of four devices, which take microbatches in turn. "auto" searches
            for the numbers of stages and of devices per stage with the shortest predicted step.
        recompute: whether the backward of a stage recomputes its activations: "never", "always", or "auto", if that
            makes the step shorter within memory or if no plan fits otherwise.
        offload: whether what a stage keeps for its backward is in the host's memory in between, where the order of the
            schedule leaves time for it: "never", "always", or "auto", if the plan does not fit otherwise and that makes
            the step shorter than recomputation. Stages on the CPU never do.
        optimizer_state: bytes that the optimizer keeps per byte of parameters, needed for plans within a memory limit:
            0 for SGD, 1 with momentum, 2 for Adam (the default). In Python it is measured if an optimizer is given.
        objective: what to minimize. "pace": seconds per microbatch of the slowest stage, compute plus communication;
            "overlap": the same with communication overlapped; "step": predicted seconds of a whole step, which differs
            from "pace" if there are few microbatches. In Python also a function of a plan that returns a number, to
            choose among the plans found.
        search_seconds: CPU seconds after which the search returns its best plan.
        tune: which measured times of its stages correct the first plan, if its costs are measured. "train": those of
            the first training steps; where another plan then promises a step shorter by 5%, the cut moves, once.
            "rehearse": those of up to three rehearsals before the first step. "never": none. By default "train", or
            "rehearse" for a schedule that steps inside the pipeline. In several processes, "train" says what another
            cut would save, and nothing moves.

    Raises:
        InputError: a value has the wrong type or is out of range.

    Sources: "pace" and replicas, PipeDream (Narayanan et al., SOSP 2019), section 3.1; recomputation, GPipe (Huang et
    al., NeurIPS 2019), section 2.3; the search, Tarnawski et al., "Efficient Algorithms for Device Placement of DNN
    Graph Operators" (NeurIPS 2020), its dynamic program for throughput, and files of ``partition/solver``.
    """

    pins: Mapping[str, int] = field(default_factory=dict)
    no_split: Sequence[str] = ()
    colocate: Sequence[Sequence[str]] = ()
    max_stages: int | None = None
    stages_per_rank: int | None = None
    replicas: Sequence[int] | Literal["auto"] | None = None
    recompute: Recompute = "auto"
    offload: Offloading = "auto"
    optimizer_state: float | None = None
    objective: Goal = "pace"
    search_seconds: float = SEARCH_SECONDS
    tune: Tune | None = field(default=None, metadata=AT_RUN_TIME)

    def __post_init__(self) -> None:
        if not isinstance(self.pins, Mapping):
            raise InputError(f"pins is {self.pins!r}; it must be a dict from module paths to stages")
        if isinstance(self.colocate, str) or not isinstance(self.colocate, Sequence):
            raise InputError(f"colocate is {self.colocate!r}; it must be a list of groups of module paths")
        object.__setattr__(self, "pins", dict(self.pins))
        object.__setattr__(self, "no_split", _paths("no_split", self.no_split))
        object.__setattr__(self, "colocate", tuple(_paths("a group of colocate", group) for group in self.colocate))
        if self.replicas != "auto" and self.replicas is not None:
            object.__setattr__(self, "replicas", _counts(self.replicas))
        self._check_constraints()
        self._check_search()

    @property
    def counts(self) -> tuple[int, ...]:
        """The number of devices of each stage, if ``replicas`` lists it; otherwise empty."""
        return () if self.replicas is None or isinstance(self.replicas, str) else tuple(self.replicas)

    def without_search(self) -> PlanOptions:
        """Only the constraints, with defaults for the rest."""
        return PlanOptions(
            pins=self.pins,
            no_split=self.no_split,
            colocate=self.colocate,
            max_stages=self.max_stages,
            stages_per_rank=self.stages_per_rank,
        )

    def minimizing(self, objective: Goal) -> PlanOptions:
        """The same with another objective."""
        return replace(self, objective=objective)

    def __str__(self) -> str:
        """The constraints, as quoted in messages."""
        lines = [f"{path!r} in stage {stage}" for path, stage in self.pins.items()]
        lines += [f"{path!r} not split" for path in self.no_split]
        lines += [f"{', '.join(map(repr, group))} in one stage" for group in self.colocate]
        if self.max_stages is not None:
            lines.append(f"at most {self.max_stages} stages")
        return "; ".join(lines) or "no constraints"

    def _check_constraints(self) -> None:
        for path, stage in self.pins.items():
            if not _is_whole(stage, least=0):
                raise InputError(f"pins[{path!r}] = {stage!r}; it must be a stage number, counted from 0")
        for group in self.colocate:
            if len(group) < 2:
                raise InputError(f"colocate has the group {group!r}; a group must have at least two modules")
        if self.max_stages is not None and not _is_whole(self.max_stages):
            raise InputError(f"max_stages={self.max_stages!r}; it must be a number of stages, at least 1")
        if self.stages_per_rank is not None and not _is_whole(self.stages_per_rank):
            raise InputError(f"stages_per_rank={self.stages_per_rank!r}; it must be a number of stages, at least 1")

    def _check_search(self) -> None:
        if self.recompute not in RECOMPUTE:
            raise InputError(f"recompute={self.recompute!r} is not known; it must be one of {_listed(RECOMPUTE)}")
        if self.offload not in OFFLOAD:
            raise InputError(f"offload={self.offload!r} is not known; it must be one of {_listed(OFFLOAD)}")
        if self.offload == "always" and self.recompute == "always":
            raise InputError(
                "offload='always' and recompute='always' exclude each other: what is recomputed is not kept, so there "
                "is nothing to offload; leave one of them out"
            )
        if not callable(self.objective) and self.objective not in GOALS:
            raise InputError(
                f"objective={self.objective!r} is not known; it must be one of {_listed(GOALS)}, or a function of "
                f"a plan"
            )
        if not _is_number(self.search_seconds) or not self.search_seconds > 0:
            raise InputError(f"search_seconds={self.search_seconds!r}; it must be a positive number of CPU seconds")
        if self.tune not in (None, *TUNE):
            raise InputError(f"tune={self.tune!r} is not known; it must be one of {_listed(TUNE)}")
        state = self.optimizer_state
        if state is not None and (not _is_number(state) or not 0 <= state < float("inf")):
            raise InputError(
                f"optimizer_state={state!r}; it must be the bytes that the optimizer keeps per byte of parameters"
            )


def _paths(name: str, paths: Sequence[Any]) -> tuple[str, ...]:
    if isinstance(paths, str) or not isinstance(paths, Sequence) or not all(isinstance(path, str) for path in paths):
        raise InputError(f"{name} is {paths!r}; it must be a list of module paths")
    return tuple(paths)


def _counts(replicas: Any) -> tuple[int, ...]:
    if isinstance(replicas, str) or not isinstance(replicas, Sequence):
        raise InputError(f"replicas={replicas!r} is not known; it must be 'auto', or a list with a number per stage")
    if not all(map(_is_whole, replicas)):
        raise InputError(f"replicas={list(replicas)}; it must list the number of devices of each stage, at least 1")
    return tuple(replicas)


def _is_whole(value: Any, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names))


DEFAULT_PLAN = PlanOptions()
