"""What the user has said about a model at ``compile``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from torch import nn

from pipecompile.errors import InputError
from pipecompile.profile import How
from pipecompile.runtime import MakeOptimizer
from pipecompile.schedule import ASYNCHRONOUS, SCHEDULES

BatchNorm = Literal["microbatch", "deferred"]


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
    profile: How | None = None

    def check(self, model: nn.Module) -> None:
        """Raises ``InputError`` at the first option that is not known, or does not go with the model or another."""
        if not isinstance(model, nn.Module):
            raise InputError(f"the model must be an nn.Module, got {type(model).__name__}: {model!r:.80}")
        if self.profile not in (None, "measure", "count"):
            raise InputError(f"profile={self.profile!r} is not known; there are 'measure' and 'count'")
        if self.batch_norm not in get_args(BatchNorm):
            known = " and ".join(map(repr, get_args(BatchNorm)))
            raise InputError(f"batch_norm={self.batch_norm!r} is not known; there are {known}")
        if not isinstance(self.microbatches, int) or self.microbatches < 1:
            raise InputError(
                f"microbatches={self.microbatches!r}: a batch is cut into a whole number of parts, at least one"
            )
        self._check_schedule()
        self._check_names(model)

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
