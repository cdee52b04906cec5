"""The values of a transfer as bytes that say themselves what they contain.

    | bytes in all | those in the first message | those of the description | description | tensor | ... | mark |

The description is JSON. Each tensor begins at a multiple of ``ALIGNED`` bytes. One on the meta device is only
described. A packet travels as one message, or as two if it is larger than what its receiver has made room for.

Bytes arrive in their order. So the receiver of a single message knows from its memory that all of it is there, once
the mark is, which the two ends have agreed on and which is another one for each packet.
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
HEAD, MARK = struct.Struct("<QQQ"), struct.Struct("<Q")
NOTHING = bytes(HEAD.size)
LAYOUTS = 4096  # that are remembered

Part = bytes | memoryview
Said = tuple[tuple[int, ...], torch.dtype, bool, bool]  # shape, type, whether it requires a gradient, or is on meta


@dataclass(frozen=True)
class Spec:
    """What a packet says of one tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool
    is_meta: bool

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
        ends: of the values' bytes, each with its begin.
        filled: how many of the values have bytes.
        nbytes: in all.
    """

    specs: tuple[Spec | None, ...]
    ends: tuple[tuple[int, int], ...]
    filled: int
    nbytes: int


def packed(values: Values, room: int, mark: int = 0) -> list[Tensor]:
    """The one or two messages of some strided tensors, of which the first has at most ``room`` bytes.

    They share no memory with the values.
    """
    description, layout = _described(_spoken(values))
    whole = layout.nbytes
    packet = torch.empty(whole, dtype=torch.uint8)
    first = min(room, whole)
    content = packet.numpy().data
    HEAD.pack_into(content, 0, whole, first, len(description))
    content[HEAD.size : HEAD.size + len(description)] = description
    MARK.pack_into(content, whole - MARK.size, mark)
    with torch.no_grad():
        for value, view in zip(values, _views(packet, layout), strict=True):
            if value is not None and view is not None:
                view.copy_(value)
    return [packet] if first == whole else [packet[:first], packet[first:]]


def in_parts(values: Values) -> tuple[list[Part], int]:
    """A packet of one message as parts of memory that follow one another, and its bytes. They are read, not copied.

    Its mark is 0, for a way on which messages come whole.
    """
    opening, layout = _opened(_spoken(values))
    parts: list[Part] = [opening]
    place = len(opening)
    for value, (begin, end) in zip(values, layout.ends, strict=True):
        if value is not None and begin < end:
            parts += (bytes(begin - place), _memory(value)) if place < begin else (_memory(value),)
            place = end
    parts.append(bytes(layout.nbytes - place))
    return parts, layout.nbytes


def _memory(value: Tensor) -> Part:
    """The bytes of a tensor on the host, in the order of its entries; those of one with gaps are copied."""
    plain = value.detach().resolve_conj().resolve_neg().to("cpu").contiguous()
    return plain.reshape(-1).view(torch.uint8).numpy().data


def emptied(room: int) -> Tensor:
    """Memory for the first message of a packet, of ``room`` bytes at most, in which nothing has arrived."""
    message = torch.empty(room, dtype=torch.uint8)
    message.numpy().data[: HEAD.size] = NOTHING
    return message


def is_there(message: Tensor, mark: int) -> bool:
    """Whether a packet has arrived in the memory for its first message, which is all of it."""
    content = message.numpy().data
    whole, first, _ = HEAD.unpack_from(content)
    return bool(HEAD.size < whole == first <= len(content) and MARK.unpack_from(content, whole - MARK.size)[0] == mark)


def sizes(message: Tensor) -> tuple[int, int]:
    """The bytes of a packet, and those of them that its first message has."""
    whole, first, _ = HEAD.unpack_from(message.numpy().data)
    return whole, first


def unpacked(packet: Tensor) -> Values:
    """The values of a packet.

    One that fills the packet alone stays in its memory. Others get memory of their own, so that none keeps that of
    another, and each counts its own writes.
    """
    content = packet.numpy().data
    whole, _, length = HEAD.unpack_from(content)
    layout = _read(bytes(content[HEAD.size : HEAD.size + length]))
    views = _views(packet, layout)
    stays = layout.filled == 1 and packet.numel() == whole
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
        None if spec is None or begin == end else packet[begin:end].view(spec.dtype).view(spec.shape)
        for spec, (begin, end) in zip(layout.specs, layout.ends, strict=True)
    ]


def _spoken(values: Values) -> tuple[Said | None, ...]:
    """What a packet says of its values; cheaper than specs."""
    return tuple([None if v is None else (v.shape, v.dtype, v.requires_grad, v.is_meta) for v in values])


@lru_cache(LAYOUTS)
def _opened(values: tuple[Said | None, ...]) -> tuple[bytes, Layout]:
    """What comes before the values in a packet of one message."""
    description, layout = _described(values)
    return HEAD.pack(layout.nbytes, layout.nbytes, len(description)) + description, layout


@lru_cache(LAYOUTS)
def _described(values: tuple[Said | None, ...]) -> tuple[bytes, Layout]:
    specs = tuple(value and Spec(*value) for value in values)
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
    ends, begin = [], _aligned(HEAD.size + description)
    for spec in specs:
        ends.append((begin, begin + (spec.nbytes if spec else 0)))
        begin = _aligned(ends[-1][1])
    return Layout(tuple(specs), tuple(ends), sum(begin < end for begin, end in ends), begin + MARK.size)


def _aligned(place: int) -> int:
    return -(-place // ALIGNED) * ALIGNED
