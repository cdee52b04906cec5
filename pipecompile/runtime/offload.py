"""What a forward saves for its backward, on its way to the host's memory and back.

Hooks on saved tensors see what autograd saves while a stage's forward runs. Autograd keeps a ``Packed`` in place of
each tensor. An Offload copies the storages behind them, each once, however many tensors and views share it:

    Forward        packed -> tensor                 as without offload
    Offload        packed -> tensor                 the copy to pinned memory is queued on a stream of its own
    when it ends   packed -> bytes on the host      the device's memory is free
    Fetch          packed -> bytes on the device    in new memory; the copy is queued on another stream
    Backward       autograd asks for the tensor: a view of the bytes, as it was

What stays on the device: what others hold, and would hold anyway. Parameters, buffers, inputs, values of other stages
and results are known. Whether anything else holds a storage (autocast's cache of weights, the arguments of a
checkpoint) shows in the number of its uses.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from pipecompile.errors import ExecutionError
from pipecompile.ops.torch_internals import _storage_Use_Count
from pipecompile.runtime.lane import Lane, Sent


class View(NamedTuple):
    """A tensor as a view of its storage."""

    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int

    @staticmethod
    def of(tensor: Tensor) -> View:
        return View(tensor.dtype, tensor.shape, tensor.stride(), int(tensor.storage_offset()))

    def on(self, storage: torch.UntypedStorage) -> Tensor:
        empty = torch.empty(0, dtype=self.dtype, device=storage.device)
        return empty.set_(storage, self.offset, self.shape, self.stride)


@dataclass(eq=False)
class Box:
    """The bytes of one storage, on the host or the device."""

    bytes: Tensor


class Packed:
    """What autograd keeps in place of a tensor."""

    __slots__ = ("__weakref__", "box", "tensor", "version", "view")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor: Tensor | None = tensor
        self.version = tensor._version
        self.box: Box | None = None
        self.view: View | None = None

    def unpack(self) -> Tensor:
        """The tensor, for a function's backward.

        Raises:
            RuntimeError: it was written since it was saved, as autograd says without hooks.
        """
        if self.tensor is not None:
            self.check()
            return self.tensor
        assert self.box is not None, "a tensor is on the device, or its bytes are somewhere"
        assert self.view is not None
        return self.view.on(self.box.bytes.untyped_storage())

    def check(self) -> None:
        if self.tensor is not None and self.tensor._version != self.version:
            raise RuntimeError(
                f"one of the variables needed for gradient computation has been modified by an inplace operation: a "
                f"tensor of shape {list(self.tensor.shape)} is at version {self.tensor._version}; expected version "
                f"{self.version} instead"
            )

    def leave(self, box: Box) -> None:
        """Lets go of the tensor, whose bytes are elsewhere."""
        assert self.tensor is not None
        self.view, self.tensor, self.box = View.of(self.tensor), None, box


@dataclass
class Leaving:
    """Storages on their way to the host.

    Attributes:
        packed: the tensors on each of them.
        sources: the storages as bytes, held while they are copied.
        sent: their copies.
    """

    packed: list[list[ref[Packed]]]
    sources: list[Tensor]
    sent: Sent

    def end(self, lane: Lane) -> None:
        """Frees the device's memory, after the copies ([3])."""
        lane.wait(self.sent.ready)
        self.sources.clear()
        for group, copy in zip(self.packed, self.sent.values, strict=True):
            assert copy is not None
            box = Box(copy)
            for each in _alive(group):
                each.leave(box)


class Kept:
    """What one forward has saved for its backward."""

    def __init__(self) -> None:
        self.packed: list[ref[Packed]] = []
        self.ready: torch.Event | None = None  # after a Fetch

    @contextmanager
    def watched(self) -> Iterator[None]:
        """A context for the forward."""
        with saved_tensors_hooks(self._pack, _unpack):
            yield

    def _pack(self, tensor: Tensor) -> Any:
        tensor = tensor.detach()  # a result would hold the function that saves it
        if not is_plain(tensor):
            return tensor
        packed = Packed(tensor)
        self.packed.append(ref(packed))
        return packed

    def leave(self, lane: Lane, staying: Set[int]) -> Leaving:
        """Begins to copy to the host what can leave.

        Args:
            staying: addresses of storages that do not leave.

        Raises:
            RuntimeError: a tensor was written since it was saved.
        """
        groups: dict[int, list[Packed]] = {}
        for packed in _alive(self.packed):
            packed.check()
            tensor = packed.tensor
            assert tensor is not None, "it leaves once"
            address = tensor.untyped_storage().data_ptr()
            if tensor.device == lane.device and address and address not in staying:
                groups.setdefault(address, []).append(packed)
        groups = {address: group for address, group in groups.items() if not _has_others(group)}
        sources = [_bytes_of(group[0].tensor) for group in groups.values() if group[0].tensor is not None]
        return Leaving([list(map(ref, group)) for group in groups.values()], sources, lane.to_host(sources))

    def come_back(self, lane: Lane) -> Sent:
        """Begins to copy back to the device what has left; the backward waits for it (``ready``)."""
        away = {id(packed.box): packed.box for packed in _alive(self.packed) if packed.box is not None}
        boxes = [*away.values()]
        sent = lane.from_host([box.bytes for box in boxes])
        for box, fresh in zip(boxes, sent.values, strict=True):
            assert fresh is not None
            box.bytes = fresh
        self.packed, self.ready = [], sent.ready
        return sent


def address_of(tensor: Tensor) -> int:
    """Of a tensor's storage; 0 if it has none of its own."""
    return tensor.untyped_storage().data_ptr() if is_plain(tensor) else 0


def hooks_refused(error: BaseException) -> ExecutionError | None:
    """The error that says what to do about a function that does not allow hooks on saved tensors; None for others."""
    if "saved tensor hooks" not in str(error):
        return None
    return ExecutionError(
        f"{error}; offloading needs hooks on what a stage saves for its backward, which this function does not allow: "
        f"use PlanOptions(offload='never'), or recompute='always'"
    )


def _unpack(packed: Any) -> Tensor:
    found: Tensor = packed.unpack() if isinstance(packed, Packed) else packed
    return found


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is a view of a storage and nothing else: no classes of its own, sparse rows, conjugates."""
    kinds = (Tensor, torch.nn.Parameter)
    return (
        type(tensor) in kinds
        and tensor.layout == torch.strided
        and not (tensor.is_quantized or tensor.is_conj() or tensor.is_neg())
    )


def holders(tensor: Tensor) -> int:
    """How many tensors share a plain tensor's storage, itself included."""
    storage = tensor.untyped_storage()
    return int(_storage_Use_Count(storage._cdata)) - 1  # this name


def _has_others(group: Sequence[Packed]) -> bool:
    """Whether the storage of some packed tensors is held by anything else."""
    assert group[0].tensor is not None
    return holders(group[0].tensor) > len(group)


def _bytes_of(tensor: Tensor) -> Tensor:
    """The whole storage of a tensor."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


def _alive(packed: Sequence[ref[Packed]]) -> list[Packed]:
    return [found for each in packed if (found := each()) is not None]
