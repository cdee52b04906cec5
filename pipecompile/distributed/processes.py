"""The processes of a pipeline, one for each rank, behind the interface that the runtime uses.

Whatever may wait for another process is done by a worker, so that the calling thread can be woken when a rank fails.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from pipecompile.distributed.control import Control, store_of_the_group
from pipecompile.distributed.exchange import exchange, spread
from pipecompile.distributed.lines import Lines
from pipecompile.distributed.measure import measure, with_measured_processes
from pipecompile.distributed.remote_transport import RemoteTransport
from pipecompile.distributed.watch import Cause, Pace
from pipecompile.distributed.worker import Worker
from pipecompile.errors import ExecutionError, InputError, RankError
from pipecompile.ir.cluster import Cluster
from pipecompile.runtime.lane import Lane
from pipecompile.runtime.transport import Aborted

T = TypeVar("T")
STAGE = "stage"  # name of the mesh dimension along which stages lie
FOREVER = timedelta(days=365)  # for gloo, whose own time-outs close connections; the control channel ends waits


class Processes:
    """One process for each rank of a pipeline.

    Args:
        ranks: the number of each of the pipeline's ranks among all processes.
        pace: how soon failures are noticed.
        spreads_all: whether every process gets all outputs, not only those that it needs.

    Attributes:
        rank: of this process in the pipeline.
    """

    are_several = True

    def __init__(self, ranks: Sequence[int], pace: Pace | None = None, spreads_all: bool = False) -> None:
        self.ranks_of_world = tuple(ranks)
        self.rank = self.ranks_of_world.index(dist.get_rank())
        self.pace = pace or Pace()
        self.spreads_all = spreads_all
        self.control = Control(self.rank, len(ranks), store_of_the_group(), self.pace)
        self.worker = Worker(self.control)
        self.group: dist.ProcessGroup = self._call(self._new_group)
        self.lines = Lines(self.control, self.ranks_of_world, self.group)
        self.carrier: RemoteTransport | None = None
        self.calls = 0

    def _new_group(self) -> dist.ProcessGroup:
        ranks = list(self.ranks_of_world)
        group: dist.ProcessGroup = dist.new_group(
            ranks, timeout=FOREVER, backend="gloo", use_local_synchronization=True
        )
        return group

    @staticmethod
    def of(mesh: DeviceMesh, spreads_all: bool = False) -> Processes:
        """The processes of the stages of a mesh.

        Raises:
            InputError: the mesh has other dimensions than one for stages, or is not one of CPU devices.
        """
        names = mesh.mesh_dim_names
        if mesh.device_type != "cpu":
            raise InputError(
                f"mesh= is one of {mesh.device_type} devices, but values travel between processes over gloo, from CPU "
                f"devices; use init_device_mesh('cpu', ...), or devices= for accelerators of one process"
            )
        if mesh.ndim != 1 or names not in (None, (STAGE,)):
            raise InputError(
                f"mesh= has the dimensions {names or mesh.ndim}, but pipelines are spread over one, of stages; use "
                f"init_device_mesh({mesh.device_type!r}, (n,), mesh_dim_names=({STAGE!r},))"
            )
        return Processes(mesh.mesh.flatten().tolist(), spreads_all=spreads_all)

    # What the runtime asks

    def ranks(self, count: int) -> Sequence[int]:
        return [self.rank]

    def transport(self, lanes: Mapping[int, Lane], rank_of: Sequence[int]) -> RemoteTransport:
        if self.carrier is None:  # one for all captures, which share their placement: their messages are in one order
            self.carrier = RemoteTransport(self.lines, lanes, rank_of)
        assert tuple(rank_of) == tuple(self.carrier.rank_of)
        return self.carrier

    def shared(self, make: Callable[[], T]) -> T:
        self.agree("a value that rank 0 computes for all")
        value, raised = pickle.loads(self._broadcast(_outcome(make) if self.rank == 0 else b"", 0))
        if raised is not None:
            raise raised
        return value  # type: ignore[no-any-return]

    def agree(self, what: str, tensors: Iterable[Tensor] = ()) -> None:
        self.calls += 1
        values = list(tensors)
        said = f"call {self.calls}, {what}"
        mine = torch.tensor([_digest(said.encode()), _digest(*map(_content, values))])
        with self._failing(said):
            found = exchange(self.lines, self.rank, mine, self.pace.absent)
        if all(torch.equal(other, found[0]) for other in found):
            return
        words: list[str] = [""] * len(found)
        sizes = ", ".join(str(list(value.shape)) for value in values)
        self._call(lambda: dist.all_gather_object(words, f"{said}, with inputs of sizes {sizes}", self.group))
        differing = next(rank for rank, other in enumerate(found) if not torch.equal(other, found[0]))
        reason = (
            "the values of their inputs differ"
            if words[differing] == words[0]
            else f"rank 0 is at {words[0]}, and rank {differing} at {words[differing]}"
        )
        raise InputError(
            f"ranks 0 and {differing} do not make the same call: {reason}; all ranks of a pipeline must make the same "
            f"calls on the same batches"
        )

    def same(self, what: str, text: str) -> None:
        self.agree(what)
        digests = self.gathered(_digest(text.encode()))
        odd = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
        if odd:
            raise InputError(
                f"{what} of {'rank' if len(odd) == 1 else 'ranks'} {', '.join(map(str, odd))} differs from that of "
                f"rank 0: the models, their settings or the versions of libraries differ; run the same script in the "
                f"same environment on all ranks"
            )

    def same_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Makes sure that named tensors have the same values in all processes.

        Raises:
            InputError: they do not; the message names the first one, and a rank.
        """
        self.agree("the weights of the model")
        digests = self.gathered({name: _content(tensor) for name, tensor in tensors.items()})
        for rank, other in enumerate(digests):
            for name, digest in digests[0].items():
                if other.get(name) != digest:
                    raise InputError(
                        f"{name!r} of rank {rank} differs from that of rank 0, but every process must build the same "
                        f"model; set the same seed before it is built, or load the same weights"
                    )

    def spread(
        self, made: Mapping[str, Tensor], makers: Mapping[str, int], wanted: Container[str]
    ) -> Mapping[str, Tensor]:
        with self._failing():
            return spread(self.lines, self.rank, made, makers, "all" if self.spreads_all else wanted)

    def measured(self, cluster: Cluster) -> Cluster:
        self.agree("to measure the links between processes")
        with self._failing():
            mine = measure(self.lines, self.rank, self.control.watch.host)
        return with_measured_processes(cluster, self.gathered(mine))

    def failure(self, error: BaseException) -> BaseException:
        if isinstance(error, Aborted):
            return self.control.error()
        if isinstance(error, RankError):
            return error
        found = self.control.report(self.control.mine("", f"{type(error).__name__}: {error}"))
        return found if isinstance(error, Exception) else error

    # Collectives

    def gathered(self, value: T) -> list[T]:
        """The value of each rank."""
        found: list[T | None] = [None] * len(self.ranks_of_world)
        self._call(lambda: dist.all_gather_object(found, value, self.group))
        return found  # type: ignore[return-value]

    def summed(self, tensor: Tensor) -> Tensor:
        """The sum of the ranks' tensors, in the order of the ranks."""
        found = [torch.empty_like(tensor) for _ in self.ranks_of_world]
        self._call(lambda: dist.all_gather(found, tensor.contiguous(), self.group))
        total = found[0]
        for other in found[1:]:
            total = total + other
        return total

    def close(self) -> None:
        """Waits for what is under way, and ends the control channel."""
        if self.control.cause is None:
            self.lines.flush()
            self._call(lambda: dist.barrier(self.group))
        self.control.close()

    def _broadcast(self, content: bytes, source: int) -> bytes:
        """The bytes of one rank in all of them."""
        box = [content]
        self._call(lambda: dist.broadcast_object_list(box, self.ranks_of_world[source], self.group))
        return box[0]

    def _call(self, collective: Callable[[], T]) -> T:
        """Runs a collective in the worker.

        Raises:
            RankError: a rank has failed.
        """
        with self._failing():
            return self.worker.call(collective)

    @contextmanager
    def _failing(self, what: str = "") -> Iterator[None]:
        """Raises, for a wait that was ended, the error of all ranks.

        Args:
            what: is waited for, if that may be too long.
        """
        try:
            yield
        except Aborted:
            raise self.control.error() from None
        except TimeoutError:
            waited = f"waited {self.pace.absent:g} s in {what} for the others, of which one makes no call"
            raise self.control.report(Cause(self.rank, self.control.watch.host, "", waited)) from None


def _outcome(make: Callable[[], object]) -> bytes:
    """What a function returns and raises, pickled; an error that cannot be pickled is told in words."""
    try:
        return pickle.dumps((make(), None))
    except Exception as error:
        try:
            pickle.loads(pickled := pickle.dumps((None, error)))
        except Exception:
            told = ExecutionError(f"rank 0 raised {type(error).__name__}: {error}; see its traceback")
            return pickle.dumps((None, told))
        return pickled


def _content(tensor: Tensor) -> bytes:
    """A digest of a tensor's values, type and sizes."""
    dense = tensor.detach().to_dense() if tensor.layout != torch.strided else tensor.detach()
    flat = dense.to("cpu").contiguous().reshape(-1)
    found = hashlib.blake2b(f"{tensor.dtype} {list(tensor.shape)}".encode(), digest_size=8)
    if flat.numel():
        found.update(flat.view(torch.uint8).numpy().data)
    return found.digest()


def _digest(*parts: bytes) -> int:
    found = hashlib.blake2b(b"".join(parts), digest_size=7).digest()
    return int.from_bytes(found, "little")
