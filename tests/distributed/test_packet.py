"""A packet holds what was put into it, however many messages it takes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pipecompile.distributed.packet import HEAD, in_parts, packed, sizes, unpacked
from pipecompile.runtime.lane import Values

SOME: Values = (
    torch.arange(6.0).view(2, 3).requires_grad_(),
    None,
    torch.tensor([True, False]),
    torch.empty(0, 4, dtype=torch.bfloat16),
    torch.tensor(2.5, dtype=torch.float64),
    torch.randn(3, 4, 5).permute(2, 0, 1)[::2],
    torch.tensor([1 + 2j]).conj(),
    torch.empty(7, 8, dtype=torch.float16, device="meta").requires_grad_(),
)


def joined(messages: list[Tensor]) -> Tensor:
    return torch.cat(messages)


def same(one: Values, other: Values) -> bool:
    def alike(a: Tensor | None, b: Tensor | None) -> bool:
        if a is None or b is None:
            return a is b
        about = [(t.shape, t.dtype, t.requires_grad, t.device) for t in (a, b)]
        return about[0] == about[1] and (a.is_meta or torch.equal(a, b))

    return len(one) == len(other) and all(map(alike, one, other))


@pytest.mark.parametrize("room", [HEAD.size, 100, 10_000])
def test_what_was_packed_is_unpacked(room: int) -> None:
    messages = packed(SOME, room)
    assert len(messages) == (1 if room == 10_000 else 2)
    assert sizes(messages[0]) == (sum(map(len, messages)), len(messages[0]))
    assert len(messages[0]) <= room
    assert same(unpacked(joined(messages)), SOME)


GAPS: Values = (
    torch.randn(4, 2)[:, 0],
    (torch.randn(4, 6, 8) > 0)[..., 0],
    torch.randn(3).expand(5, 3),
    torch.ones(1).expand(7),
    torch.arange(9)[::2],
)


@pytest.mark.parametrize("values", [SOME, GAPS], ids=["some", "with gaps"])
def test_the_parts_of_a_packet_are_unpacked(values: Values) -> None:
    parts, nbytes = in_parts(values)
    message = torch.frombuffer(bytearray(b"".join(parts)), dtype=torch.uint8)
    assert len(message) == nbytes
    assert same(unpacked(message), values)


def test_a_packet_in_too_much_room_is_unpacked() -> None:
    (message,) = packed(SOME, 10_000)
    assert same(unpacked(torch.cat([message, torch.full((99,), 255, dtype=torch.uint8)])), SOME)


def test_no_values_are_a_packet_too() -> None:
    assert unpacked(joined(packed((), 10_000))) == ()


def test_a_packet_has_no_memory_of_its_values() -> None:
    value = torch.ones(3)
    messages = packed((value,), 10_000)
    value.zero_()
    assert torch.equal(unpacked(joined(messages))[0], torch.ones(3))


def test_a_tensor_that_fills_its_packet_is_not_copied() -> None:
    (message,) = packed((torch.ones(100),), 10_000)
    (value,) = unpacked(message)
    assert value.untyped_storage().data_ptr() == message.untyped_storage().data_ptr()


@pytest.mark.parametrize("unused", [0, 4096])
def test_no_tensor_keeps_the_memory_of_more_than_itself(unused: int) -> None:
    values = (torch.ones(100), torch.ones(2)) if not unused else (torch.ones(100),)
    (message,) = packed(values, 10_000)
    for value in unpacked(torch.cat([message, torch.zeros(unused, dtype=torch.uint8)])):
        assert value.untyped_storage().nbytes() == value.nbytes


def test_a_write_to_one_value_is_not_counted_for_another() -> None:
    for values in [(torch.ones(2), torch.ones(2)), (torch.ones(2),)]:
        message = joined(packed(values, 10_000))
        before, found = message._version, unpacked(message)
        found[0].add_(1)
        assert [value._version for value in found] == [1, *[0] * (len(found) - 1)]
        assert message._version == before
