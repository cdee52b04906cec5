"""``Proofs``: which captures of a pipeline have been compared with the unsplit model, and what came of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from pipecompile.capture.locks import CAPTURING
from pipecompile.compiler.batches import Batches
from pipecompile.ops.phases import phase
from pipecompile.runtime.batch import Batch
from pipecompile.runtime.observers import unobserved
from pipecompile.verify.prove import due, first_microbatch, prove
from pipecompile.verify.results import Proof
from pipecompile.verify.side_by_side import Trial

Kind = tuple[int, str]  # the identity of a capture, and what the call was for


class Proofs:
    """The last comparison of each capture with the unsplit model, with and without gradients.

    Args:
        batches: the captures of the pipeline.

    Attributes:
        made: the comparisons.
        left_out: why captures were not compared.
    """

    def __init__(self, batches: Batches) -> None:
        self.batches = batches
        self.made: dict[Kind, Proof] = {}
        self.left_out: dict[Kind, str] = {}

    def look(self, batch: Batch, calls: int) -> None:
        """Compares a call with that of the unsplit model, if a comparison is due.

        Args:
            batch: the call.
            calls: the number of earlier calls.

        Raises:
            ExactnessError: they differ.
        """
        reached, self.batches.reached = self.batches.reached, None
        options, share, training = self.batches.options, self.batches.share, self.batches.model.training
        kind = (id(batch.compiled), _purpose(batch.trains, training))
        if not due(options.verify, calls, kind in self.made):
            return
        if share is not None and share.is_settled:
            self.left_out[kind] = "not compared: no process has the whole model"
            return
        one = options.policy.updates_each and training
        trial = Trial(
            model=self.batches.model,
            batch=first_microbatch(batch) if one else replace(batch, part=None),
            schedule=options.policy.with_flush,
            devices=tuple(self.batches.devices),
            loss_fn=options.loss_fn,
            loss=options.loss_output,
            trains=batch.trains,
            batching=options.batching,
            reach=reached,
        )
        with CAPTURING.taken(), unobserved(), phase("verify"):
            self.made[kind] = self.batches.peers.shared(lambda: prove(trial))

    def forget(self) -> None:
        """Lets the next call of each capture be compared: its stages are others now."""
        self.made.clear()

    @property
    def said(self) -> Iterator[str]:
        """A line for each capture, compared or not."""
        for (_, purpose), said in (self.made | self.left_out).items():
            yield f"{purpose}: {said}"

    @property
    def missing(self) -> Iterator[str]:
        """A line for each comparison that could not be made."""
        for (_, purpose), proof in self.made.items():
            if not proof.rows:
                yield f"{purpose}: {proof.note}"
        for (_, purpose), why in self.left_out.items():
            yield f"{purpose}: {why}"


def _purpose(gradients: bool, training: bool) -> str:
    if not gradients:
        return "evaluation"
    return "training" if training else "evaluation with gradients"
