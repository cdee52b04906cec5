"""What the user has said about a model at ``compile``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any, Literal, get_args

from torch import nn

from pipecompile.errors import InputError
from pipecompile.ir.cluster import Cluster
from pipecompile.ir.constraints import NO_WISHES, Wishes
from pipecompile.ir.graph import CostedGraph
from pipecompile.partition import ADAM
from pipecompile.planning.search_spec import BUDGET, GOALS, Goal
from pipecompile.planning.training_spec import RECOMPUTE, Recompute, Workload
from pipecompile.profile import How, optimizer_state
from pipecompile.runtime import MakeOptimizer
from pipecompile.schedule import ASYNCHRONOUS, SCHEDULES, steady

BatchNorm = Literal["microbatch", "deferred"]
Verify = Literal["first", "never", "every"] | int


@dataclass(frozen=True)
class Options:
    """See ``api.compile``, whose arguments these are."""

    schedule: str = "1f1b"
    microbatches: int = 1
    loss_fn: Callable[..., Any] | None = None
    loss: str | None = None
    optimizer: MakeOptimizer | None = None
    leaf_modules: tuple[str, ...] = ()
    allow_microbatch: tuple[str, ...] = ()
    in_dims: Mapping[str, int | None] = field(default_factory=dict)
    out_dims: Mapping[str, int | None] = field(default_factory=dict)
    batch_norm: BatchNorm = "microbatch"
    profile: How | CostedGraph | None = None
    cluster: Cluster | None = None
    recompute: Recompute = "auto"
    optimizer_state: float | None = None
    replicas: tuple[int, ...] | Literal["auto"] = ()
    wishes: Wishes = NO_WISHES
    budget: float = BUDGET
    objective: Goal = "pace"
    verify: Verify = "first"

    def check(self, model: nn.Module) -> None:
        """Raises ``InputError`` at the first option that is not known, or does not go with the model or another."""
        if not isinstance(model, nn.Module):
            raise InputError(f"the model must be an nn.Module, got {type(model).__name__}: {model!r:.80}")
        if self.recompute not in RECOMPUTE:
            raise InputError(f"recompute={self.recompute!r} is not known; there are {', '.join(RECOMPUTE)}")
        if self.batch_norm not in get_args(BatchNorm):
            known = " and ".join(map(repr, get_args(BatchNorm)))
            raise InputError(f"batch_norm={self.batch_norm!r} is not known; there are {known}")
        if not isinstance(self.microbatches, int) or self.microbatches < 1:
            raise InputError(
                f"microbatches={self.microbatches!r}: a batch is cut into a whole number of parts, at least one"
            )
        if isinstance(self.budget, bool) or not isinstance(self.budget, int | float) or not self.budget > 0:
            raise InputError(f"budget={self.budget!r}: a search for a plan takes some CPU seconds")
        if not callable(self.objective) and self.objective not in GOALS:
            known = ", ".join(map(repr, GOALS))
            raise InputError(f"objective={self.objective!r} is not known; there are {known} and functions of a plan")
        counted = isinstance(self.verify, int) and not isinstance(self.verify, bool) and self.verify > 0
        if not counted and self.verify not in ("first", "never", "every"):
            raise InputError(
                f"verify={self.verify!r} is not known; there are 'first', 'never', 'every', and a number n for each nth"
            )
        self._check_schedule()
        self._check_names(model)

    def check_replicas(self, devices: int) -> None:
        """Raises ``InputError`` if the replicas of stages cannot be, on so many devices."""
        counts = self.replicas
        if isinstance(counts, str) and counts != "auto":
            raise InputError(f"replicas={counts!r} is not known; there are 'auto' and a list with a number a stage")
        if self.schedule in ASYNCHRONOUS and (counts == "auto" or any(count > 1 for count in counts)):
            raise InputError(
                f"replicas={counts if counts == 'auto' else list(counts)!r} does not go with "
                f"schedule={self.schedule!r}, which updates after each microbatch, while the gradients of replicas are "
                f"summed once a batch; use the schedule '1f1b' or 'gpipe'"
            )
        if counts == "auto":
            return
        if not all(isinstance(count, int) and not isinstance(count, bool) and count > 0 for count in counts):
            raise InputError(
                f"replicas={list(counts)} must hold for each stage the number of devices that run it, at least one"
            )
        if counts and sum(counts) != devices:
            raise InputError(
                f"replicas={list(counts)} takes {sum(counts)} devices for {len(counts)} stages, and devices= has "
                f"{devices}"
            )

    @cached_property
    def work(self) -> Workload:
        """What planning must know of the training."""
        state: float | Callable[[], float] = ADAM if self.optimizer_state is None else self.optimizer_state
        if self.optimizer_state is None and self.optimizer is not None:
            state = cache(partial(optimizer_state, self.optimizer))
        return Workload(SCHEDULES.get(self.schedule, steady), self.microbatches, state, self.recompute)

    def _check_schedule(self) -> None:
        names = [*SCHEDULES, *ASYNCHRONOUS]
        if self.schedule not in names:
            raise InputError(f"schedule={self.schedule!r} is not known; there are {', '.join(names)}")
        if self.optimizer is not None and not callable(self.optimizer):
            raise InputError(
                f"optimizer= takes a function from parameters to an optimizer, such as "
                f"lambda params: torch.optim.SGD(params, lr=0.1), not a {type(self.optimizer).__name__}"
            )
        if self.schedule in ASYNCHRONOUS and self.optimizer is None:
            raise InputError(
                f"schedule={self.schedule!r} steps inside the pipeline; "
                f"pass optimizer=lambda params: torch.optim.SGD(params, lr=0.1)"
            )
        if self.schedule not in ASYNCHRONOUS and self.optimizer is not None:
            raise InputError(
                f"schedule={self.schedule!r} leaves stepping to you: make an optimizer of pipe.parameters() instead"
            )

    def _check_names(self, model: nn.Module) -> None:
        modules = dict(model.named_modules())
        for path in self.allow_microbatch:
            if path not in modules:
                raise InputError(f"allow_microbatch= names {path!r}, which is no module of the model")
        for name, dims in (("in_dims", self.in_dims), ("out_dims", self.out_dims)):
            for key, dim in dims.items():
                if dim is not None and (not isinstance(dim, int) or isinstance(dim, bool)):
                    raise InputError(f"{name}= has {dim!r} for {key!r}; a dimension is a number, None is no batch")
        parameters = inspect.signature(model.forward).parameters.values()
        if any(p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in parameters):
            return
        known = [p.name for p in parameters] + ["target"] * (self.loss_fn is not None)
        for name in self.in_dims:
            if not any(name == argument or name.startswith(f"{argument}_") for argument in known):
                raise InputError(f"in_dims= names {name!r}, which is no argument of the model; it has {known}")


def read_costs(profile: str | Path | CostedGraph | None) -> How | CostedGraph | None:
    """How to find the costs, or those that a file holds."""
    match profile:
        case None | "measure" | "count" | CostedGraph():
            return profile
    if not isinstance(profile, str | Path):
        raise InputError(f"profile={profile!r} is not known; there are 'measure', 'count' and the path of a profile")
    try:
        return CostedGraph.load(profile)
    except OSError as error:
        raise InputError(
            f"profile={str(profile)!r} is neither 'measure' nor 'count', nor a file that can be read: {error.strerror}"
        ) from None
    except ValueError as error:
        raise InputError(f"profile={str(profile)!r} holds no profile: {error}") from None
