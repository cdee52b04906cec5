"""Clips the gradients of a whole model whose parameters are in several processes."""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor

from pipecompile.distributed.ownership import counted, owned
from pipecompile.distributed.processes import Processes
from pipecompile.runtime.compiled import Compiled


def clip_grad_norm_(compiled: Compiled, processes: Processes, max_norm: float, norm_type: float) -> Tensor:
    """Scales the gradients of this process by the norm of all; returns that norm, the same in all processes.

    As ``torch.nn.utils.clip_grad_norm_`` it takes the norm of the norms of the parameters, in their type and in the
    order of the model.
    """
    parameters = dict(compiled.captured.model.named_parameters())
    mine = counted(compiled, processes.rank)
    norms = torch.zeros(2, len(parameters), dtype=torch.float64)  # and whether there is a gradient
    for place, (name, parameter) in enumerate(parameters.items()):
        if name in mine and parameter.grad is not None:
            norms[0, place], norms[1, place] = torch.linalg.vector_norm(parameter.grad, norm_type), 1.0
    processes.agree("clip_grad_norm_")
    norms = processes.row.summed(norms)
    dtypes = {parameter.dtype for parameter in parameters.values() if parameter.requires_grad}
    found = norms[0][norms[1] > 0].to(reduce(torch.promote_types, dtypes or {torch.float32}))
    total: Tensor = torch.linalg.vector_norm(found, norm_type)
    own = owned(compiled, processes.rank)
    trained = [parameter for name, parameter in parameters.items() if name in own]
    torch.nn.utils.clip_grads_with_norm_(trained, max_norm, total)
    return total
