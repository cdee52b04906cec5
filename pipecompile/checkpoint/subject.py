"""What is saved and loaded: a plain model, or a pipe, of which this process may have a part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from pipecompile.capture.state.model_state import named_tensors
from pipecompile.checkpoint.company import ALONE, Company
from pipecompile.distributed.processes import Processes
from pipecompile.distributed.share import Share
from pipecompile.errors import InputError
from pipecompile.ops.away import is_away
from pipecompile.pipeline import Pipeline


@dataclass(frozen=True)
class Subject:
    """A model and its pipeline, if it has one.

    Attributes:
        model: the unsplit one.
    """

    model: nn.Module
    pipeline: Pipeline | None

    @staticmethod
    def of(model: Any) -> Subject:
        """
        Raises:
            InputError: it is not a module.
        """
        if not isinstance(model, nn.Module):
            raise InputError(f"a {type(model).__name__} is not a model; pass the pipe, or a torch.nn.Module")
        pipeline = getattr(model, "pipeline", None)
        return Subject(pipeline.model, pipeline) if isinstance(pipeline, Pipeline) else Subject(model, None)

    @property
    def share(self) -> Share | None:
        return None if self.pipeline is None else self.pipeline.share

    @property
    def processes(self) -> Processes | None:
        return None if self.share is None else self.share.processes

    @property
    def company(self) -> Company:
        """The processes of the pipeline, whose collectives the calling thread starts."""
        processes = self.processes
        return ALONE if processes is None else Company(processes.place, len(processes.all), processes.all.gathered)

    @property
    def company_beside(self) -> Company:
        """The same processes, for a job of their background."""
        processes = self.processes
        if processes is None:
            return ALONE
        return Company(processes.place, len(processes.all), processes.background.gathered)

    def agree(self, what: str) -> None:
        """Makes sure that all processes are about to do the same."""
        if self.processes is not None:
            self.processes.agree(what)

    @cached_property
    def tensors(self) -> Mapping[str, Tensor]:
        """Parameters and persistent buffers, each once, under its first name.

        Raises:
            InputError: one of them, or the state of a module, cannot be kept as a plain tensor.
        """
        found: dict[int, tuple[str, Tensor]] = {}
        for path, module in self.model.named_modules():
            if type(module).get_extra_state is not nn.Module.get_extra_state:
                raise InputError(
                    f"module {path!r} has a state that is not a tensor (get_extra_state), which checkpoints do not "
                    f"keep; make it a buffer, or use torch.save for this model"
                )
            transient = module._non_persistent_buffers_set
            buffers = {name: t for name, t in module._buffers.items() if name not in transient}
            for name, tensor in (*module._parameters.items(), *buffers.items()):
                if tensor is not None:
                    label = f"{path}.{name}" if path else name
                    found.setdefault(id(tensor), (label, self._home(_plain(label, tensor))))
        return dict(found.values())

    @cached_property
    def present(self) -> Mapping[str, Tensor]:
        """Those of ``tensors`` that have memory in this process.

        Raises:
            InputError: some have none, but the model is not a pipe, which would say in which process they are.
        """
        away = [name for name, tensor in self.tensors.items() if is_away(tensor)]
        if away and self.share is None:
            raise InputError(
                f"{away[0]!r} (one of {len(away)} parameters) is in another process; pass the pipe itself, not "
                f"its model or a module around it"
            )
        return {name: tensor for name, tensor in self.tensors.items() if not is_away(tensor)}

    @cached_property
    def written(self) -> Mapping[str, Tensor]:
        """Those of ``tensors`` that this process writes: each is written by one of the processes.

        Raises:
            InputError: the model has not been split over the processes.
        """
        if self.share is None:
            return self.present
        first = self.share.has_first()
        homes = {id(self._home(tensor)) for _, tensor in named_tensors(self.model) if id(tensor) in first}
        return {name: tensor for name, tensor in self.present.items() if id(tensor) in homes}

    def whole_written(self) -> Mapping[str, Tensor]:
        """The same, but whole tensors alone, of which each is written by one process of the first part of the batch.

        All processes must call it.
        """
        wholes = self.written if self.share is None else self.share.wholes(self.written)
        return {} if self.share is not None and self.share.part else wholes

    def _home(self, tensor: Tensor) -> Tensor:
        """What this process has of a tensor of the model: all of it, or rows."""
        return tensor if self.share is None else self.share.home(tensor)

    @property
    def steps_inside(self) -> bool:
        """Whether the stages step optimizers of their own."""
        return self.pipeline is not None and self.pipeline.options.policy.is_asynchronous

    def optimizers(self, given: torch.optim.Optimizer | None) -> tuple[torch.optim.Optimizer, ...]:
        """The given one, or those of the stages, for a schedule that steps inside the pipeline.

        Raises:
            InputError: one is given although the stages have theirs; or it is no optimizer.
        """
        if self.pipeline is not None and self.steps_inside:
            if given is not None:
                raise InputError(
                    f"the stages of schedule={self.pipeline.schedule!r} have optimizers of their own, which are saved "
                    f"and loaded with the pipe; leave out optimizer="
                )
            return self.pipeline.optimizers
        if given is not None and not isinstance(given, torch.optim.Optimizer):
            raise InputError(f"optimizer= is a {type(given).__name__}; pass the torch.optim.Optimizer itself")
        return () if given is None else (given,)

    def refuse_in_flight(self, done: str) -> None:
        """Raises ``InputError`` if updates of an asynchronous schedule are still to come."""
        if self.pipeline is not None and self.pipeline.is_in_flight:
            raise InputError(
                f"the pipeline cannot be {done} while microbatches are in flight, whose updates would be lost; call "
                f"pipe.pipeline.flush() first"
            )


def _plain(name: str, tensor: Tensor) -> Tensor:
    if tensor.is_meta and not is_away(tensor):
        raise InputError(f"{name!r} is on the meta device and has no values; create the model on a real device")
    if tensor.layout != torch.strided or type(tensor) not in (Tensor, nn.Parameter, nn.Buffer):
        kind = type(tensor).__name__ if tensor.layout == torch.strided else str(tensor.layout)
        raise InputError(
            f"{name!r} is a {kind}, of which checkpoints keep no parts; use torch.distributed.checkpoint for this model"
        )
    return tensor
