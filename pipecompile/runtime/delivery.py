"""Connects a pipeline to autograd: one backward returns the gradients that a program has computed or will compute.

``Delivered``: the program has run its forwards and backwards; ``loss.backward()`` returns the gradients, multiplied by
the incoming gradient (so that ``loss / n`` and accumulation work as usual). In float16, gradients overflow or underflow
at some scales, which no later factor can repair: the call is rerun if the incoming gradient has another scale.

``Deferred``: only the forwards have run; incoming gradients start the backwards.

Both follow autograd's rules. ``retain_graph=True`` allows a second backward; without it, ``ctx.saved_tensors`` raises
torch's own error. Only leaves that can get a gradient are passed, since torch calls the hooks of the others with None.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pipecompile.errors import ExecutionError

Gradients = Sequence[Tensor | None]


class Delivered(torch.autograd.Function):
    """``apply(gradients, rescaled, scale, loss, *leaves)``: the loss, whose backward returns a gradient for each leaf.

    ``gradients`` were computed from a gradient ``scale`` of the loss. If the incoming gradient differs, ``rescaled``
    recomputes them from it; without ``rescaled``, ``scale`` is 1 and they are multiplied by the incoming gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        gradients: Sequence[Tensor],
        rescaled: Callable[[float], Sequence[Tensor]] | None,
        scale: float,
        loss: Tensor,
        *leaves: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(*gradients)
        ctx.rescaled, ctx.scale = rescaled, scale
        return loss.detach()

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> Any:
        refuse_create_graph()
        gradients = ctx.saved_tensors
        if ctx.rescaled is not None:
            scale = incoming.item()
            gradients = gradients if scale == ctx.scale else ctx.rescaled(scale)
        elif (
            incoming.device.type != "cpu" or incoming.item() != 1.0
        ):  # on CPU only: reading the value would wait for a CUDA device
            gradients = [g * incoming.to(g.device, g.dtype) for g in gradients]
        return (None, None, None, None, *gradients)


class Deferred(torch.autograd.Function):
    """``apply(backward, count, *outputs, *leaves)``: the outputs. ``backward`` maps their gradients to leaves'."""

    @staticmethod
    def forward(ctx: Any, backward: Callable[[Gradients], Gradients], count: int, *tensors: Tensor) -> Any:
        ctx.run, ctx.count = backward, count
        ctx.set_materialize_grads(False)
        fresh = tuple(output.detach() for output in tensors[:count])
        ctx.mark_non_differentiable(*(f for f, o in zip(fresh, tensors, strict=False) if not o.requires_grad))
        return fresh

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor | None) -> Any:
        refuse_create_graph()
        _ = ctx.saved_tensors
        return (None, None, *(None,) * ctx.count, *ctx.run(incoming))


def refuse_create_graph() -> None:
    """Raises ``ExecutionError`` in a backward with ``create_graph=True``."""
    if torch.is_grad_enabled():
        raise ExecutionError(
            "create_graph=True asks for gradients of gradients, but a pipeline's backward cannot be differentiated; "
            "compute them with the unsplit model, pipe.pipeline.model"
        )
