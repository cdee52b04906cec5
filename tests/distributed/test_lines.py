from __future__ import annotations

import pytest
from launcher import Launcher

from pipecompile.distributed import near


@pytest.mark.parametrize("within_the_host", [True, False])
def test_a_packet_of_a_known_size_is_one_message_and_any_other_arrives_too(
    launcher: Launcher, within_the_host: bool
) -> None:
    """Three packets in each of six programs: unknown, known, larger than known, then never larger."""
    (over_gloo, inside, _), (_, _, right) = launcher.returned(
        "lines_scenes:programs", 2, within_the_host=within_the_host
    )
    assert right
    assert [a + b for a, b in zip(over_gloo, inside, strict=True)] == [6, 3, 6, 3, 3, 3]
    first = 3 if within_the_host and near._host() is not None else 0
    assert inside == [first] * 6


def test_packets_that_wait_for_their_reader_come_in_order(launcher: Launcher) -> None:
    assert launcher.returned("lines_scenes:many", 2) == [[], [True, True]]
