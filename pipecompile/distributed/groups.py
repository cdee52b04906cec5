"""As many process groups in all processes of a pipeline.

torch names a group that only its members make by their numbers and by how many groups a process has. A process that is
in fewer groups than another one, because a group of the script's own or a pipeline of other processes has only some of
them, would wait for a group of another name, for ever. It gets groups of its own, of one process each.
"""

from __future__ import annotations

import time

import torch.distributed as dist

from pipecompile.distributed.watch import Store, Watch
from pipecompile.ops.torch_internals import num_process_groups

PAUSE = 0.002  # seconds; each is longer than the one before


def make_as_many(watch: Watch) -> None:
    """Waits for all processes of a pipeline, and makes groups until this one has as many as any of them.

    Called where the wait can be left. It ends when one of them has failed.
    """
    store, mine, pause = watch.store(), num_process_groups(), PAUSE
    most = _at_least(store, mine)
    arrived = store.add("counted", 1)
    while arrived < watch.size and not (watch.cause or watch.closed):
        time.sleep(pause)
        pause = min(1.5 * pause, watch.pace.beat)
        arrived = store.add("counted", 0)
    most = _at_least(store, mine)
    for _ in range(most - mine):
        dist.new_group([dist.get_rank()], backend="gloo", use_local_synchronization=True)


def _at_least(store: Store, number: int) -> int:
    """The largest number that a process has said."""
    most = int(store.compare_set("groups", "", str(number)))
    while number > most:
        most = int(store.compare_set("groups", str(most), str(number)))
    return most
