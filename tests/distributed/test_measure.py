"""The links between processes are measured by pairs, and the plan follows them."""

from __future__ import annotations

from itertools import combinations

import pytest
from launcher import Launcher
from measure_scenes import FAST, SLOW

from pipecompile.distributed.measure import ALL_PAIRS, SIZES, Measured, rounds, with_measured_processes
from pipecompile.ir.cluster import Cluster, Link


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8, ALL_PAIRS])
def test_all_pairs_are_measured_once_and_no_rank_twice_at_a_time(size: int) -> None:
    found = [*rounds(size)]
    assert all(len({rank for pair in pairs for rank in pair}) == 2 * len(pairs) for pairs in found)
    assert sorted(pair for pairs in found for pair in pairs) == list(combinations(range(size), 2))


@pytest.mark.parametrize("size", [ALL_PAIRS + 1, 64, 1024])
def test_of_many_ranks_few_pairs_are_measured(size: int) -> None:
    found = [*rounds(size)]
    assert len(found) <= 2 * size.bit_length()
    assert all(len({rank for pair in pairs for rank in pair}) == 2 * len(pairs) for pairs in found)
    assert {(rank, rank + 1) for rank in range(size - 1)} < {pair for pairs in found for pair in pairs}


def seconds(link: Link) -> tuple[float, ...]:
    return tuple(link.seconds(nbytes) for nbytes in SIZES)


def test_links_and_speeds_are_those_of_the_measured_figures() -> None:
    fast, slow = Link(bandwidth=1e9, latency=1e-4), Link(bandwidth=1e7, latency=1e-2)
    each = [
        Measured("a", 0.010, {(0, 1): seconds(fast), (0, 2): seconds(slow)}),
        Measured("a", 0.011, {(1, 2): seconds(slow)}),
        Measured("b", 0.020, {}),
    ]
    found = with_measured_processes(Cluster.of(["cpu"] * 3), each)
    assert [device.host for device in found.devices] == [0, 0, 1]
    assert [device.speed for device in found.devices] == [1.0, 1.0, pytest.approx(0.0105 / 0.020)]
    for pair, link in {(0, 1): fast, (0, 2): slow, (1, 2): slow}.items():
        assert found.between(*pair).bandwidth == pytest.approx(link.bandwidth)
        assert found.between(*pair).latency == pytest.approx(link.latency)
    assert found.origin == "measured"


def test_hosts_that_differ_by_noise_have_one_speed() -> None:
    each = [Measured("a", 0.010, {(0, 1): (1e-4, 1e-3)}), Measured("b", 0.011, {})]
    assert [d.speed for d in with_measured_processes(Cluster.of(["cpu"] * 2), each).devices] == [1.0, 1.0]


def test_pairs_that_are_not_measured_are_like_most() -> None:
    fast, slow = (1e-4, 1e-3), (1e-2, 1.0)
    each = [Measured("a", 0.01, {(0, 1): slow}), Measured("a", 0.01, {(1, 2): fast}), *[Measured("a", 0.01, {})] * 2]
    each[2] = Measured("a", 0.01, {(2, 3): fast})
    found = with_measured_processes(Cluster.of(["cpu"] * 4), each)
    assert found.between(0, 3) == found.between(1, 2) != found.between(0, 1)


def test_processes_measure_one_another(launcher: Launcher) -> None:
    """Figures as they come; what is wanted are the pairs, in the plan of all processes."""
    for measured, lines in launcher.returned("measure_scenes:measures", 3):
        assert measured == [(0, 1), (0, 2), (1, 2)]
        assert len(lines) >= 1
        assert all(line.endswith("measured") for line in lines)


@pytest.mark.parametrize("far", [0, 1, 2])
def test_the_light_cut_is_on_the_slow_link(launcher: Launcher, far: int) -> None:
    for fast, slow in launcher.returned("measure_scenes:plans", 3, far=far):
        assert len(fast) == len(slow) == 1  # the far rank is at an end
        assert slow[0] < fast[0]


def test_a_cluster_of_the_user_is_not_measured(launcher: Launcher) -> None:
    assert launcher.returned("measure_scenes:given", 2) == [("assumed", 0)] * 2


def test_the_figures_of_the_scenes_differ() -> None:
    assert SLOW.seconds(1000) > 100 * FAST.seconds(1000)
