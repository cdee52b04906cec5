"""What one process has of a pipeline's model.

Until the first call has been compared with the unsplit model, every process has the whole model, the same in all of
them. Then each keeps its share, by the plan of the first capture.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Iterator, MutableMapping
from functools import partial
from itertools import islice
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from pipecompile.capture import Call
from pipecompile.capture.state.model_state import named_tensors
from pipecompile.distributed.clip_grad_norm import clip_grad_norm_
from pipecompile.distributed.ownership import foreign_buffers, held, owned, refuse_missing
from pipecompile.distributed.processes import Processes
from pipecompile.errors import InputError
from pipecompile.ops.away import lacks_values, send_away
from pipecompile.runtime.compiled import Compiled

NORMS = {inspect.unwrap(f).__code__ for f in (torch.nn.utils.clip_grad_norm_, torch.nn.utils.get_total_norm)}
DEPTH = 6  # frames between the function that computes a norm and the parameters that it asks for


class Share:
    """The share of one process.

    Attributes:
        captures: of the pipeline; the first one decides.
        is_settled: whether the rest has been sent away.
    """

    def __init__(self, model: nn.Module, processes: Processes) -> None:
        self.model = model
        self.processes = processes
        self.captures: list[Compiled] = []
        self.is_settled = False
        self._warned = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Share:
        """A copy of the model has the hooks of ``settle``, which find none of its tensors."""
        return self

    def check_call(self, call: Call) -> None:
        """Raises ``InputError`` if a call wants what processes do not exchange."""
        for name, tensor in call.tensors.items():
            if tensor.requires_grad:
                raise InputError(
                    f"argument {name!r} requires a gradient, which several processes do not compute for inputs: each "
                    f"would have the part of its own stage; pass {name}.detach(), or use devices= instead of mesh="
                )

    def check_weights(self) -> None:
        """Raises ``InputError`` in all processes if they have built different models."""
        if not self.captures and not lacks_values(self.model):
            self.processes.same_tensors(dict(named_tensors(self.model)))

    def add(self, compiled: Compiled) -> None:
        """Takes note of a capture.

        Raises:
            CaptureError: it needs a parameter where the first one does not.
        """
        if self.captures:
            refuse_missing(self.captures[0], compiled)
        self.captures.append(compiled)

    def settle(self) -> None:
        """Sends away what this process does not need. State dicts leave out what another process has, from now on."""
        if self.is_settled:
            return
        kept = self.held
        tensors = named_tensors(self.model)
        send_away(t for name, t in tensors if name not in kept and isinstance(t, nn.Parameter) and not t.is_meta)
        for module in self.model.modules():
            module.register_state_dict_post_hook(partial(self._leave_out))  # type: ignore[no-untyped-call]
        self.is_settled = True

    @property
    def held(self) -> frozenset[str]:
        """The names of the parameters and buffers that this process has, once the first call has been captured."""
        return held(self.captures[0], self.processes.rank)

    @property
    def owned(self) -> frozenset[str]:
        """The names of the parameters that this process trains.

        Raises:
            InputError: the model has not been split.
        """
        if not self.captures:
            raise InputError(
                "the parameters of each process are not known before the model is split; pass example_inputs= to "
                "compile(), or call the pipeline first"
            )
        return owned(self.captures[0], self.processes.rank)

    def parameters(self, every: Iterator[tuple[str, nn.Parameter]], prefix: str) -> Iterator[tuple[str, nn.Parameter]]:
        """Of the named parameters of the model, those that this process trains.

        Args:
            every: with ``prefix`` before their names.
        """
        mine, start = self.owned, f"{prefix}." if prefix else ""
        self._warn_of_norms()
        return ((name, parameter) for name, parameter in every if name.removeprefix(start) in mine)

    def clip_grad_norm_(self, max_norm: float, norm_type: float) -> Tensor:
        """As ``Pipeline.clip_grad_norm_``."""
        if not self.captures:
            raise InputError(
                "the pipeline has made no call, so it has no gradients to clip; call it and backward() first"
            )
        return clip_grad_norm_(self.captures[0], self.processes, max_norm, norm_type)

    def _leave_out(self, module: nn.Module, state: MutableMapping[str, Any], prefix: str, _: Any) -> None:
        """A hook of each module: its tensors of which another process has the present values."""
        foreign = self._foreign
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if id(tensor) in foreign:
                state.pop(f"{prefix}{name}", None)

    @property
    def _foreign(self) -> set[int]:
        """The tensors of which another process has the present values, by ``id``."""
        mine, rank = self.owned, self.processes.rank
        buffers = frozenset().union(*(foreign_buffers(compiled, rank) for compiled in self.captures))
        parameters = set(map(id, self.model.parameters()))
        tensors = named_tensors(self.model)
        return {id(t) for name, t in tensors if name in buffers or (id(t) in parameters and name not in mine)}

    def _warn_of_norms(self) -> None:
        """Warns once if a function of torch's asks for the parameters to compute the norm of all gradients."""
        if not self._warned and any(frame.f_code in NORMS for frame in islice(_frames(), DEPTH)):
            self._warned = True
            warnings.warn(
                "torch's clip_grad_norm_ sees the gradients of this process only, so each process would clip by "
                "another norm; use pipe.pipeline.clip_grad_norm_, which takes that of the whole model",
                stacklevel=2,
            )


def _frames() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back
