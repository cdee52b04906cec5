"""Clips the gradients of a whole model whose parameters are in several processes."""

from __future__ import annotations

import math
from functools import reduce

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from pipecompile.distributed.ownership import counted, owned
from pipecompile.distributed.processes import Processes
from pipecompile.runtime.compiled import Compiled


def clip_grad_norm_(compiled: Compiled, processes: Processes, max_norm: float, norm_type: float) -> Tensor:
    """Scales the gradients of this process by the norm of all; returns that norm, the same in all processes.

    As ``torch.nn.utils.clip_grad_norm_`` it takes the norm of the norms of the parameters, in their type and in the
    order of the model. The norm of a parameter that is divided is that of the norms of its parts.
    """
    parameters = dict(compiled.captured.model.named_parameters())
    mine = counted(compiled, processes.rank)
    norms = torch.zeros(2, len(parameters), dtype=torch.float64)  # and whether there is a gradient
    for place, (name, parameter) in enumerate(parameters.items()):
        if name in mine and (gradient := _gradient(parameter, processes)) is not None:
            norms[0, place], norms[1, place] = _norm(gradient, norm_type), 1.0
    processes.agree("clip_grad_norm_")
    if processes.shards is not None:
        each = torch.stack(processes.shards.column.gathered_tensors(norms[0]))
        divided = processes.shards.divided
        places = torch.tensor([id(parameter) in divided for parameter in parameters.values()])
        norms[0] = torch.where(places, _norm(each, norm_type, 0), norms[0])
    norms = processes.row.summed(norms)
    dtypes = {parameter.dtype for parameter in parameters.values() if parameter.requires_grad}
    found = norms[0][norms[1] > 0].to(reduce(torch.promote_types, dtypes or {torch.float32}))
    total: Tensor = torch.linalg.vector_norm(found, norm_type)
    own = owned(compiled, processes.rank)
    trained = [processes.home(parameter) for name, parameter in parameters.items() if name in own]
    torch.nn.utils.clip_grads_with_norm_(trained, max_norm, total)
    return total


def _gradient(parameter: Tensor, processes: Processes) -> Tensor | None:
    """What this process has of the gradient of a parameter of the model."""
    found = processes.home(parameter).grad
    return found.to_local() if isinstance(found, DTensor) else found


def _norm(values: Tensor, norm_type: float, dim: int | None = None) -> Tensor:
    """The norm of values, or of norms along a dimension."""
    if dim is not None and norm_type == 0:  # which counts
        return values.sum(dim)
    if not values.numel():
        return values.new_tensor(math.inf if norm_type < 0 else 0.0)
    found: Tensor = torch.linalg.vector_norm(values, norm_type, dim=dim)
    return found
