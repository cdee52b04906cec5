"""Scenes of the control channel: what each rank of a pipeline does while one of them fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from scene import announce, meet

from pipecompile.distributed.control import Control, store_of_the_group
from pipecompile.distributed.watch import Pace
from pipecompile.distributed.worker import Worker
from pipecompile.runtime.transport import Aborted

# A look counts for two beats at most, so a rank is silent if others look 100 times before it does once: on a busy
# machine, where ranks are slow, they look slowly too.
PACE = Pace(beat=0.02, silent=4.0, grace=0.4)
PATIENT = Pace(beat=0.05, silent=100.0, grace=0.4)  # for what is not about silence


def control(pace: Pace = PATIENT) -> Control:
    return Control(dist.get_rank(), dist.get_world_size(), store_of_the_group(), pace)


@contextmanager
def raising_the_cause(channel: Control) -> Iterator[None]:
    try:
        yield
    except Aborted:
        raise channel.error() from None


def wait(channel: Control, peer: int | None = None) -> None:
    with raising_the_cause(channel):
        channel.wait_for(lambda: False, peer=peer)


def all_wait() -> None:
    """For what does not come, until one is hurt."""
    channel = control(PACE)
    meet("all begun")
    announce("waiting")
    wait(channel)


def one_raises(rank: int) -> None:
    """In a stage."""
    channel = control()
    if dist.get_rank() == rank:
        error = ValueError("the model's own")
        raise channel.report(channel.mine(f"stage {rank}, {rank}F0", f"ValueError: {error}")) from error
    wait(channel)


def the_host_raises() -> None:
    """Rank 0, when the others have just looked, and will not look again for a while."""
    channel = control(Pace(beat=1.5, silent=300.0, grace=300.0))
    meet("all begun")
    if dist.get_rank() == 0:
        raise channel.report(channel.mine("stage 0, 0F0", "ValueError: the model's own"))
    wait(channel)


def two_raise() -> None:
    """Ranks 0 and 1, at once."""
    channel, rank = control(), dist.get_rank()
    if rank < 2:
        meet("failure", 2)
        raise channel.report(channel.mine(f"stage {rank}, {rank}B3", "ValueError: too large"))
    wait(channel)


def one_raises_outside(rank: int) -> None:
    """In the user's own script, between two calls of the pipeline."""
    channel = control()
    meet("all begun")
    if dist.get_rank() == rank:
        raise KeyError("data")
    wait(channel)


def one_ends_early(rank: int, close: bool, peer: int | None) -> None:
    channel = control()
    meet("all begun")
    if dist.get_rank() != rank:
        wait(channel, peer)
    if close:
        channel.close()


def the_first_ends_before_the_others_do() -> str:
    """Rank 0 closes its pipeline; of the others, each waits for the other alone, and not in vain."""
    channel, rank = control(), dist.get_rank()
    if rank > 0:
        channel.wait_for(lambda: 0 in channel.watch.ended, peer=3 - rank)
        assert not channel.wait_for(lambda: False, 3 * PATIENT.grace, peer=3 - rank)
        meet("others", 2)
    channel.close()
    channel.close()
    return str(channel.cause)


def two_pipelines_one_after_the_other() -> list[str]:
    said = []
    for round in range(2):
        channel = control()
        try:
            if dist.get_rank() == round:
                raise channel.report(channel.mine("", f"failure {round}"))
            wait(channel)
        except Exception as error:
            said.append(f"{type(error).__name__}: {error}")
        channel.close()
    return said


def one_waits_in_gloo(rank: int) -> None:
    """For a message that is not sent; rank 1 is killed meanwhile, or raises."""
    channel = control()
    dist.barrier()  # all connections are there
    if dist.get_rank() != 1:
        worker = Worker(channel, 1)
        announce("waiting")
        with raising_the_cause(channel):
            worker.call(lambda: dist.recv(torch.zeros(1), 1))
    elif rank == 1:
        meet("waiting", 2)
        raise channel.report(channel.mine("stage 1, 1F0", "ValueError: the model's own"))
    wait(channel)


def collectives(rounds: int) -> float:
    channel = control()
    worker, total = Worker(channel), torch.ones(1)
    for _ in range(rounds):
        worker.call(lambda: dist.all_reduce(total))
    with raising_the_cause(channel):
        worker.call(dist.barrier)
    channel.close()
    return total.item()
