"""Runs a batch on its capture by the schedule of the options, which may need to know the loss."""

from __future__ import annotations

from torch import Tensor

from pipecompile.capture.loss import could_be_losses, find_loss
from pipecompile.compiler.options import Options
from pipecompile.errors import InputError
from pipecompile.runtime import steps
from pipecompile.runtime.batch import Batch
from pipecompile.runtime.session import Session


def run_batch(session: Session, batch: Batch, options: Options, training: bool) -> dict[str, Tensor]:
    """Runs a batch; returns the values of its outputs by name.

    Args:
        session: what runs it.
        batch: the batch.
        options: name the loss and the schedule.
        training: whether the model is in training mode, in which an asynchronous schedule streams.

    Raises:
        InputError: the schedule or the mesh needs the loss inside the pipeline, but it is not known.
    """
    captured, policy = batch.compiled.captured, options.policy
    loss = find_loss(captured, options.loss_output)
    streams = policy.is_asynchronous and training
    if batch.trains and streams and loss is None:
        several = ", ".join(could_be_losses(captured))
        seen = f"outputs {several} could each be the loss" if several else "the model does not return a loss"
        remedy = "name it with loss_output=" if several else "pass labels to the call, or loss_fn= to compile()"
        raise InputError(f"schedule={options.schedule!r} needs the loss inside the pipeline, but {seen}; {remedy}")
    if batch.trains and loss is None and batch.part is not None:
        raise InputError(
            "the mesh has the dimension 'data', but the model does not return a loss, and no process has the "
            "outputs of the whole batch to compute one; pass labels to the call, or loss_fn= to compile()"
        )
    return steps.run(session, batch, loss, policy.program, policy if streams else None)
