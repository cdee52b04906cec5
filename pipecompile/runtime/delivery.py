"""Connects a pipeline to autograd: a backward function of ours maps gradients of outputs to gradients of leaves.

It runs in the thread that calls ``backward()``, never in a thread of autograd's own: the ranks' backwards need those,
so that waiting for the ranks in one of them would never end. Autograd runs a node in the thread of its device, or, on
the CPU, in the calling thread. So a connection is three kinds of nodes, joined by empty tensors:

    outputs of each device -> the function, on the CPU -> leaves of each device

As autograd does with any node, the function runs on the streams that were current at the call.

A second backward needs ``retain_graph=True``; without it, ``ctx.saved_tensors`` raises torch's own error. Only leaves
that can get a gradient should be passed, since torch calls the hooks of the others with None.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pipecompile.errors import ExecutionError
from pipecompile.ops.accelerators import accelerators
from pipecompile.ops.torch_internals import _get_current_graph_task_keep_graph, is_legacy_batchedtensor

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
    devices = accelerators(tensor.device for tensor in (*outputs, *saved, *leaves))
    box = _Box(backward, len(outputs), [torch.accelerator.current_stream(device) for device in devices])
    tokens = [_Leaves.apply(box, here, *(leaves[i] for i in here)) for here in _by_device(leaves)]  # type: ignore[no-untyped-call]
    token = _Function.apply(box, len(saved), *saved, *tokens)  # type: ignore[no-untyped-call]
    given: list[Tensor] = list(outputs)
    for here in _by_device(outputs):
        found = _Outputs.apply(box, here, token, *(outputs[i] for i in here))  # type: ignore[no-untyped-call]
        for index, output in zip(here, found, strict=True):
            given[index] = output
    return tuple(given)


def _by_device(tensors: Sequence[Tensor]) -> list[list[int]]:
    """The positions of the tensors on each device."""
    found: dict[torch.device, list[int]] = {}
    for index, tensor in enumerate(tensors):
        found.setdefault(tensor.device, []).append(index)
    return list(found.values())


@dataclass
class _Box:
    """What the nodes of one connection share.

    Attributes:
        streams: the caller's streams at the call.
        incoming: gradients of outputs that have arrived, by position.
        outgoing: gradients of leaves.
    """

    backward: Backward
    count: int
    streams: Sequence[torch.Stream]
    incoming: dict[int, Tensor | None] = field(default_factory=dict)
    outgoing: list[Tensor | None] = field(default_factory=list)

    def take(self, leaf: int) -> Tensor | None:
        """The gradient of a leaf, which autograd may keep as it is if nobody else holds it."""
        gradient, self.outgoing[leaf] = self.outgoing[leaf], None
        return gradient

    def run(self, saved: Saved) -> None:
        incoming, self.incoming = self.incoming, {}
        with ExitStack() as stack:
            for stream in self.streams:
                stack.enter_context(stream)
            self.outgoing = [*self.backward(saved, [incoming.get(index) for index in range(self.count)])]


class _Leaves(torch.autograd.Function):
    """``apply(box, positions, *leaves)``: an empty tensor on the device of the leaves."""

    @staticmethod
    def forward(ctx: Any, box: _Box, positions: Sequence[int], *leaves: Tensor) -> Tensor:
        ctx.box, ctx.positions = box, positions
        return torch.empty(0, device=leaves[0].device)

    @staticmethod
    def backward(ctx: Any, token: Tensor) -> Any:
        return (None, None, *map(ctx.box.take, ctx.positions))


class _Function(torch.autograd.Function):
    """``apply(box, count, *saved, *tokens)``: an empty tensor on the CPU."""

    @staticmethod
    def forward(ctx: Any, box: _Box, count: int, *tensors: Tensor) -> Tensor:
        ctx.box, ctx.devices = box, [None] * count + [token.device for token in tensors[count:]]
        ctx.save_for_backward(*tensors[:count])
        return torch.empty(0)

    @staticmethod
    def backward(ctx: Any, token: Tensor) -> Any:
        refuse_create_graph()
        ctx.box.run(Saved(ctx.saved_tensors, _get_current_graph_task_keep_graph()))
        return (None, None, *(None if device is None else torch.empty(0, device=device) for device in ctx.devices))


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
        refuse_several_at_once(incoming)
        ctx.box.incoming.update(zip(ctx.positions, incoming, strict=True))
        return (None, None, torch.empty(0), *(None,) * len(incoming))


def refuse_create_graph() -> None:
    """Raises ``ExecutionError`` in a backward with ``create_graph=True``."""
    if torch.is_grad_enabled():
        raise ExecutionError(
            "create_graph=True asks for gradients of gradients, but a pipeline's backward cannot be differentiated; "
            "compute them with the unsplit model, pipe.pipeline.model"
        )


def refuse_several_at_once(incoming: Gradients) -> None:
    """Raises ``ExecutionError`` in a backward of several gradients at once."""
    if any(gradient is not None and is_legacy_batchedtensor(gradient) for gradient in incoming):
        raise ExecutionError(
            "is_grads_batched=True (vectorize=True) runs a backward for several gradients at once in one thread, but "
            "the stages of a pipeline run in threads of their own; run one backward for each gradient"
        )
