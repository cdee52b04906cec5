"""Connects a pipeline to autograd: a backward function of ours maps gradients of outputs to gradients of leaves.

It runs in the thread that calls ``backward()``, never in a thread of autograd's own: the ranks' backwards need those,
so that waiting for the ranks in one of them would never end. Autograd runs a node in the thread of the node's device,
or, on the CPU, in the calling thread. So there is one node for the outputs on each device, which takes in their
gradients, and one node on the CPU for the leaves, joined to the others by a token.

A second backward needs ``retain_graph=True``; without it, ``ctx.saved_tensors`` raises torch's own error. Only leaves
that can get a gradient should be passed, since torch calls the hooks of the others with None.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pipecompile.errors import ExecutionError
from pipecompile.ops.accelerators import accelerators
from pipecompile.ops.torch_internals import _get_current_graph_task_keep_graph

Gradients = Sequence[Tensor | None]
Backward = Callable[["Saved", Gradients], Gradients]  # (saved tensors, gradients of outputs) -> gradients of leaves


@dataclass(frozen=True)
class Saved:
    """Tensors saved for a backward function.

    Attributes:
        kept: whether another backward may read them (``retain_graph=True``); if not, they may be written.
    """

    tensors: Sequence[Tensor]
    kept: bool


def connected(
    outputs: Sequence[Tensor], leaves: Sequence[Tensor], backward: Backward, saved: Sequence[Tensor] = ()
) -> tuple[Tensor, ...]:
    """The outputs, connected to leaves by a backward function.

    Args:
        outputs: those that do not require a gradient are returned without a history.
        saved: tensors for the function, freed when autograd frees its graph.

    Raises:
        ExecutionError: in the backward, with ``create_graph=True``.
    """
    box = _Box(backward, len(outputs), _marks([*outputs, *saved]))
    token = _Leaves.apply(box, len(saved), *saved, *leaves)  # type: ignore[no-untyped-call]
    given: list[Tensor] = list(outputs)
    for device in dict.fromkeys(output.device for output in outputs):
        here = [index for index, output in enumerate(outputs) if output.device == device]
        found = _Outputs.apply(box, here, token, *(outputs[index] for index in here))  # type: ignore[no-untyped-call]
        for index, output in zip(here, found, strict=True):
            given[index] = output
    return tuple(given)


@dataclass
class _Box:
    """What the nodes of one connection share.

    Attributes:
        ready: events after which the outputs and the saved tensors may be read.
        incoming: gradients of outputs that have arrived, by position, and events after which they may be read.
    """

    backward: Backward
    count: int
    ready: Sequence[tuple[torch.device, torch.Event]]
    incoming: dict[int, Tensor | None] = field(default_factory=dict)
    arrived: list[tuple[torch.device, torch.Event]] = field(default_factory=list)

    def take(self) -> list[Tensor | None]:
        """The incoming gradients; the current streams wait for them, and for what the call has left."""
        for device, event in (*self.ready, *self.arrived):
            torch.accelerator.current_stream(device).wait_event(event)
        incoming = [self.incoming.get(index) for index in range(self.count)]
        self.incoming, self.arrived = {}, []
        return incoming


class _Leaves(torch.autograd.Function):
    """``apply(box, count, *saved, *leaves)``: a token on the CPU."""

    @staticmethod
    def forward(ctx: Any, box: _Box, count: int, *tensors: Tensor) -> Tensor:
        ctx.box, ctx.count = box, count
        ctx.save_for_backward(*tensors[:count])
        return torch.zeros(())

    @staticmethod
    def backward(ctx: Any, token: Tensor) -> Any:
        refuse_create_graph()
        saved = Saved(ctx.saved_tensors, _get_current_graph_task_keep_graph())
        return (None, None, *(None,) * ctx.count, *ctx.box.backward(saved, ctx.box.take()))


class _Outputs(torch.autograd.Function):
    """``apply(box, positions, token, *outputs)``: the outputs of one device."""

    @staticmethod
    def forward(ctx: Any, box: _Box, positions: Sequence[int], token: Tensor, *outputs: Tensor) -> Any:
        ctx.box, ctx.positions = box, positions
        ctx.set_materialize_grads(False)
        fresh = tuple(output.detach() for output in outputs)
        ctx.mark_non_differentiable(*(f for f, o in zip(fresh, outputs, strict=True) if not o.requires_grad))
        return fresh

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor | None) -> Any:
        refuse_create_graph()
        ctx.box.incoming.update(zip(ctx.positions, incoming, strict=True))
        ctx.box.arrived += _marks(incoming)
        return (None, None, torch.zeros(()), *(None,) * len(incoming))


def _marks(tensors: Iterable[Tensor | None]) -> list[tuple[torch.device, torch.Event]]:
    devices = accelerators(tensor.device for tensor in tensors if tensor is not None)
    return [(device, torch.accelerator.current_stream(device).record_event()) for device in devices]


def refuse_create_graph() -> None:
    """Raises ``ExecutionError`` in a backward with ``create_graph=True``."""
    if torch.is_grad_enabled():
        raise ExecutionError(
            "create_graph=True asks for gradients of gradients, but a pipeline's backward cannot be differentiated; "
            "compute them with the unsplit model, pipe.pipeline.model"
        )
