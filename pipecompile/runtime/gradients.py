"""The gradients of a call: those of its outputs are given to its microbatches, those of its tensors are taken."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pipecompile.batching import spread
from pipecompile.errors import ExecutionError
from pipecompile.runtime import Microbatch, Weights
from pipecompile.runtime.batch import Batch
from pipecompile.runtime.joined import Joined
from pipecompile.runtime.session import Session

OF_A_PART = (
    "an output other than the loss got a gradient, but each process has it for its own part of the batch only, so the "
    "gradient of the whole batch is not known; compute the loss in the pipeline (loss_fn=, or labels in the call)"
)


def give_gradients(
    batch: Batch, joined: Joined, microbatches: Mapping[int, Microbatch], incoming: Sequence[Tensor | None]
) -> None:
    """Gives each microbatch its piece of the incoming gradients."""
    parts = list(microbatches.values())
    for (name, kind), gradient in zip(batch.joins.items(), incoming, strict=True):
        if gradient is not None and name in parts[0].outputs:
            if batch.part is not None:
                gradient = _of_part(batch, name, gradient, joined)
            pieces = spread(kind, gradient, [m.outputs[name] for m in parts], batch.rows_here)
            for microbatch, piece in zip(parts, pieces, strict=True):
                microbatch.seeds = {**microbatch.seeds, name: piece}


def _of_part(batch: Batch, name: str, gradient: Tensor, joined: Joined) -> Tensor:
    """The gradient of the part that runs here, from that of the whole batch."""
    assert batch.part is not None
    if name not in joined.parts:
        raise ExecutionError(OF_A_PART)
    return spread(batch.joins[name], gradient, joined.parts[name], batch.rows.by_part)[batch.part.number]


def take_gradients(session: Session, batch: Batch, microbatches: Mapping[int, Microbatch]) -> dict[int, Tensor]:
    """Takes the gradients that a program accumulated, by ``id`` of the parameter or input."""
    found = _of_weights(session.weights_of(batch.compiled), microbatches)
    for microbatch in microbatches.values():
        microbatch.versions.clear()  # they hold weights that were gathered for the program
    for name, tensor in batch.call.tensors.items():
        if tensor.requires_grad and any(microbatch.input_gradients.get(name) for microbatch in microbatches.values()):
            gradient = _input_gradient(name, batch, microbatches)
            found[id(tensor)] = found[id(tensor)] + gradient if id(tensor) in found else gradient
    return found if batch.part is None else session.peers.total(found, batch.model_tensors)


def _of_weights(weights: Mapping[int, Weights], microbatches: Mapping[int, Microbatch]) -> dict[int, Tensor]:
    """Takes the gradients of the stages' leaves, by ``id`` of the parameter."""
    found: dict[int, Tensor] = {}
    versions = next(iter(microbatches.values())).versions
    for stage, version in sorted(versions.items(), reverse=True):  # the latest use first, whatever thread ended first
        for name, leaf in version.leaves.items():
            if leaf.grad is not None:
                tensor = weights[stage].tensors[name]
                gradient = leaf.grad.to(tensor.device)
                found[id(tensor)] = found[id(tensor)] + gradient if id(tensor) in found else gradient
                leaf.grad = None
    return found


def _input_gradient(name: str, batch: Batch, microbatches: Mapping[int, Microbatch]) -> Tensor:
    """The gradient of a model input: the microbatches' gradients, concatenated, or summed for a shared input."""
    tensor = batch.call.tensors[name]
    parts: list[Tensor] = []
    for microbatch in microbatches.values():
        total = torch.zeros_like(microbatch.inputs[name])
        for _, gradient in sorted(microbatch.input_gradients.get(name, {}).items(), reverse=True):
            total = total + gradient.to(tensor.device)
        parts.append(total)
    return torch.cat(parts) if name in batch.call.batched else sum(parts[1:], parts[0])
