"""``pipecompile doctor`` on virtual accelerators: their memory, peers, links, and a step over all of them."""

from __future__ import annotations

import virtual_device as vd
from machines import LATE

from pipecompile.cli.examination import all_devices, examine


def test_it_finds_devices_peers_links_and_an_exact_step() -> None:
    LATE.start()
    vd.limit(1, 1 << 28)
    found = examine(all_devices()[:3])
    assert [seen.device for seen in found.devices] == ["virt:0", "virt:1", "virt:2"]
    assert found.devices[1].total == 1 << 28
    assert found.devices[0].peers == ("virt:1", "virt:2")
    assert [link.devices for link in found.links] == [("virt:0", "virt:1"), ("virt:0", "virt:2"), ("virt:1", "virt:2")]
    assert all(link.bandwidth > 0 for link in found.links)
    assert found.exact
    assert found.step.startswith("a step split over virt:0, virt:1, virt:2 is exact")


def test_devices_without_peers_reach_nobody() -> None:
    LATE.start()
    vd.peers(False)
    assert [seen.peers for seen in examine(all_devices()[:2]).devices] == [(), ()]
