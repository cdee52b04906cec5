from __future__ import annotations

from launcher import Launcher


def test_a_packet_of_a_known_size_is_one_message_and_any_other_arrives_too(launcher: Launcher) -> None:
    """Three packets in each of six programs: unknown, known, larger than known, then never larger."""
    (sent, _), (_, right) = launcher.returned("lines_scenes:programs", 2)
    assert right
    assert sent == [6, 3, 6, 3, 3, 3]
