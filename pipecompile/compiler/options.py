"""The options of ``compile``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any, Literal, get_args

from torch import nn
from torch.distributed.tensor import DTensor

from pipecompile.errors import InputError
from pipecompile.ir.batching_options import DEFAULT_BATCHING, Batching
from pipecompile.ir.cluster import Cluster
from pipecompile.ir.graph import CostedGraph
from pipecompile.ir.plan_options import DEFAULT_PLAN, PlanOptions, Tune
from pipecompile.ops.backends import Backend
from pipecompile.partition import ADAM
from pipecompile.planning.candidates import DEFAULT, Candidates
from pipecompile.planning.training_spec import Workload
from pipecompile.profile import How, optimizer_state, update_cost
from pipecompile.runtime import MakeOptimizer
from pipecompile.schedule import AUTO, SCHEDULES, Schedule
from pipecompile.schedule.own import Own
from pipecompile.schedule.placement import Placement

Outputs = Literal["all", "loss"]
OUTPUTS = get_args(Outputs)
Verify = Literal["first", "never", "every"] | int


@dataclass(frozen=True)
class Options:
    """The arguments of ``compile``, which documents them."""

    asked: str | Own | None = None  # the argument ``schedule``
    found: str = ""  # the schedule that the first capture has chosen, if the argument leaves it open
    microbatches: int = 1
    finds_microbatches: bool = False  # whether the first capture may choose another number
    loss_fn: Callable[..., Any] | None = None
    loss_output: str | None = None
    outputs: Outputs | None = None
    optimizer: MakeOptimizer | None = None
    leaf_modules: tuple[str, ...] = ()
    batching: Batching = DEFAULT_BATCHING
    plan: PlanOptions = DEFAULT_PLAN
    costs: How | CostedGraph | None = None
    cluster: Cluster | None = None
    verify: Verify = "first"
    stage_compile: bool | str | Backend = False
    fully_shard: bool = False
    parts: int = 0  # of the batch, by the mesh's dimension "data"; 0 without it

    def check(self, model: nn.Module, devices: int, processes: int = 0) -> None:
        """Checks that the options are valid, and fit the model and one another.

        Args:
            model: the model.
            devices: the number of devices.
            processes: for devices in processes of their own: the number of them for each device; 0 in one process.

        Raises:
            InputError: an option is not valid or does not fit; the message names the first one.
        """
        if not isinstance(model, nn.Module):
            raise InputError(f"the model is {model!r:.80}, of type {type(model).__name__}; it must be an nn.Module")
        for name, parameter in model.named_parameters():
            if isinstance(parameter, DTensor):
                raise InputError(
                    f"parameter {name!r} is a DTensor, divided over processes by fully_shard() or otherwise, but a "
                    f"pipeline divides the model itself; compile the model before, with fully_shard=True"
                )
        for name, kind in (("batching", Batching), ("plan", PlanOptions)):
            if not isinstance(getattr(self, name), kind):
                raise InputError(
                    f"{name}={getattr(self, name)!r:.80}; it must be pipecompile.{kind.__name__}(...), which takes "
                    f"{', '.join(f'{field}=' for field in kind.__dataclass_fields__)}"
                )
        if not isinstance(self.microbatches, int) or self.microbatches < 1:
            raise InputError(
                f"microbatches={self.microbatches!r}; it must be the number of parts of each batch, at least 1"
            )
        if self.outputs not in (None, *OUTPUTS):
            raise InputError(
                f"outputs={self.outputs!r} is not known; it must be 'all', or 'loss' to return nothing but the loss"
            )
        counted = isinstance(self.verify, int) and not isinstance(self.verify, bool) and self.verify > 0
        if not counted and self.verify not in ("first", "never", "every"):
            raise InputError(
                f"verify={self.verify!r} is not known; it must be 'first', 'never', 'every', or n for every nth call"
            )
        self._check_schedule()
        self._check_names(model)
        self._check_replicas(devices)
        if self.fully_shard not in (False, True) or (self.fully_shard and not self.parts):
            raise InputError(
                f"fully_shard={self.fully_shard!r}; it must be True or False, and True needs mesh= with the dimension "
                f"'data', over which parameters are divided: "
                f"init_device_mesh('cpu', (2, 4), mesh_dim_names=('data', 'stage'))"
            )
        if processes:
            self._check_processes(processes > 1)

    @cached_property
    def policy(self) -> Schedule:
        """What the registry has of the schedule that runs; of candidates, until one is chosen, the preferred one."""
        if isinstance(self.schedule, Own):
            return self.schedule.schedule
        return SCHEDULES[self.schedule if self.candidates is None else self.candidates.prefers]

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled: the fields. The rest follows from them, and has functions that cannot be pickled."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def schedule(self) -> str | Own:
        """The schedule that runs; "auto" until another is chosen."""
        return self.found or (DEFAULT.prefers if self.asked is None else self.asked)

    @property
    def candidates(self) -> Candidates | None:
        """The schedules among which the first capture chooses; None if it has, or if the user names one."""
        return None if self.found else Candidates.of(self.asked)

    @property
    def is_auto(self) -> bool:
        """Whether the candidates have plans of their own, with the stages on each rank and the microbatches of each."""
        return self.candidates is not None and not self.candidates.one_plan

    def with_found(self, schedule: str) -> Options:
        """The options after a first capture, with the schedule that it has chosen, or ""."""
        return replace(self, found=schedule) if schedule and self.candidates is not None else self

    @property
    def placement(self) -> Placement:
        """Where the stages are that the schedule asks for."""
        return self.policy.placed(self.plan.stages_per_rank, self._name)

    @property
    def _name(self) -> str:
        return repr(self.schedule) if isinstance(self.schedule, str) else str(self.schedule)

    @property
    def tuning(self) -> Tune:
        """Which measured times of stages correct the first plan."""
        return self.plan.tune or ("rehearse" if self.policy.is_asynchronous else "train")

    @cached_property
    def work(self) -> Workload:
        """The workload to plan for."""
        given = self.plan.optimizer_state
        state: float | Callable[[], float] = ADAM if given is None else given
        if given is None and self.optimizer is not None:
            state = cache(partial(optimizer_state, self.optimizer))
        if self.fully_shard and self.parts > 1:  # beside what a call gathers, rows of the parameters and of the state
            whole, parts = state, self.parts
            state = cache(lambda: ((whole() if callable(whole) else whole) + 1) / parts)
        asynchronous = self.policy.is_asynchronous
        return Workload(
            schedule=self.policy.steady,
            microbatches=self.microbatches,
            optimizer_state=state,
            recompute=self.plan.recompute,
            offload=self.plan.offload,
            asynchronous=asynchronous,
            placement=self.placement,
            update=None if self.optimizer is None else cache(partial(update_cost, self.optimizer)),
            splits=self.stage_compile is False,
        )

    def _check_processes(self, several_parts: bool) -> None:
        if several_parts and self.policy.is_asynchronous:
            raise InputError(
                f"schedule={self._name} does not work with the mesh's dimension 'data', because stages step "
                f"inside the pipeline, on their own part of the batch; use another schedule, or a mesh of 'stage' only"
            )
        if self.plan.replicas is not None:
            raise InputError(
                f"replicas={self.plan.replicas!r} does not work with mesh=, where each stage has one process; leave it "
                f"out, or use devices= instead of mesh="
            )
        if self.verify not in ("first", "never"):
            raise InputError(
                f"verify={self.verify!r} does not work with mesh=, because no process has the unsplit model after the "
                f"first call; use verify='first' or 'never'"
            )

    def _check_replicas(self, devices: int) -> None:
        counts = self.plan.counts
        if self.policy.is_asynchronous and (self.plan.replicas == "auto" or any(count > 1 for count in counts)):
            raise InputError(
                f"replicas={self.plan.replicas!r} does not work with schedule={self._name}, which steps inside "
                f"the pipeline, because gradients of replicas are summed after it; use schedule='1f1b' or 'gpipe'"
            )
        plain = self.placement.is_plain and self.policy.takes_replicas and not self.is_auto
        if not plain and (self.plan.replicas == "auto" or any(count > 1 for count in counts)):
            raise InputError(
                f"replicas={self.plan.replicas!r} does not work with schedule={self._name}, whose order is for "
                f"one device per stage; use schedule='1f1b' or 'gpipe', or mesh= with the dimension 'data', which "
                f"repeats the whole pipeline for parts of the batch"
            )
        if self.plan.max_stages is not None and not self.placement.is_plain:
            raise InputError(
                f"max_stages={self.plan.max_stages} does not work with {self.placement} (schedule={self._name}), which "
                f"must all be there; leave it out, or use a schedule with one stage on each rank"
            )
        if counts and sum(counts) != devices:
            raise InputError(
                f"replicas={counts} is for {sum(counts)} devices, but devices= has {devices}; they must match"
            )

    def _check_schedule(self) -> None:
        if isinstance(self.schedule, str) and self.schedule not in (*SCHEDULES, AUTO):
            raise InputError(
                f"schedule={self.schedule!r} is not known; it must be one of {', '.join(map(repr, SCHEDULES))}, "
                f"'{AUTO}', a grid of text such as '0: F0 F1 B0 B1', an Order, or a function that returns one"
            )
        if self.policy.is_asynchronous and self.plan.tune == "train":
            raise InputError(
                f"tune='train' does not work with schedule={self._name}, which steps inside the pipeline, so that "
                f"its optimizers cannot move; use tune='rehearse', or schedule='1f1b' or 'gpipe'"
            )
        if self.optimizer is not None and not callable(self.optimizer):
            raise InputError(
                f"optimizer= is a {type(self.optimizer).__name__}; it must be a function that takes parameters and "
                f"returns an optimizer, such as lambda params: torch.optim.SGD(params, lr=0.1)"
            )
        if self.policy.is_asynchronous and self.optimizer is None:
            raise InputError(
                f"schedule={self._name} steps inside the pipeline, so it needs an optimizer; "
                f"pass optimizer=lambda params: torch.optim.SGD(params, lr=0.1)"
            )
        if not self.policy.is_asynchronous and self.optimizer is not None:
            raise InputError(
                f"schedule={self._name} does not step inside the pipeline, so optimizer= would not be used; "
                f"create an optimizer of pipe.parameters(), and call its step()"
            )

    def _check_names(self, model: nn.Module) -> None:
        modules = dict(model.named_modules())
        for path in self.batching.allow_mixing:
            if path not in modules:
                raise InputError(
                    f"allow_mixing has {path!r}, which is not a module of the model; use a path of named_modules()"
                )
        parameters = inspect.signature(model.forward).parameters.values()
        if any(p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in parameters):
            return
        known = [p.name for p in parameters] + (["target"] if self.loss_fn is not None else [])
        for name in self.batching.in_dims:
            if not any(name == argument or name.startswith(f"{argument}_") for argument in known):
                raise InputError(f"in_dims has {name!r}, which is not an argument of the model; it takes {known}")


def read_costs(costs: str | Path | CostedGraph | None) -> How | CostedGraph | None:
    """How to find the costs, or the costs of a saved file.

    Raises:
        InputError: ``costs`` is not known, or the file cannot be read.
    """
    match costs:
        case None | "measure" | "count" | CostedGraph():
            return costs
    if not isinstance(costs, str | Path):
        raise InputError(f"costs={costs!r} is not known; it must be 'measure', 'count', or the path of saved costs")
    try:
        return CostedGraph.load(costs)
    except OSError as error:
        raise InputError(
            f"costs={str(costs)!r} is not a file that can be read ({error.strerror}); it must be 'measure', 'count' or "
            f"the path of saved costs"
        ) from None
    except ValueError as error:
        raise InputError(
            f"costs={str(costs)!r} does not contain costs ({error}); save them with pipe.pipeline.costs.save(path)"
        ) from None
