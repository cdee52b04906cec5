"""A stretch of a stage whose activations are not kept: the backward computes them again.

The model says where, with ``torch.utils.checkpoint``. A stretch that a cut divides is one stretch in each stage. What
it reads are arguments, its parameters too, so that the second run reads the very tensors of the first. Its random
calls are seeded for themselves (``randomness.py``), so a second run, whenever and in whatever thread it comes, draws
the same numbers once it knows its microbatch.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.fx as fx
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pipecompile.ops.randomness import microbatch_seed, seed_microbatch


class Recomputed:
    """What a stage calls for such a stretch.

    Args:
        module: takes what the stretch reads and gives what is read of it; it owns no tensors.
    """

    def __init__(self, module: fx.GraphModule, name: str) -> None:
        self.module = module
        self.__name__ = name

    def __call__(self, *values: Any) -> tuple[Tensor, ...]:
        if not torch.is_grad_enabled():
            return self._run(values)
        seed = microbatch_seed()

        def run() -> tuple[Tensor, ...]:  # no arguments: torch would refuse buffers that other microbatches write
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
