"""A checkpointed region of a stage: its activations are not kept, and its backward recomputes them.

The model defines regions with ``torch.utils.checkpoint``. A region that a cut divides becomes one region per stage.
Everything it reads is an argument, including parameters, so that the second run reads the same tensors as the first.
Each random call has its own seed (``randomness.py``), so the second run draws the same numbers, at any time and in any
thread, once it knows its microbatch.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.fx as fx
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pipecompile.ops.randomness import microbatch_seed, seed_microbatch


class Recomputed:
    """Runs a checkpointed region in a stage.

    Args:
        module: Takes the values that the region reads and returns those read from it; owns no tensors.
        name: Name of the region in generated code.
    """

    def __init__(self, module: fx.GraphModule, name: str) -> None:
        self.module = module
        self.__name__ = name

    def __call__(self, *values: Any) -> tuple[Tensor, ...]:
        if not torch.is_grad_enabled():
            return self._run(values)
        seed = microbatch_seed()

        def run() -> tuple[Tensor, ...]:  # no arguments: torch would reject buffers that other microbatches write
            outer = microbatch_seed()
            seed_microbatch(seed)
            try:
                return self._run(values)
            finally:
                seed_microbatch(outer)

        out: tuple[Tensor, ...] = checkpoint(run, use_reentrant=False, preserve_rng_state=False)
        return out

    def _run(self, values: tuple[Any, ...]) -> tuple[Tensor, ...]:
        out: tuple[Tensor, ...] = self.module(*values)
        return out
