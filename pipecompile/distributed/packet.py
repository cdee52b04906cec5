"""The values of a transfer as bytes that say themselves what they contain.

    | bytes in all | bytes in the first message | bytes of the description | description | tensor | tensor | ...

The description is JSON. Each tensor begins at a multiple of ``ALIGNED`` bytes. One on the meta device is only
described. A packet travels as one message, or as two if it is larger than what its receiver has made room for.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from pipecompile.runtime.lane import Value, Values

ALIGNED = 64
HEAD = struct.Struct("<QQQ")
LAYOUTS = 4096  # that are remembered


@dataclass(frozen=True)
class Spec:
    """What a packet says of one tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool
    is_meta: bool

    @staticmethod
    def of(value: Tensor) -> Spec:
        return Spec(tuple(value.shape), value.dtype, value.requires_grad, value.is_meta)

    @property
    def nbytes(self) -> int:
        """Of its values."""
        return 0 if self.is_meta else torch.Size(self.shape).numel() * self.dtype.itemsize

    def empty(self) -> Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device="meta" if self.is_meta else "cpu")


@dataclass(frozen=True)
class Layout:
    """Where the parts of a packet are.

    Attributes:
        specs: of its values.
        starts: of the values' bytes.
        nbytes: in all.
    """

    specs: tuple[Spec | None, ...]
    starts: tuple[int, ...]
    nbytes: int


def packed(values: Values, room: int) -> list[Tensor]:
    """The one or two messages of some strided tensors, of which the first has at most ``room`` bytes.

    They share no memory with the values.
    """
    specs = tuple(None if value is None else Spec.of(value) for value in values)
    description, layout = _described(specs)
    packet = torch.empty(layout.nbytes, dtype=torch.uint8)
    first = min(room, layout.nbytes)
    head = bytearray(HEAD.pack(layout.nbytes, first, len(description)) + description)
    packet[: len(head)] = torch.frombuffer(head, dtype=torch.uint8)
    for value, view in zip(values, _views(packet, layout), strict=True):
        if value is not None and view is not None:
            view.copy_(value.detach())
    return [packet] if first == layout.nbytes else [packet[:first], packet[first:]]


def sizes(message: Tensor) -> tuple[int, int]:
    """The bytes of a packet, and those of them that its first message has."""
    whole, first, _ = HEAD.unpack_from(message.numpy().data)
    return whole, first


def unpacked(packet: Tensor) -> Values:
    """The values of a packet.

    One that fills the packet alone stays in its memory. Others get memory of their own, so that none keeps that of
    another, and each counts its own writes.
    """
    content = packet.numpy()
    whole, _, length = HEAD.unpack_from(content.data)
    layout = _read(content[HEAD.size : HEAD.size + length].tobytes())
    views = _views(packet, layout)
    stays = sum(view is not None for view in views) == 1 and packet.numel() == whole
    return tuple(_value(spec, view, stays) for spec, view in zip(layout.specs, views, strict=True))


def _value(spec: Spec | None, view: Tensor | None, stays: bool) -> Value:
    if spec is None:
        return None
    if view is None:
        return spec.empty().requires_grad_(spec.requires_grad)
    return (view.data if stays else view.clone()).requires_grad_(spec.requires_grad)


def _views(packet: Tensor, layout: Layout) -> list[Tensor | None]:
    """The places of the values in a packet; None for what has no bytes."""
    return [
        packet[start : start + spec.nbytes].view(spec.dtype).view(spec.shape) if spec and spec.nbytes else None
        for spec, start in zip(layout.specs, layout.starts, strict=True)
    ]


@lru_cache(LAYOUTS)
def _described(specs: tuple[Spec | None, ...]) -> tuple[bytes, Layout]:
    said = [
        spec and [spec.shape, str(spec.dtype).removeprefix("torch."), spec.requires_grad, spec.is_meta]
        for spec in specs
    ]
    description = json.dumps(said).encode()
    return description, _layout(specs, len(description))


@lru_cache(LAYOUTS)
def _read(description: bytes) -> Layout:
    specs = [
        said and Spec(tuple(said[0]), getattr(torch, said[1]), said[2], said[3]) for said in json.loads(description)
    ]
    return _layout(specs, len(description))


def _layout(specs: Sequence[Spec | None], description: int) -> Layout:
    starts, end = [], _aligned(HEAD.size + description)
    for spec in specs:
        starts.append(end)
        end = _aligned(end + (spec.nbytes if spec else 0))
    return Layout(tuple(specs), tuple(starts), end)


def _aligned(place: int) -> int:
    return -(-place // ALIGNED) * ALIGNED
