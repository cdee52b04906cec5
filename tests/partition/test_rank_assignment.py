"""Which rank runs each stage: exact beside all permutations, never worse, and only between equal devices."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations, permutations
from random import Random

import pytest
from plans import layers

from pipecompile.ir.between_stages import Channel, Tied
from pipecompile.ir.cluster import Cluster, Device, Link, Pair
from pipecompile.ir.graph import TensorSpec
from pipecompile.ir.plan import Plan
from pipecompile.partition import assign
from pipecompile.planning.plan_search import make_plan
from pipecompile.planning.search_spec import Request
from pipecompile.planning.training_spec import Workload
from pipecompile.schedule import one_f_one_b

NEAR, FAR = Link(100.0, 0.01), Link(10.0, 0.1)


def on_hosts(*hosts: int) -> Cluster:
    return Cluster(tuple(Device(f"gpu{i}", host=host) for i, host in enumerate(hosts)), NEAR, FAR)


def score(plan: Plan, seconds: list[float], cluster: Cluster, microbatches: int = 1) -> tuple[float, float]:
    """Seconds of the slowest stage for one microbatch, and on all links, microbatch by microbatch."""
    rounds = 12 * microbatches  # whole cycles of the replicas, and whole steps
    loads, sent = [0.0] * plan.num_stages, 0.0

    def send(source: int, target: int, nbytes: int) -> None:
        nonlocal sent
        there_and_back = 2 * cluster.transfer_seconds(plan.rank_of[source], plan.rank_of[target], nbytes)
        loads[source] += there_and_back
        loads[target] += there_and_back
        sent += there_and_back

    for k in range(rounds):
        for stage in filter(lambda s: plan.runs(s, k), range(plan.num_stages)):
            loads[stage] += seconds[stage] / cluster.devices[plan.rank_of[stage]].speed
        for channel in plan.channels:
            if plan.runs(channel.source, k) and plan.runs(channel.target, k):
                send(channel.source, channel.target, channel.nbytes)
        for owner, follower in combinations(range(plan.num_stages), 2) if k % microbatches == 0 else ():
            if nbytes := sum(t.nbytes for t in plan.tied if t.owner == owner and follower in t.followers):
                send(owner, follower, nbytes)
    return max(loads) / rounds, sent / rounds


def placements(plan: Plan, cluster: Cluster) -> Iterator[Plan]:
    """The plan under every permutation of devices that are equal in speed and memory."""
    kinds = [(device.speed, device.memory) for device in cluster.devices]
    for order in permutations(range(len(cluster))):
        if all(kinds[rank] == kinds[device] for rank, device in enumerate(order)):
            yield replace(plan, rank_of=tuple(order[rank] for rank in plan.rank_of))


def drawn(seed: int) -> tuple[Plan, list[float], Cluster, int]:
    """Any plan, replicas and shared ranks and tied parameters among them, on devices some of which are equal."""
    random = Random(seed)
    count = random.randint(2, 5)
    replicas = random.choice([(1,) * count, (1,) * random.randint(2, count), (2, count - 1), (3, 1)])
    plan = Plan.chain(len(replicas), replicas=replicas)
    if set(replicas) == {1}:
        pairs = random.sample([*combinations(range(len(replicas)), 2)], 1 + (len(replicas) > 2))
        edges = {(s, s + 1) for s in range(len(replicas) - 1)} | {*pairs}
        plan = Plan((), plan.rank_of, tuple(Channel(*edge) for edge in sorted(edges)))
        if random.random() < 0.3:
            plan = replace(plan, rank_of=tuple(random.randrange(count) for _ in replicas))
    tied = tuple(Tied(f"w{n}", pair, random.randint(0, 50)) for n, pair in enumerate([(0, plan.num_stages - 1)]))
    plan = replace(plan, channels=tuple(replace(c, nbytes=random.randint(0, 99)) for c in plan.channels), tied=tied)
    ranks = max(plan.num_ranks, count)
    kinds = random.choice([[(1.0, None)], [(1.0, None), (2.0, None)], [(1.0, 80), (1.0, 40)]])
    devices = tuple(Device(f"d{i}", *random.choice(kinds), random.randrange(2)) for i in range(ranks))
    own = [Pair(*pair, Link(random.choice([5.0, 50.0]))) for pair in combinations(range(ranks), 2)]
    cluster = Cluster(devices, NEAR, FAR, tuple(random.sample(own, random.randint(0, len(own)))))
    return plan, [random.choice([0.0, 1.0, 5.0]) for _ in range(plan.num_stages)], cluster, random.randint(1, 3)


@pytest.mark.parametrize("seed", range(60))
def test_no_permutation_is_better_and_only_equal_devices_change_places(seed: int) -> None:
    plan, seconds, cluster, microbatches = drawn(seed)
    found = assign(plan, seconds, cluster, microbatches)
    possible = {each.rank_of: score(each, seconds, cluster, microbatches) for each in placements(plan, cluster)}
    assert replace(found, rank_of=plan.rank_of) == plan
    slowest, sent = possible[found.rank_of]
    assert slowest == pytest.approx(min(possible.values())[0])
    assert sent == pytest.approx(min(s for load, s in possible.values() if load <= slowest * (1 + 1e-9)))


@pytest.mark.parametrize("hosts", [(0, 1, 0, 1), (0, 1, 0, 1, 0, 1), (1, 0, 0, 1)])
def test_hosts_in_an_awkward_order_get_the_heavy_cuts_within(hosts: tuple[int, ...]) -> None:
    half = len(hosts) // 2
    plan = Plan.chain(len(hosts))
    light = half - 1  # the channel in the middle of the chain
    plan = replace(plan, channels=tuple(replace(c, nbytes=10 if c.source == light else 90) for c in plan.channels))
    found = assign(plan, [1.0] * len(hosts), on_hosts(*hosts))
    far = [c.source for c in plan.channels if hosts[found.rank_of[c.source]] != hosts[found.rank_of[c.target]]]
    assert far == [light]


@pytest.mark.parametrize("num_stages", [3, 4])
def test_equal_links_change_nothing(num_stages: int) -> None:
    plan = replace(Plan.chain(num_stages, nbytes=99), rank_of=(2, 0, 1, 3)[:num_stages])
    assert assign(plan, [1.0] * num_stages, Cluster.of(["gpu"] * 5, NEAR)) == plan


def test_an_order_that_is_as_good_as_any_stays() -> None:
    plan = Plan.chain(4, nbytes=99)
    assert assign(plan, [1.0] * 4, on_hosts(1, 1, 0, 0)) == plan
    assert assign(plan, [9.0, 1.0, 1.0, 1.0], on_hosts(0, 1, 1, 1)).rank_of[0] != 0  # the slowest is relieved


def test_a_free_device_on_a_better_link_is_taken() -> None:
    assert set(assign(Plan.chain(2, nbytes=99), [1.0] * 2, on_hosts(0, 1, 1)).rank_of) == {1, 2}


@pytest.mark.parametrize("hosts", [4, 8])
def test_many_devices_end_with_one_cut_between_two_hosts(hosts: int) -> None:
    """Swaps are no proof, but from devices dealt like cards they find the chain along the hosts."""
    count = 4 * hosts
    plan, cluster = Plan.chain(count, nbytes=99), on_hosts(*(i % hosts for i in range(count)))
    found = assign(plan, [1.0] * count, cluster)
    far = sum(i % hosts != j % hosts for i, j in zip(found.rank_of, found.rank_of[1:], strict=False))
    assert sorted(found.rank_of) == list(range(count))
    assert score(found, [1.0] * count, cluster) < score(plan, [1.0] * count, cluster)
    assert far == hosts - 1


def test_replicas_share_a_host_where_their_weights_are_heavier_than_what_flows() -> None:
    plan = Plan.chain(2, nbytes=1, replicas=(1, 2))
    tied = replace(plan, tied=(Tied("w", (1, 2), 90),))
    assert assign(tied, [1.0] * 3, on_hosts(0, 1, 0)).rank_of == (1, 0, 2)
    assert assign(tied, [1.0] * 3, on_hosts(0, 1, 0), microbatches=1000).rank_of[0] in (0, 2)


def test_a_plan_is_made_with_its_stages_where_their_links_are() -> None:
    costed = layers(1.0, 1.0, 1.0, 1.0)
    work = Workload(one_f_one_b, 4)
    slow = on_hosts(0, 1, 0, 1)
    plan = make_plan(costed, Request((1,) * 4), slow, work)
    far = [c for c in plan.channels if slow.between(plan.rank_of[c.source], plan.rank_of[c.target]) == FAR]
    assert len(far) == 1
    assert make_plan(costed, Request((1,) * 4), Cluster(slow.devices, NEAR), work).rank_of == (0, 1, 2, 3)


def test_the_cut_between_hosts_is_where_little_is_sent() -> None:
    """Ten equal layers, of which only the sixth passes on little, on two hosts of two devices."""
    costed = layers(*[1.0] * 10)
    spec = TensorSpec((100,), "float32", True)
    nodes = [node if node.name in ("n5", "x") else replace(node, outputs=(spec,)) for node in costed.graph.nodes]
    costed = replace(costed, graph=replace(costed.graph, nodes=tuple(nodes)), storages=(), footprints=())
    cluster = replace(on_hosts(0, 1, 0, 1), link=Link(1e6), network=Link(500.0))
    plan = make_plan(costed, Request((1,) * 4), cluster, Workload(one_f_one_b, 4))
    hosts = [cluster.devices[rank].host for rank in plan.rank_of]
    assert [channel.nbytes for channel in plan.channels if hosts[channel.source] != hosts[channel.target]] == [4]
    assert max(map(plan.stage_of.count, range(4))) == 3
