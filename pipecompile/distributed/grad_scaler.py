"""A gradient scaler of a whole model whose parameters are in several processes.

torch's own skips the optimizer's step where it finds infinite gradients, and halves the scale there. Over processes,
that must happen in all of them or in none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pipecompile.distributed.processes import Processes

CPU = torch.device("cpu")


class GradScaler(torch.amp.GradScaler):
    """``torch.amp.GradScaler`` that finds what any process finds. All processes must make the same calls.

    Args:
        processes: of the pipeline.
        options: of ``torch.amp.GradScaler``.
    """

    def __init__(self, processes: Processes, **options: Any) -> None:
        super().__init__("cpu", **options)
        self._processes = processes

    def scale(self, outputs: Any) -> Any:
        if self._enabled and self._scale is None:  # else torch would have it where the outputs are, perhaps nowhere
            self._lazy_init_scale_growth_tracker(CPU)
        return super().scale(outputs)

    def _unscale_grads_(self, optimizer: Any, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool) -> Any:
        found = super()._unscale_grads_(optimizer, inv_scale, found_inf, allow_fp16)
        mine = found.get(CPU, found_inf)  # there is none in a process whose optimizer has no gradients
        self._processes.agree("to look for infinite gradients")
        return {CPU: torch.stack(self._processes.all.gathered_tensors(mine)).amax(0)}
