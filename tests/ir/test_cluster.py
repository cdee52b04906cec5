"""Clusters: links by pair of ranks, devices by name, and the figures they are planned with."""

from __future__ import annotations

import re
from itertools import product

import pytest

from pipecompile.errors import InputError
from pipecompile.ir import device_specs
from pipecompile.ir.cluster import Cluster, Device, Link, Pair
from pipecompile.ir.device_specs import ACCELERATORS, Roofline

NEAR, FAR, OWN = Link(100.0), Link(10.0, latency=1.0), Link(1.0)


def two_hosts() -> Cluster:
    devices = tuple(Device(f"gpu{i}", host=i // 2) for i in range(4))
    return Cluster(devices, NEAR, FAR, (Pair(0, 1, OWN),))


@pytest.mark.parametrize(
    ("source", "target", "seconds"),
    [(0, 0, 0.0), (2, 3, 1.0), (1, 2, 11.0), (3, 0, 11.0), (0, 1, 100.0), (1, 0, 100.0)],
)
def test_a_transfer_takes_what_the_link_of_its_two_ranks_takes(source: int, target: int, seconds: float) -> None:
    assert two_hosts().transfer_seconds(source, target, 100) == seconds


def test_without_a_network_all_links_are_alike() -> None:
    cluster = Cluster(two_hosts().devices, NEAR)
    assert cluster.between(0, 3) == cluster.between(0, 1) == NEAR


@pytest.mark.parametrize(
    ("name", "hosts", "kind"),
    [
        ("8xH100", [0] * 8, "H100"),
        ("1xL4", [0], "L4"),
        ("16xh100", [0] * 8 + [1] * 8, "H100"),
        ("2x4xA100-40GB", [0] * 4 + [1] * 4, "A100-40GB"),
        ("3x1xV100-16GB", [0, 1, 2], "V100-16GB"),
    ],
)
def test_a_name_tells_devices_and_hosts(name: str, hosts: list[int], kind: str) -> None:
    cluster = Cluster.from_name(name)
    it = ACCELERATORS[kind]
    assert [device.host for device in cluster.devices] == hosts
    assert {(device.kind, device.memory) for device in cluster.devices} == {(kind, it.memory)}
    assert (cluster.link, cluster.network) == (it.link, it.network)
    assert Cluster.from_json(cluster.to_json()) == cluster


@pytest.mark.parametrize("name", ["8xH1000", "H100", "0xH100", "8x", "x8xH100", "8 x H100", "2x0xH100", ""])
def test_another_name_is_refused_with_those_that_are_known(name: str) -> None:
    with pytest.raises(InputError, match="A100-40GB"):
        Cluster.from_name(name)


@pytest.mark.parametrize("pair", [(0, 0), (0, 4), (-1, 2)])
def test_a_pair_is_two_ranks(pair: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="must name two different ranks"):
        Cluster(two_hosts().devices, NEAR, pairs=(Pair(*pair, OWN),))


def test_another_order_keeps_each_devices_links() -> None:
    cluster, order = two_hosts(), (2, 0, 3, 1)
    moved = cluster.in_order(order)
    assert moved.devices == tuple(cluster.devices[rank] for rank in order)
    for one, two in product(range(4), repeat=2):
        assert moved.transfer_seconds(one, two, 100) == cluster.transfer_seconds(order[one], order[two], 100)


def test_figures_are_plausible_and_have_sources() -> None:
    sources = set(re.findall(r"^    (\[.+?\])", device_specs.__doc__ or "", re.MULTILINE))
    for name, it in ACCELERATORS.items():
        assert it.source, name
        assert set(re.findall(r"\[.+?\]", it.source)) <= sources, name
        assert 1e12 < it.roofline.flops < 1e16, name
        assert it.roofline.half_flops is None or it.roofline.flops < it.roofline.half_flops < 1e16, name
        assert 1e11 < it.roofline.bandwidth < 1e13, name
        assert it.link.bandwidth >= it.network.bandwidth, name
        assert it.link.latency < it.network.latency < 1e-3, name
        if it.roofline.tensor_float_flops:  # half of those in 16 bits on every sheet, dense as well as sparse
            assert it.roofline.half_flops == pytest.approx(2 * it.roofline.tensor_float_flops, rel=0.02), name


@pytest.mark.parametrize(
    ("name", "cores", "clock"),  # each core does two float32 operations a cycle; GHz of the boost clock
    [
        ("H200", 16896, 1.98), ("H100", 16896, 1.98), ("H100-PCIe", 14592, 1.755), ("A100-80GB", 6912, 1.41),
        ("A100-40GB", 6912, 1.41), ("V100-32GB", 5120, 1.53), ("V100-16GB", 5120, 1.53), ("L40S", 18176, 2.52),
        ("L4", 7424, 2.04), ("T4", 2560, 1.59), ("A6000", 10752, 1.8), ("RTX-5090", 21760, 2.407),
        ("RTX-4090", 16384, 2.52), ("RTX-3090", 10496, 1.695),
    ],
)  # fmt: skip
def test_float32_is_two_operations_of_each_core_in_each_cycle(name: str, cores: int, clock: float) -> None:
    assert ACCELERATORS[name].roofline.flops == pytest.approx(2 * cores * clock * 1e9, rel=0.01)


@pytest.mark.parametrize(
    ("name", "bits", "rate"),  # of the memory's bus, Gb/s of each of them
    [
        ("A100-40GB", 5120, 2.43), ("V100-32GB", 4096, 1.755), ("L40S", 384, 18), ("L4", 192, 12.5),
        ("A10G", 384, 12.5), ("T4", 256, 10), ("A6000", 384, 16), ("RTX-5090", 512, 28), ("RTX-4090", 384, 21),
        ("RTX-3090", 384, 19.5),
    ],
)  # fmt: skip
def test_memory_bandwidth_is_that_of_the_bus(name: str, bits: int, rate: float) -> None:
    assert ACCELERATORS[name].roofline.bandwidth == pytest.approx(bits / 8 * rate * 1e9, rel=0.01)


@pytest.mark.parametrize(
    ("name", "count", "each"),  # NVLinks between two devices, GB/s of one in one direction
    [
        ("B200", 18, 50),
        ("H200", 18, 25),
        ("H100", 18, 25),
        ("A100-80GB", 12, 25),
        ("A100-40GB", 12, 25),
        ("V100-32GB", 2, 25),
    ],
)
def test_a_link_is_that_of_its_nvlinks_in_one_direction(name: str, count: int, each: int) -> None:
    assert ACCELERATORS[name].link.bandwidth == count * each * 1e9


@pytest.mark.parametrize(
    ("name", "found"),  # GiB in all, as torch said when they were not enough, or (H100, L4, A10G) as the driver says
    [
        ("B200", 178.35), ("H100", 79.65), ("A100-80GB", 79.14), ("A100-40GB", 39.50), ("L40S", 44.42), ("L4", 22.49),
        ("A10G", 22.49), ("T4", 14.56), ("RTX-4090", 23.68),
    ],
)  # fmt: skip
def test_memory_is_a_little_less_than_there_is(name: str, found: float) -> None:
    assert 0.93 < ACCELERATORS[name].memory / (found * 2**30) < 0.97


def test_a_roofline_takes_the_peak_of_the_numbers_it_computes_with() -> None:
    roof = Roofline(1e12, 1e12, 0.0, half_flops=4e12, tensor_float_flops=2e12)
    seconds = [roof.seconds(10**12, 8, *kind) for kind in ((False, False), (False, True), (True, False), (True, True))]
    assert seconds == [1.0, 0.5, 0.25, 0.25]
    assert roof.seconds(0, 10**12) == 1.0
    assert roof.seconds(0, 0) == 0.0
    assert Roofline(1.0, 1.0).seconds(2, 1, half=True) == 2.0  # no other peak is known
