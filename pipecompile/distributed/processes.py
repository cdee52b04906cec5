"""The processes of a pipeline, one for each rank and part of the batch, behind the interface that the runtime uses.

Whatever may wait for another process is done by a worker, so that the calling thread can be woken when a rank fails.
"""

from __future__ import annotations

import hashlib
import pickle
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from itertools import takewhile
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from pipecompile.distributed.background import Background
from pipecompile.distributed.control import Control, store_of_the_group
from pipecompile.distributed.crossing import staying
from pipecompile.distributed.exchange import exchange
from pipecompile.distributed.grid import Grid
from pipecompile.distributed.groups import make_as_many
from pipecompile.distributed.lines import Lines
from pipecompile.distributed.measure import measure, with_measured_processes
from pipecompile.distributed.members import Members
from pipecompile.distributed.progress import Progress, differences
from pipecompile.distributed.remote_transport import RemoteTransport
from pipecompile.distributed.shards import Shards
from pipecompile.distributed.watch import Cause, Pace
from pipecompile.distributed.worker import Worker
from pipecompile.errors import ExecutionError, InputError, RankError
from pipecompile.ir.cluster import Cluster
from pipecompile.ir.plan import Plan
from pipecompile.ops.freed_memory import give_back_much, keep_little
from pipecompile.runtime.lane import Lane, Values
from pipecompile.runtime.transport import Aborted

T = TypeVar("T")
LONGEST = 200  # characters of an option that are said
MISSING = "nothing"  # is said of an option that a process does not have


class Processes:
    """One process for each rank of a pipeline, on each part of the batch.

    Args:
        grid: of all of them.
        pace: how soon failures are noticed.

    Attributes:
        part, rank: of this process.
        place: among all; errors call it the rank of the process.
        all: all processes.
        row: those of this part, by rank; values travel between them.
        column: those of this rank, by part; they have the same parameters. None if there is one part.
        shards: the parameters of which each of ``column`` keeps a part, if any.
        progress: what this process has done with its gradients.
    """

    are_several = True

    def __init__(self, grid: Grid, pace: Pace | None = None) -> None:
        keep_little()
        self.grid = grid
        self.part, self.rank = grid.find(dist.get_rank())
        self.pace = pace or Pace()
        self._agreement: Callable[[], None] | None = None  # that was begun, and is not waited for yet
        self.place = grid.place(self.part, self.rank)
        self.control = Control(self.place, len(grid.all), store_of_the_group(grid.all), self.pace)
        self.worker = Worker(self.control)
        with staying(self.control.watch, "compile()", grid.all):
            self._call(partial(make_as_many, self.control.watch))
            self.all = Members(grid.all, self._call)
            self.row = self.all if grid.parts == 1 else Members(grid.row(self.part), self._call)
            self.column = Members(grid.column(self.rank), self._call) if grid.parts > 1 else None
        self.lines = Lines(self.control, self.row, [grid.place(self.part, rank) for rank in range(grid.ranks)])
        self.lines_to_all = self.lines if grid.parts == 1 else Lines(self.control, self.all, range(len(grid.all)))
        self.shards: Shards | None = None
        self.calls = 0
        self.progress = Progress()
        self._told: set[str] = set()  # of the progress of others
        self._refusal: InputError | None = None  # the last one, which all processes raise
        self._done: list[str] = []  # since the last agreement
        self._background: Background | None = None

    # What the runtime asks

    @property
    def said(self) -> Sequence[str]:
        return list(dict.fromkeys([*self.lines.said, *self.lines_to_all.said]))

    def ranks(self, count: int) -> Sequence[int]:
        return [self.rank]

    def transport(self, lanes: Mapping[int, Lane], plan: Plan) -> RemoteTransport:
        return RemoteTransport(self.lines, lanes, plan)

    def shared(self, make: Callable[[], T]) -> T:
        self.agree("a value that rank 0 computes for all")
        with self._failing():  # an interrupt of the first process: the others wait for what it makes
            mine = _outcome(make) if self.place == 0 else b""
        value, raised = pickle.loads(self.all.broadcast(mine, 0))
        if raised is not None:
            raise raised
        return value  # type: ignore[no-any-return]

    def agree(self, what: str, tensors: Iterable[Tensor] = ()) -> None:
        self._begin_to_agree(what, tensors)
        self.agreed()

    def agreed(self) -> None:
        agreement, self._agreement = self._agreement, None
        if agreement is not None:
            agreement()

    def begin_to_agree(self, what: str, tensors: Iterable[Tensor] = ()) -> None:
        self._begin_to_agree(what, tensors, self.progress.told())

    def _begin_to_agree(self, what: str, tensors: Iterable[Tensor], progress: int = 0) -> None:
        self.agreed()
        self.calls += 1
        values = list(tensors)
        said, done = f"call {self.calls}, {what}", "".join(f", after {done}" for done in self._done)
        self._done.clear()
        mine = torch.tensor([_digest(said.encode(), done.encode()), _digest(*map(_content, values)), progress])
        with self._failing(said):
            exchanged = exchange(self.lines_to_all, self.place, mine, self.pace.absent)

        def agreed() -> None:
            with self._failing(said), staying(self.control.watch, said, self.grid.all):
                found = exchanged()
            if not all(torch.equal(other, found[0]) for other in found):
                self._compare(said, done, values, [other.tolist() for other in found])

        self._agreement = agreed

    def _compare(self, said: str, done: str, values: Sequence[Tensor], found: Sequence[Sequence[int]]) -> None:
        """Refuses calls that differ, and warns once of steps that do; arguments are those of ``_refuse``."""
        *calls, progress = zip(*found, strict=True)
        if any(len(set(each)) > 1 for each in calls):
            self._refuse(said, done, values, [tuple(each[:-1]) for each in found])
        for difference in differences(progress):
            if difference not in self._told:
                self._told.add(difference)
                warnings.warn(difference, stacklevel=2)

    def _refuse(self, said: str, done: str, values: Sequence[Tensor], found: Sequence[tuple[int, ...]]) -> NoReturn:
        """Raises the error about calls that differ, in all processes.

        Args:
            said, done, values: of this process's call: what it is, what was done before, its inputs.
            found: what the processes have exchanged.
        """
        sizes = ", ".join(str(list(value.shape)) for value in values)
        each = self.all.gathered((f"{said}, with inputs of sizes {sizes}" if values else said, done))
        differing = next(rank for rank, other in enumerate(found) if other != found[0])
        alike = each[differing][0] == each[0][0]  # then what was done before tells them apart, or the values
        words = [text + done if alike else text for text, done in each]
        reason = (
            "the values of their inputs differ"
            if words[differing] == words[0]
            else f"rank 0 is at {words[0]}, and rank {differing} at {words[differing]}"
        )
        parts = ", whose parts differ in their numbers of rows only (pad all sequences to one length)"
        self._refusal = InputError(
            f"ranks 0 and {differing} do not make the same call: {reason}; all ranks of a pipeline must make the same "
            f"calls on the same batches{parts * (self.column is not None)}"
        )
        raise self._refusal

    def note(self, what: str) -> None:
        self._done.append(what)

    def receives(self, leaves: Sequence[Tensor]) -> None:
        if leaves:
            self.progress.receives(self.home(leaves[0]))

    def same(self, what: str, text: str) -> None:
        self.agree(what)
        digests = self.all.gathered(_digest(text.encode()))
        odd = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
        if odd:
            raise InputError(
                f"{what} of {'rank' if len(odd) == 1 else 'ranks'} {', '.join(map(str, odd))} differs from that of "
                f"rank 0: the models, their settings or the versions of libraries differ; run the same script in the "
                f"same environment on all ranks"
            )

    def same_options(self, options: Mapping[str, str], of: str = "compile()") -> None:
        """Makes sure that named options have the same texts in all processes.

        Args:
            of: what got them.

        Raises:
            InputError: they do not; the message has the first option that differs, and both texts.
        """
        self.agree(f"the options of {of}")
        each = self.all.gathered(dict(options))
        for rank, other in enumerate(each):
            for name in each[0] | other:
                text, its = each[0].get(name, MISSING), other.get(name, MISSING)
                if its != text:
                    mine, its = _where_they_differ(text, its)
                    raise InputError(
                        f"{of} got {name}={mine} in rank 0, and {name}={its} in rank {rank}; pass the "
                        f"same options in all processes"
                    )

    def same_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Makes sure that tensors have the same values in all processes.

        Args:
            tensors: by what the message calls them.

        Raises:
            InputError: they do not; the message names the first one, and a rank.
        """
        self.agree("the weights of the model")
        digests = self.all.gathered({name: _content(tensor) for name, tensor in tensors.items()})
        for rank, other in enumerate(digests):
            for name in digests[0] | other:
                if other.get(name) != digests[0].get(name):
                    raise InputError(
                        f"{name} of rank {rank} differs from that of rank 0, but every process must build the same "
                        f"model; set the same seed before it is built, or load the same weights"
                    )

    def ended(self) -> None:
        give_back_much()

    def measured(self, cluster: Cluster) -> Cluster:
        self.agree("to measure the links between processes")
        with self._failing():
            mine = measure(self.lines, self.rank, self.control.watch.host)
        return with_measured_processes(cluster, self.all.gathered(mine)[: self.grid.ranks])  # of the first part

    def of_each(self, value: T) -> Sequence[T]:
        self.agree("values of all processes")
        return self.all.gathered(value)

    def of_all_parts(self, values: Mapping[str, Tensor]) -> Mapping[str, Sequence[Tensor]]:
        if self.column is None:
            return {name: [value] for name, value in values.items()}
        mine = {name: value.detach().to("cpu") for name, value in values.items()}
        each = self.column.gathered(mine)
        return {name: [mine_of[name].to(value.device) for mine_of in each] for name, value in values.items()}

    def home(self, tensor: Tensor) -> Tensor:
        return tensor if self.shards is None else self.shards.home(tensor)

    def gathered(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return {} if self.shards is None else self.shards.gathered(tensors)

    def total(self, gradients: dict[int, Tensor], leaves: Sequence[Tensor]) -> dict[int, Tensor]:
        if self.column is None:
            return gradients
        each = {id(leaf): leaf for leaf in leaves}
        present = self.column.gathered([key in gradients for key in each])
        keys = [key for key, *somewhere in zip(each, *present, strict=True) if any(somewhere)]
        shards = self.shards
        divided = [key for key in keys if shards is not None and key in shards.divided]
        keys = [key for key in keys if key not in divided]
        found = [gradients[key] if key in gradients else torch.zeros_like(each[key]) for key in keys]
        sums = dict(zip(keys, self.column.totals(found), strict=True))
        return sums if shards is None else sums | shards.totals(gradients, divided)

    def failure(self, error: BaseException) -> BaseException:
        if isinstance(error, Aborted):
            return self.control.error()
        if isinstance(error, RankError) or error is self._refusal:
            return error
        found = self.control.report(self.control.mine("", f"{type(error).__name__}: {error}".rstrip(": ")))
        return found if isinstance(error, Exception) else error

    @property
    def failed_elsewhere(self) -> bool:
        """Whether another process than this one has failed."""
        return self.control.cause is not None and self.control.cause.rank != self.place

    def passed(self, given: Mapping[int, Values], sources: Iterable[int]) -> dict[int, Values]:
        """Sends tensors to ranks of this part, and returns those that others send to this one.

        Args:
            given: by rank.
            sources: the ranks that send some.
        """
        with self._failing():
            coming = {rank: self.lines.get(rank) for rank in sources}
            for rank, values in given.items():
                self.lines.put(rank, values)
            return {rank: get() for rank, get in coming.items()}

    # What goes on beside the calls

    @property
    def background(self) -> Background:
        """Collectives beside those of the calls. All processes must ask for it first at the same point."""
        if self._background is None:
            self._background = Background(Worker(self.control), Members(self.grid.all, self._call))
        return self._background

    def waited(self, future: Future[T]) -> T:
        """The result of a job of the background.

        Raises:
            RankError: a rank has failed.
        """
        try:
            return self.background.worker.wait(future)
        except Aborted:
            raise self.control.error() from None

    def close(self) -> None:
        """Waits until all others close the pipeline too, and ends the control channel.

        Raises:
            InputError: one of them makes a call instead.
        """
        if self.control.watch.closed:
            return
        try:
            if self.control.cause is None:
                self.agree("to close the pipeline")
                with self._failing():
                    self.lines.flush()
                    self.lines_to_all.flush()
        finally:
            self.control.close()
            self.lines.close()
            self.lines_to_all.close()

    def _call(self, collective: Callable[[], T]) -> T:
        """Runs a collective in the worker.

        Raises:
            RankError: a rank has failed.
        """
        self.agreed()
        with self._failing():
            return self.worker.call(collective)

    @contextmanager
    def _failing(self, what: str = "") -> Iterator[None]:
        """Raises, for a wait that was ended, the error of all ranks.

        So does whatever else ends it, such as Ctrl-C: what was waited for would come later, and be taken for something
        else.

        Args:
            what: is waited for, if that may be too long.
        """
        try:
            yield
        except Aborted:
            raise self.control.error() from None
        except TimeoutError:
            waited = f"waited {self.pace.absent:g} s in {what} for the others, of which one makes no call"
            raise self.control.report(Cause(self.place, self.control.watch.host, "", waited)) from None
        except BaseException as error:
            failure = self.failure(error)
            if failure is error:
                raise
            raise failure from error


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


def _where_they_differ(one: str, other: str) -> tuple[str, str]:
    """Two texts, of long ones what is around the first difference."""
    alike = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
    start = max(0, alike - LONGEST // 2)
    return _from(one, start), _from(other, start)


def _from(text: str, start: int) -> str:
    if len(text) <= LONGEST:
        return text
    return f"{'...' * (start > 0)}{text[start : start + LONGEST]}{'...' * (start + LONGEST < len(text))}"


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
