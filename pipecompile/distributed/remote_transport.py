"""Transfers between ranks in several processes: a packet for each (``lines.py``).

A receive is posted as soon as the program says so, long before its value is read. Values on an accelerator pass through
the memory of the host.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping

import torch
from torch import Tensor

from pipecompile.distributed.lines import Lines
from pipecompile.errors import ExecutionError
from pipecompile.ir.instruction import Recv, Result, Send
from pipecompile.ir.plan import Plan
from pipecompile.ir.program import rank_of, target_of
from pipecompile.runtime.lane import Lane, Sent, Value, Values
from pipecompile.runtime.runner import Microbatch


class RemoteTransport:
    """Transfers of one rank with those of other processes.

    Args:
        lines: to the other ranks.
        lanes: by rank, that of this process.
        plan: the ranks of the stages.
    """

    def __init__(self, lines: Lines, lanes: Mapping[int, Lane], plan: Plan) -> None:
        self.lines = lines
        self.lanes = lanes
        self.plan = plan
        self.shapes: dict[int, Hashable] = {}  # of the inputs, by microbatch of the present program

    def begin(self, microbatches: Mapping[int, Microbatch]) -> None:
        self.lines.begin()
        self.shapes = {n: tuple(t.shape for t in m.inputs.values()) for n, m in microbatches.items()}

    def send(self, send: Send, values: Values) -> Sent:
        lane, peer = self.lanes[rank_of(send, self.plan)], target_of(send, self.plan)
        for value in values:
            _check(value, send)
        began = lane.mark()
        self.lines.put(peer, values, self._kind(send.result, send.target))
        return Sent(values, None, began, lane.mark())

    def recv(self, recv: Recv) -> Callable[[], Values]:
        lane, peer = self.lanes[target_of(recv, self.plan)], rank_of(recv.result, self.plan)
        get = self.lines.get(peer, self._kind(recv.result, recv.target))
        return lambda: tuple(None if value is None else _on(value, lane.device) for value in get())

    def abort(self) -> None:
        self.lines.abort()

    def reset(self) -> None:
        """Nothing to drop: after a failure, the processes end."""

    def _kind(self, result: Result, target: int) -> Hashable:
        """What transfers of one size have in common. All processes know it, since they run the same call."""
        return type(result), result.stage, target, self.shapes[result.microbatch]


def _check(value: Value, send: Send) -> None:
    if value is not None and value.layout != torch.strided:
        raise ExecutionError(
            f"{send} is a {value.layout} tensor, which gloo does not carry between processes; keep what makes it and "
            f"what reads it in one stage (PlanOptions(colocate=...))"
        )


def _on(value: Tensor, device: torch.device) -> Tensor:
    if value.device == device or value.is_meta:  # an output that is only described
        return value
    return value.detach().to(device).requires_grad_(value.requires_grad)
