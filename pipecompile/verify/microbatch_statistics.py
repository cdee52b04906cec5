"""Batch normalization of the unsplit model as in a pipeline: by the statistics of each microbatch, as in GPipe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pipecompile.batching import Rows
from pipecompile.ops.torch_internals import _current_graph_task_id


def statistics_of(rows: Rows, deferred: bool = False) -> TorchFunctionMode:
    """A mode in which batch normalization of the whole batch uses the statistics of each microbatch, as in GPipe.

    Args:
        deferred: whether running statistics are updated once, by the statistics of all rows.
    """
    return _MicrobatchStatistics(rows.counts, deferred)


class _MicrobatchStatistics(TorchFunctionMode):
    def __init__(self, counts: Sequence[int], deferred: bool) -> None:
        super().__init__()
        self.counts = tuple(counts)
        self.deferred = deferred
        self.uses: dict[int, _Uses] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.batch_norm or len(self.counts) < 2:
            return func(*args, **kwargs)
        names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        x, rows = given.pop("input"), sum(self.counts)
        if not given.get("training", False) or x.shape[0] % rows:
            return func(*args, **kwargs)
        if self.deferred:
            with torch.no_grad():
                func(x.detach(), **given)
            given["running_mean"] = given["running_var"] = None
        parts = torch.split(x, [count * (x.shape[0] // rows) for count in self.counts])
        mean, var = given.get("running_mean"), given.get("running_var")
        in_backward = _current_graph_task_id() != -1  # a checkpoint recomputes, after all forwards
        if mean is None or var is None or in_backward:
            return torch.cat([func(part, **given) for part in parts])
        found = [(torch.zeros_like(mean), torch.zeros_like(var)) for _ in parts]
        alone = [{**given, "running_mean": m, "running_var": v, "momentum": 1.0} for m, v in found]
        joined = torch.cat([func(part, **own) for part, own in zip(parts, alone, strict=True)])
        self.uses.setdefault(id(mean), _Uses((mean, var))).add(given.get("momentum", 0.1), found)
        return joined


class _Uses:
    """One module's running statistics, updated by all uses in one microbatch, then by those in the next."""

    def __init__(self, running: tuple[Tensor, Tensor]) -> None:
        self.running = running
        self.start = tuple(map(torch.clone, running))
        self.found: list[
            tuple[float, Sequence[tuple[Tensor, Tensor]]]
        ] = []  # per use: the momentum, and the statistics of each part

    def add(self, momentum: float, found: Sequence[tuple[Tensor, Tensor]]) -> None:
        self.found.append((momentum, found))
        with torch.no_grad():
            for i, tensor in enumerate(self.running):
                tensor.copy_(self.start[i])
                for part in range(len(found)):
                    for momentum, of_parts in self.found:
                        tensor.lerp_(of_parts[part][i], momentum)
