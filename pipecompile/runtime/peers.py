"""The processes that run a pipeline together: one process for all ranks, or one for each.

Besides the ``Transport``, what depends on their number is behind ``Peers``: a call asks it for the ranks that it runs
itself, and for values that all processes must share. In one process it answers with what it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol, TypeVar

from torch import Tensor

from pipecompile.ir.cluster import Cluster
from pipecompile.ir.plan import Plan
from pipecompile.runtime.lane import Lane
from pipecompile.runtime.transport import LocalTransport, Transport
from pipecompile.runtime.weights import AtHome, Homes

T = TypeVar("T")


class Peers(Homes, Protocol):
    """The processes of one pipeline, seen from one of them."""

    @property
    def are_several(self) -> bool:
        """Whether there are other processes."""

    @property
    def calls(self) -> int:
        """How many agreements were begun: the number of the last one, in all processes."""

    @property
    def said(self) -> Sequence[str]:
        """What is told of the links between the processes, for the report."""

    def ranks(self, count: int) -> Sequence[int]:
        """The ranks, of ``count``, that this process runs."""

    def transport(self, lanes: Mapping[int, Lane], plan: Plan) -> Transport:
        """Carries results between ranks.

        Args:
            lanes: by rank, those of this process.
            plan: the ranks of the stages.
        """

    def shared(self, make: Callable[[], T]) -> T:
        """What ``make`` returns, or raises, in the first process, which alone calls it, in all of them."""

    def agree(self, what: str, tensors: Iterable[Tensor] = ()) -> None:
        """Makes sure that all processes are about to do the same, on the same values.

        Raises:
            InputError: one of them does something else; raised in all processes.
            RankError: one of them does nothing for too long.
        """

    def begin_to_agree(self, what: str, tensors: Iterable[Tensor] = ()) -> None:
        """As ``agree``, but does not wait for the others: ``agreed`` does, before anything else is sent to them."""

    def agreed(self) -> None:
        """Waits for the agreement that was begun, if there is one; raises as ``agree``."""

    def note(self, what: str) -> None:
        """Takes note of what this process has done alone, which the next agreement compares."""

    def receives(self, leaves: Sequence[Tensor]) -> None:
        """Takes note that gradients come to these tensors, which this process has."""

    def same(self, what: str, text: str) -> None:
        """Makes sure that a text is the same in all processes.

        Raises:
            InputError: it is not; the message names ``what`` and the ranks.
        """

    def of_each(self, value: T) -> Sequence[T]:
        """The values of all processes, which must be about to do the same."""

    def of_all_parts(self, values: Mapping[str, Tensor]) -> Mapping[str, Sequence[Tensor]]:
        """The values of each part of the batch, in order, of which this process has those of its own part."""

    def total(self, gradients: dict[int, Tensor], leaves: Sequence[Tensor]) -> dict[int, Tensor]:
        """The sums of the gradients of all parts of the batch, by ``id`` of the leaf, for its home.

        Args:
            gradients: of this process's part; may be written, and emptied.
            leaves: all that may have a gradient, in an order that is the same in all processes.
        """

    def ended(self) -> None:
        """Takes note that a program has ended, well or not."""

    def measured(self, cluster: Cluster) -> Cluster:
        """The cluster with the links between processes and the speeds of their hosts, measured by all of them."""

    def failure(self, error: BaseException) -> BaseException:
        """The error to raise for one that this process has met; the same in all processes."""


class OneProcess(AtHome):
    """All ranks are in this process."""

    are_several = False
    calls = 0
    said = ()

    def ranks(self, count: int) -> Sequence[int]:
        return range(count)

    def transport(self, lanes: Mapping[int, Lane], plan: Plan) -> Transport:
        return LocalTransport(lanes, plan)

    def shared(self, make: Callable[[], T]) -> T:
        return make()

    def agree(self, what: str, tensors: Iterable[Tensor] = ()) -> None:
        pass

    def begin_to_agree(self, what: str, tensors: Iterable[Tensor] = ()) -> None:
        pass

    def agreed(self) -> None:
        pass

    def note(self, what: str) -> None:
        pass

    def receives(self, leaves: Sequence[Tensor]) -> None:
        pass

    def same(self, what: str, text: str) -> None:
        pass

    def of_each(self, value: T) -> Sequence[T]:
        return [value]

    def of_all_parts(self, values: Mapping[str, Tensor]) -> Mapping[str, Sequence[Tensor]]:
        return {name: [value] for name, value in values.items()}

    def total(self, gradients: dict[int, Tensor], leaves: Sequence[Tensor]) -> dict[int, Tensor]:
        return gradients

    def ended(self) -> None:
        pass

    def measured(self, cluster: Cluster) -> Cluster:
        return cluster

    def failure(self, error: BaseException) -> BaseException:
        return error
