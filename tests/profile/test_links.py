"""Links as they are measured: the line through two copies, links of a kind, what is never copied."""

from __future__ import annotations

from itertools import combinations
from math import inf
from statistics import mean
from typing import Any

import pytest
import torch

import pipecompile
from pipecompile.compiler.devices import cluster_of
from pipecompile.ir.cluster import HANDED_OVER, SOME_LINK, Cluster, Link
from pipecompile.profile import with_measured_links
from pipecompile.profile.links import SIZES, copy_seconds

CPU = torch.device("cpu")
CUDA = [torch.device("cuda", index) for index in range(4)]


class Copies:
    """Copies on links that are known, and what was asked of them."""

    def __init__(self, links: dict[frozenset[torch.device], Link]) -> None:
        self.links, self.asked = links, []

    def __call__(self, source: torch.device, target: torch.device, nbytes: int) -> float:
        self.asked.append((source, target, nbytes))
        return self.links[frozenset((source, target))].seconds(nbytes)


def measured(devices: list[torch.device], copies: Any) -> Cluster:
    return with_measured_links(Cluster.of(list(map(str, devices))), devices, copies)


def near(link: Link) -> Any:
    return pytest.approx((link.bandwidth, link.latency), rel=1e-6)


@pytest.mark.parametrize("link", [Link(450e9, 12e-6), Link(12e9, 30e-6), Link(1e9), Link(inf, 7e-6)], ids=str)
def test_two_copies_tell_latency_and_bandwidth(link: Link) -> None:
    found = measured(CUDA[:2], Copies({frozenset(CUDA[:2]): link})).between(0, 1)
    assert (found.bandwidth, found.latency) == near(link)
    for nbytes in (0, 1000, 10**6, 10**9):  # and so does any other size
        assert found.seconds(nbytes) == pytest.approx(link.seconds(nbytes), rel=1e-6, abs=1e-12)


def test_a_clock_that_says_nonsense_gives_no_negative_figure() -> None:
    def link(small: float, large: float) -> Link:
        return measured(CUDA[:2], lambda _one, _two, nbytes: small if nbytes == SIZES[0] else large).between(0, 1)

    assert link(5e-6, 4e-6) == Link(inf, 5e-6)
    assert link(0.0, 1.0).latency == 0.0


def test_each_pair_of_devices_is_measured_once_and_ranks_on_one_hand_over() -> None:
    fast, slow = Link(450e9, 12e-6), Link(12e9, 30e-6)
    devices = [CUDA[0], CUDA[0], CUDA[1], CPU, CUDA[1]]
    kinds = {frozenset((CUDA[0], CUDA[1])): fast, frozenset((CUDA[0], CPU)): slow, frozenset((CUDA[1], CPU)): slow}
    copies = Copies(kinds)
    cluster = measured(devices, copies)
    assert sorted(n for *_, n in copies.asked) == [SIZES[0]] * 3 + [SIZES[1]] * 3
    for one, two in combinations(range(5), 2):
        ends = frozenset((devices[one], devices[two]))
        link, found = kinds.get(ends, HANDED_OVER), cluster.between(one, two)
        assert (found.bandwidth, found.latency) == near(link)
    assert Cluster.from_json(cluster.to_json()) == cluster
    assert cluster.origin == "measured"


def test_links_of_a_kind_are_equal_whatever_the_noise_and_kinds_stay_apart() -> None:
    noise = iter([1.0, 1.1, 0.95, 1.05, 0.97, 1.08])
    kinds = {frozenset(pair): Link(200e9 * next(noise), 10e-6) for pair in combinations(CUDA, 2)}
    kinds[frozenset((CUDA[0], CUDA[3]))] = kinds[frozenset((CUDA[1], CUDA[2]))] = Link(20e9, 10e-6)
    cluster = measured(CUDA, Copies(kinds))
    found = {cluster.between(one, two) for one, two in combinations(range(4), 2)}
    assert sorted(link.bandwidth for link in found) == pytest.approx([20e9, 200e9], rel=0.1)
    assert cluster.between(0, 3) == cluster.between(1, 2) != cluster.link
    assert len(cluster.pairs) == 2  # those that are not as most are


def test_devices_on_one_cpu_copy_nothing() -> None:
    def copy(*_: Any) -> float:
        raise AssertionError("nothing is to be copied")

    cluster = measured([CPU] * 3, copy)
    assert {cluster.between(one, two) for one, two in combinations(range(3), 2)} == {HANDED_OVER}
    assert (cluster.link, cluster.pairs) == (HANDED_OVER, ())
    assert measured([CPU], copy).link == HANDED_OVER
    assert cluster_of([CPU] * 3, measure=True).link == HANDED_OVER
    assert cluster_of([CPU] * 3).link == SOME_LINK


def test_a_copy_takes_the_mean_of_there_and_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that goes on with each byte copied, from a device to itself and to a fake one."""
    now = [0.0]
    to = torch.Tensor.to

    def slow(tensor: torch.Tensor, device: torch.device, **options: Any) -> torch.Tensor:
        now[0] += tensor.nbytes * {"meta": 3e-9, "cpu": 1e-9}[device.type]
        return to(tensor, device) if device.type == "meta" else torch.empty(tensor.shape, dtype=tensor.dtype)

    monkeypatch.setattr(torch.Tensor, "to", slow)
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    assert copy_seconds(CPU, torch.device("meta"), 1000) == pytest.approx(mean([3e-6, 1e-6]))


def test_a_pipeline_reports_its_links_and_where_they_are_known_from() -> None:
    def report(**options: Any) -> list[str]:
        model, x = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)), torch.randn(4, 4)
        return pipecompile.compile(model, ["cpu", "cpu"], example_inputs=((x,), {}), **options).pipeline.report.links

    assert report() == ("cpu to cpu: 5.00 us + bytes / 1.00 TB/s, passed by reference, not copied",)
    assert report(costs="count") == ("cpu to cpu: 20.0 us + bytes / 10.0 GB/s, assumed",)
    assert report(cluster="2xH100") == ("H100:0 to H100:1: 11.8 us + bytes / 450 GB/s, data sheet",)
