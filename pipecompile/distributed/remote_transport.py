"""Transfers between ranks in several processes, over gloo.

Each transfer is a header, which says how many values it has and of which sizes, and a message for each tensor. Nothing
here waits in a rank's own thread: a send is posted and left to a worker, a receive is left to a worker from the start,
so that it is posted long before its value is read. There is a worker for each peer and direction, so that no transfer
waits for one that it does not depend on. Values on an accelerator pass through the memory of the host.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from pipecompile.distributed.control import Control
from pipecompile.distributed.members import Members
from pipecompile.distributed.worker import Worker, is_lost
from pipecompile.errors import ExecutionError
from pipecompile.ir.program import Recv, Send
from pipecompile.runtime.lane import Lane, Sent, Value, Values
from pipecompile.runtime.transport import Aborted

HEADER = 512  # bytes; what is longer follows in a message of its own
LENGTH = 8  # bytes of the header that tell its length
TAGS = 1 << 10  # of one transfer
ROUND = 1 << 20  # transfers after which tags are used again


@dataclass(frozen=True)
class Spec:
    """What a header says of one tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool

    @staticmethod
    def of(value: Tensor) -> Spec:
        return Spec(tuple(value.shape), value.dtype, value.requires_grad)

    def empty(self) -> Tensor:
        return torch.empty(self.shape, dtype=self.dtype)


class RemoteTransport:
    """Transfers of one rank with those of other processes.

    Args:
        control: ends all waits when a rank fails.
        members: the processes of the pipeline's ranks.
        places: of these in the control channel.
        lanes: by rank, that of this process.
        rank_of: the rank of each stage.
    """

    def __init__(
        self,
        control: Control,
        members: Members,
        places: Sequence[int],
        lanes: Mapping[int, Lane],
        rank_of: Sequence[int],
    ) -> None:
        self.control = control
        self.processes, self.group = members.processes, members.group
        self.places = places
        self.lanes = lanes
        self.rank_of = rank_of
        self.workers: dict[tuple[int, str], Worker] = {}
        self.counts: dict[tuple[int, str], int] = {}
        self.pending = 0  # sends that have not arrived
        self.aborted = False

    def send(self, send: Send, values: Values) -> Sent:
        lane, peer = self.lanes[self.rank_of[send.stage]], self.rank_of[send.target]
        began, tag = lane.mark(), self._tag(peer, "to")
        specs = [None if value is None else Spec.of(value) for value in values]
        parts = [*_header(specs), *(_bytes(_dense(value, send)) for value in values if value is not None)]
        with self.control.changed:
            self.pending += 1
        to = self.processes[peer]
        try:
            works = [dist.isend(part, to, self.group, tag + place) for place, part in enumerate(parts) if len(part)]
        except RuntimeError as error:
            if not is_lost(error):
                raise
            self.control.lost(self.places[peer], error)
            raise Aborted from error

        def finish(parts: Sequence[Tensor] = parts) -> None:
            for work in works:
                if work is not None:
                    work.wait()
            with self.control.changed:
                self.pending -= 1
                self.control.changed.notify_all()

        self._worker(peer, "to").put(finish)
        return Sent(values, None, began, lane.mark())

    def recv(self, recv: Recv) -> Callable[[], Values]:
        lane, peer = self.lanes[self.rank_of[recv.target]], self.rank_of[recv.result.stage]
        tag, arrived = self._tag(peer, "from"), list[Sequence[Value]]()

        def receive() -> None:
            specs, place = self._received_header(peer, tag)
            values = [None if spec is None else spec.empty() for spec in specs]
            works = []
            for value in values:
                if value is not None:
                    if value.numel():
                        works.append(dist.irecv(_bytes(value), self.processes[peer], self.group, tag + place))
                    place += 1
            for work in works:
                if work is not None:
                    work.wait()
            for spec, value in zip(specs, values, strict=True):
                if spec is not None and value is not None:
                    value.requires_grad_(spec.requires_grad)
            with self.control.changed:
                arrived.append(values)
                self.control.changed.notify_all()

        def wait() -> Values:
            self.control.wait_for(lambda: self.aborted or bool(arrived), peer=self.places[peer])
            if not arrived:
                raise Aborted
            return tuple(None if value is None else _on(value, lane.device) for value in arrived[0])

        self._worker(peer, "from").put(receive)
        return wait

    def flush(self) -> None:
        """Waits until all that was sent has arrived."""
        self.control.wait_for(lambda: self.pending == 0)

    def abort(self) -> None:
        """Wakes the ranks of this process; those of others are woken by the control channel."""
        with self.control.changed:
            self.aborted = True
            self.control.changed.notify_all()

    def reset(self) -> None:
        """Nothing to drop: after a failure, the processes end."""

    def _received_header(self, peer: int, tag: int) -> tuple[list[Spec | None], int]:
        """What a transfer contains, and the number of messages that said so."""
        first = torch.empty(HEADER, dtype=torch.uint8)
        dist.recv(first, self.processes[peer], self.group, tag)
        length = int.from_bytes(bytes(first[:LENGTH].tolist()), "little")
        if length <= HEADER - LENGTH:
            return _read(bytes(first[LENGTH : LENGTH + length].tolist())), 1
        more = torch.empty(length, dtype=torch.uint8)
        dist.recv(more, self.processes[peer], self.group, tag + 1)
        return _read(bytes(more.tolist())), 2

    def _tag(self, peer: int, way: str) -> int:
        count = self.counts[peer, way] = self.counts.get((peer, way), -1) + 1
        return (count % ROUND) * TAGS

    def _worker(self, peer: int, way: str) -> Worker:
        if (peer, way) not in self.workers:
            self.workers[peer, way] = Worker(self.control, self.places[peer])
        return self.workers[peer, way]


def _header(specs: Sequence[Spec | None]) -> list[Tensor]:
    """One or two messages that say what follows."""
    said = [spec and [spec.shape, str(spec.dtype).removeprefix("torch."), spec.requires_grad] for spec in specs]
    text = json.dumps(said).encode()
    length = len(text).to_bytes(LENGTH, "little")
    if len(text) <= HEADER - LENGTH:
        return [_message((length + text).ljust(HEADER, b" "))]
    return [_message(length.ljust(HEADER, b" ")), _message(text)]


def _message(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def _read(text: bytes) -> list[Spec | None]:
    return [said and Spec(tuple(said[0]), getattr(torch, said[1]), said[2]) for said in json.loads(text)]


def _dense(value: Tensor, send: Send) -> Tensor:
    if value.layout != torch.strided:
        raise ExecutionError(
            f"{send} is a {value.layout} tensor, which gloo does not carry between processes; keep what makes it and "
            f"what reads it in one stage (PlanOptions(colocate=...))"
        )
    return value.detach().to("cpu").contiguous()


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _on(value: Tensor, device: torch.device) -> Tensor:
    return value if value.device == device else value.detach().to(device).requires_grad_(value.requires_grad)
