"""Memory that goes back to a stream while another one still reads it, one case at a time."""

from __future__ import annotations

import torch
import virtual_device as vd
from machines import EARLY, LATE
from torch import nn

from pipecompile.runtime.lane import Callers, Lane
from pipecompile.runtime.weights import Weights

SIZE = 1000


def test_a_step_that_replaces_parameters_keeps_their_memory_until_it_has_been_read() -> None:
    """Another thread of the user's takes memory on the stream on which the parameters were made."""
    EARLY.start()
    device = EARLY[0]
    parameter = nn.Parameter(torch.full((SIZE,), 2.0, device=device))
    torch.accelerator.synchronize(device)
    lane, callers = Lane(device), Callers([device])
    with lane.entered(callers.events([])):
        weights = Weights({"w": parameter}, device, lambda parameters: torch.optim.SGD(parameters, lr=0.1))
        read = weights.current.leaves["w"].detach() * 3
        weights.step([weights.current])  # a backward still needs this version
        weights.step([])
    taken = torch.full((SIZE,), 7.0, device=device)
    lane.compute.synchronize()
    callers.wait([lane])
    assert read.cpu().tolist() == [6.0] * SIZE
    assert taken.cpu().tolist() == [7.0] * SIZE


def test_what_a_cpu_rank_sends_does_not_overwrite_what_the_caller_still_reads() -> None:
    LATE.start()
    device = LATE[0]
    sender, receiver, callers = Lane(torch.device("cpu")), Lane(device), Callers([device])

    def received(value: float) -> torch.Tensor:
        sent = sender.move((torch.full((SIZE,), value),), receiver)
        receiver.wait(sent.ready)
        return sent.values[0]

    with receiver.entered(callers.events([])):
        value = received(2.0)
    callers.wait([receiver])
    receiver.compute.synchronize()  # all that the rank has used is read
    result = value * 3  # queued by the caller, and the tensor dropped
    del value
    vd.waits()
    with receiver.entered(callers.events([])):
        other = received(5.0)
    receiver.receives.synchronize()
    assert result.cpu().tolist() == [6.0] * SIZE
    callers.wait([receiver])
    assert other.cpu().tolist() == [5.0] * SIZE


def test_a_cpu_rank_reads_what_the_callers_stream_has_made() -> None:
    """Its thread has the default stream, which does not wait for that of the caller by itself."""
    LATE.start()
    device = LATE[0]
    lane, callers = Lane(torch.device("cpu")), Callers([device])
    with torch.Stream(device):
        made = torch.full((SIZE,), 2.0, device=device) * 3
        events = callers.events([device])

    found: list[float] = []

    def read() -> None:
        with lane.entered(events):
            found.extend(made.to("cpu").tolist())

    lane.thread.start(read).wait()
    assert found == [6.0] * SIZE
