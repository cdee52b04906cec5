"""Gradients of an output through other outputs: ``h.retain_grad()`` on a hidden state, before ``loss.backward()``.

For autograd, the outputs of a call come from one function, so it sees a gradient that the caller gives to an output,
but not that which reaches the output through another one, inside the stages. The stages compute that gradient where
they make the output, and it is added to the output's ``grad`` after the backward.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from weakref import ref

from torch import Tensor

from pipecompile.batching import Batched, gather
from pipecompile.capture.ancestors import ancestors
from pipecompile.errors import ExecutionError
from pipecompile.runtime.batch import Batch
from pipecompile.runtime.runner import Microbatch

INSTEAD = "compute it with the unsplit model, pipe.pipeline.model"


@dataclass(frozen=True)
class Retained:
    """The outputs of a call that the caller may ask for a gradient of, by their name among those of the stages.

    It does not keep them alive.
    """

    batch: Batch
    outputs: dict[str, ref[Tensor]] = field(default_factory=dict)

    def hold(self, outputs: Mapping[str, Tensor]) -> None:
        """Takes the tensors that the caller gets."""
        self.outputs.update({name: ref(output) for name, output in outputs.items() if output.requires_grad})

    def asked(self, fed: Collection[str], several_processes: bool = False) -> dict[str, Tensor]:
        """The outputs whose gradient is asked for, and which another output that gets a gradient is computed from.

        Args:
            fed: names of the outputs that get a gradient.
            several_processes: whether other processes run some of the stages.

        Raises:
            ExecutionError: a hook waits for such a gradient, or it cannot be joined from the microbatches.
        """
        held = {name: tensor for name, each in self.outputs.items() if (tensor := each()) is not None}
        asked = {name: tensor for name, tensor in held.items() if tensor.retains_grad or tensor._backward_hooks}
        if not asked:
            return {}
        nodes = {node.name: node for node in self.batch.division.body.graph.nodes}
        for name in list(asked):
            others = [nodes[other] for other in fed if other != name]
            if nodes[name] not in ancestors(others):
                del asked[name]
        for name, tensor in asked.items():
            seen = f"output {name!r} of shape {tuple(tensor.shape)}"
            if tensor._backward_hooks:
                raise ExecutionError(
                    f"a hook on {seen} waits for its gradient, but a part of that is computed in the stages, through "
                    f"another output, where the hook does not run; call retain_grad() on the output and read its grad "
                    f"after the backward"
                )
            if several_processes:
                raise ExecutionError(
                    f"retain_grad() was called on {seen}, but a part of its gradient is computed in the process of one "
                    f"stage; {INSTEAD}"
                )
            if len(self.batch.rows) > 1 and not isinstance(self.batch.joins[name], Batched):
                raise ExecutionError(
                    f"retain_grad() was called on {seen}, which has no batch dimension, so the gradients of "
                    f"{len(self.batch.rows)} microbatches cannot be joined; use microbatches=1, or {INSTEAD}"
                )
        return asked

    def add(self, asked: Mapping[str, Tensor], microbatches: Sequence[Microbatch]) -> None:
        """Adds the gradients that the stages have computed to those of the outputs."""
        for name, tensor in asked.items():
            parts = [microbatch.retained[name] for microbatch in microbatches]
            if any(part is None for part in parts):
                continue  # no gradient reached it
            found = gather(self.batch.joins[name], [p for p in parts if p is not None], self.batch.rows_here)
            found = found.to(tensor.device)
            tensor.grad = found if tensor.grad is None else tensor.grad + found
