"""Where a pipeline meets autograd: gradients that a program has computed, or will compute, as the backward of one call.

``Delivered``: the program has run forward and backward; ``loss.backward()`` hands the gradients on, times the gradient
that comes in (so that a GradScaler, ``loss / n`` and accumulation work as ever).

``Deferred``: the forwards have run; the gradients that come in start the backwards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pipecompile.errors import ExecutionError

Gradients = list[Tensor | None]


class Delivered(torch.autograd.Function):
    """``apply(box, position of the loss, number of outputs, *outputs, *leaves)``; the box holds the gradients."""

    @staticmethod
    def forward(ctx: Any, box: list[Gradients], loss: int, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.box, ctx.loss, ctx.count = box, loss, count
        ctx.set_materialize_grads(False)
        return _outputs(ctx, tensors[:count])

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor | None) -> Any:
        if any(gradient is not None for i, gradient in enumerate(incoming) if i != ctx.loss):
            raise ExecutionError(
                "a gradient flows into an output beside the loss, but the pipeline has run its backward from the loss "
                "alone; compute the whole loss inside the model or in loss_fn="
            )
        scale = incoming[ctx.loss]
        if scale is None:
            return (None,) * (3 + ctx.count + len(ctx.box[0]))
        if not ctx.box:
            raise ExecutionError(
                "backward() was called a second time on one call of the pipeline, whose gradients have been handed on; "
                "call the pipeline again (retain_graph= cannot help)"
            )
        gradients = ctx.box.pop()
        if scale.device.type == "cpu" and scale.item() == 1.0:
            scaled = gradients
        else:
            scaled = [None if g is None else g * scale.to(g.device, g.dtype) for g in gradients]
        return (None, None, None, *(None,) * ctx.count, *scaled)


class Deferred(torch.autograd.Function):
    """``apply(backward, number of outputs, *outputs, *leaves)``; ``backward`` maps gradients of outputs to leaves'."""

    @staticmethod
    def forward(
        ctx: Any, backward: Callable[[Sequence[Tensor | None]], Gradients], count: int, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.run, ctx.count = backward, count
        ctx.set_materialize_grads(False)
        return _outputs(ctx, tensors[:count])

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor | None) -> Any:
        return (None, None, *(None,) * ctx.count, *ctx.run(incoming))


def _outputs(ctx: Any, outputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    fresh = tuple(output.detach() for output in outputs)
    ctx.mark_non_differentiable(*(f for f, o in zip(fresh, outputs, strict=True) if not o.requires_grad))
    return fresh
