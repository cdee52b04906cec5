"""The weights of a stage, in all versions that pending backwards still need.

A stage computes with leaves that share the memory of the model's parameters. Gradients accumulate in the leaves, and a
leaf keeps its memory when the parameter moves to new memory. A version is therefore stashed without a copy: an
optimizer step that would overwrite weights that forwards or pending backwards still use first gives each parameter new
memory. So the parameters always have the newest version. Other versions are dropped.

Source: PipeDream (SOSP 2019), section 3.3, weight stashing: a backward uses the version of its forward. As there,
optimizer state and buffers are not versioned.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from pipecompile.errors import ExecutionError
from pipecompile.ops.accelerators import used_here

MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


@dataclass(frozen=True, eq=False)
class Version:
    """One version of a stage's weights: leaves by name, and the parameters' version counters at that time."""

    leaves: Mapping[str, Tensor]
    counters: Mapping[str, int]


@dataclass(frozen=True, eq=False)
class Replica:
    """A copy of a tensor that has its home on another device.

    Attributes:
        version: the tensor's version counter when it was copied.
        source: its memory then, held so that other memory cannot have the same address.
    """

    version: int
    source: Tensor
    copy: Tensor


class Homes(Protocol):
    """Where the values of the model's tensors are between calls."""

    def home(self, tensor: Tensor) -> Tensor:
        """What is stepped for a tensor of the model: the tensor itself, or the rows of it that are here."""

    def gathered(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The values of those tensors whose home has only some of their rows, in memory of their own."""


class AtHome:
    """Each tensor of the model has its values itself."""

    def home(self, tensor: Tensor) -> Tensor:
        return tensor

    def gathered(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return {}


class Weights:
    """One stage's parameters and their versions.

    Args:
        tensors: the model's own parameters, and buffers on other devices, by name.
        device: the stage's device; tensors on other devices (a tied parameter, a shared buffer) are copied to it.
        optimizer: makes the optimizer, for schedules that step inside the pipeline.
        homes: of the tensors.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        device: torch.device,
        optimizer: MakeOptimizer | None = None,
        homes: Homes | None = None,
    ) -> None:
        self.tensors = dict(tensors)
        self.device = device
        self.homes = homes or AtHome()
        self.gathered: Mapping[str, Tensor] = {}  # in the present version
        trainable = [t for t in tensors.values() if isinstance(t, nn.Parameter) and t.requires_grad]
        self.optimizer = optimizer(trainable) if optimizer is not None and trainable else None
        self.written: Set[str] = frozenset()
        self.replicas: dict[str, Replica] = {}
        self.current = self._version()  # that forwards use
        self.made: deque[Version] = deque()  # newer ones, which forwards do not use yet
        self.touched: list[Version] = []  # versions with gradients since the last step
        self.peak = 1  # maximum number of live versions

    def begin(self, tensors: Mapping[str, Tensor], written: Set[str] = frozenset()) -> None:
        """Begins a pass with new leaves without gradients, on the present values of the tensors.

        Args:
            written: names of tensors that the call itself writes, after its forwards, which read copies.
        """
        self.written = written
        new = [t for name, t in tensors.items() if t.requires_grad and name not in self.tensors]
        self.tensors.update(tensors)
        if self.optimizer is not None and new:
            self.optimizer.add_param_group({"params": new})
        self.gathered = self.homes.gathered(self.tensors)
        self.current = self._version()
        self.made, self.touched = deque(), []  # left over from a stream that failed

    @contextmanager
    def aside(self, tensors: Mapping[str, Tensor], written: Set[str] = frozenset()) -> Iterator[None]:
        """A context that begins such a pass beside a stream, which later goes on with the versions that it had."""
        kept = self.current, self.made, self.touched, self.written
        self.begin(tensors, written)
        try:
            yield
        finally:
            self.current, self.made, self.touched, self.written = kept

    def release(self) -> None:
        """Lets go of what was gathered: pending backwards hold the versions that they need."""
        if self.gathered:
            self.gathered, self.current = {}, Version({}, {})

    def check(self, version: Version) -> None:
        """Raises ``ExecutionError`` if a parameter was changed in place since a version was made."""
        for name, counter in version.counters.items():
            if self.homes.home(self.tensors[name])._version != counter:
                raise ExecutionError(
                    f"parameter {name!r} was changed in place between the forward that used it and its backward; "
                    f"call backward() before optimizer.step()"
                )

    def touch(self, version: Version) -> None:
        """Records that a version has gradients for the next step."""
        if self.optimizer is not None:
            self.touched.append(version)

    def drop_gradients(self) -> None:
        """Drops what backwards have accumulated, after a failure."""
        for leaf in self.current.leaves.values():
            leaf.grad = None
        self.touched.clear()

    def update(self, pending: Iterable[Version]) -> None:
        """Makes a version by an optimizer step on the newest weights, with the gradients since the last one.

        Forwards use it after the ``step`` for it.

        Args:
            pending: the versions that pending backwards need.
        """
        self._optimize({*pending, self.current, *self.made})

    def step(self, pending: Iterable[Version]) -> None:
        """Lets forwards use the next version, which is made now if ``update`` has not made it.

        Args:
            pending: the versions that pending backwards need.
        """
        if not self.made:
            self._optimize(set(pending))
        self.current = self.made.popleft()

    def _optimize(self, needed: Set[Version]) -> None:
        self._gather()
        if (self.made[-1] if self.made else self.current) in needed:
            for tensor in self.tensors.values():
                if tensor.requires_grad:
                    used_here(tensor.data)  # by forwards and backwards that are queued, if it is the caller's memory
                    tensor.data = tensor.data.clone()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        self.made.append(self._version())
        self.peak = max(self.peak, len({*needed, *self.made}))

    def _gather(self) -> None:
        for version in self.touched:
            for name, leaf in version.leaves.items():
                if leaf.grad is not None:
                    parameter = self.tensors[name]
                    parameter.grad = leaf.grad if parameter.grad is None else parameter.grad + leaf.grad
                    leaf.grad = None
        self.touched.clear()

    def _version(self) -> Version:
        leaves = {name: self._leaf(name, tensor) for name, tensor in self.tensors.items()}
        trainable = {n: t for n, t in self.tensors.items() if t.requires_grad and n not in self.written}
        watched = {} if self.optimizer else {n: self.homes.home(t)._version for n, t in trainable.items()}
        return Version(leaves, watched)

    def _leaf(self, name: str, tensor: Tensor) -> Tensor:
        if name in self.gathered:
            leaf = self.gathered[name]
        else:
            leaf = tensor.data if tensor.device == self.device else self._replica(name, tensor)
        return leaf.detach().requires_grad_(tensor.requires_grad)

    def _replica(self, name: str, tensor: Tensor) -> Tensor:
        """A copy on this device, renewed when the tensor has changed."""
        known = self.replicas.get(name)
        if known is None or known.version != tensor._version or known.source.data_ptr() != tensor.data_ptr():
            known = self.replicas[name] = Replica(tensor._version, tensor.data, tensor.data.to(self.device))
        return known.copy
