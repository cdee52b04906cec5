"""Where a pipeline meets autograd: gradients that a program has computed, or will compute, as the backward of one call.

``Delivered``: the program has run forward and backward; ``loss.backward()`` hands the gradients on, times the gradient
that comes in (so that ``loss / n`` and accumulation work as ever). float16 has no room for gradients of just any scale,
and what was lost in it no factor brings back: there the program is run again if it began from another scale.

``Deferred``: the forwards have run; the gradients that come in start the backwards.

Both keep to autograd's rules. ``retain_graph=True`` allows a second backward; without it ``ctx.saved_tensors`` raises
torch's own error. Leaves that are given get a gradient as a rule, since torch calls hooks on the others too, with None.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pipecompile.errors import ExecutionError

Gradients = Sequence[Tensor | None]


class Delivered(torch.autograd.Function):
    """``apply(gradients, rescaled, scale, loss, *leaves)``: the loss, whose backward hands on a gradient for each leaf.

    ``rescaled``, where given, computes them anew from another ``scale`` of the gradient into the loss than they were
    computed from; without it that was 1, and they are multiplied.
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
        elif incoming.device.type != "cpu" or incoming.item() != 1.0:  # without waiting for a device
            gradients = [g * incoming.to(g.device, g.dtype) for g in gradients]
        return (None, None, None, None, *gradients)


class Deferred(torch.autograd.Function):
    """``apply(backward, number of outputs, *outputs, *leaves)``; ``backward`` maps gradients of outputs to leaves'."""

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
    if torch.is_grad_enabled():
        raise ExecutionError(
            "create_graph=True asks for gradients of gradients, but a pipeline's backward leaves no graph to "
            "differentiate; compute what needs them with the unsplit model, pipe.pipeline.model"
        )
