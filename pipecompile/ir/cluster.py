"""The devices that stages run on and the links between them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from pipecompile.errors import InputError
from pipecompile.ir.device_specs import ACCELERATORS, Accelerator
from pipecompile.ir.device_specs import Link as Link
from pipecompile.ir.json_io import Json

HOST_DEVICES = 8  # per host, if a name gives only the total number of devices
SOME_LINK = Link(bandwidth=10e9, latency=20e-6)  # assumed if nothing is known
HANDED_OVER = Link(
    bandwidth=1e12, latency=5e-6
)  # a reference passed within one process and device: a lock and a wake-up


@dataclass(frozen=True, slots=True)
class Device:
    """The device of a rank: its torch name, its speed relative to the profile, its memory and its host."""

    name: str  # "cuda:0", "cpu"
    speed: float = 1.0  # seconds on this device = profiled seconds / speed
    memory: int | None = None  # bytes; None: no known limit
    host: int = 0
    kind: str = ""  # a key of ``ACCELERATORS``, or empty

    @property
    def is_cpu(self) -> bool:
        return not self.kind and self.name.partition(":")[0] == "cpu"


@dataclass(frozen=True, slots=True)
class Pair:
    """A link between two particular ranks, for both directions."""

    first: int
    second: int
    link: Link


@dataclass(frozen=True)
class Cluster(Json):
    """One device per rank, and the links between them.

        >>> cluster = Cluster.from_name("2x4xA100-40GB")
        >>> len(cluster), cluster.devices[5].host, cluster.devices[0].memory
        (8, 1, 40000000000)
        >>> cluster.transfer_seconds(0, 1, 10**9) < cluster.transfer_seconds(0, 4, 10**9)
        True

    Attributes:
        devices: one per rank, with its speed beside the profiled one, its memory in bytes and its host.
        link: between two devices of the same host: latency in seconds, bytes per second in one direction.
        network: between two hosts; None for the same as ``link``.
        pairs: links between particular ranks, in place of these.
        origin: where the links come from: "assumed", "measured" or "data sheet".
        host: between a device and the memory of its host; None if it is not known, which counts as ``SOME_LINK``.
    """

    devices: tuple[Device, ...]
    link: Link = SOME_LINK  # between two devices of the same host
    network: Link | None = None  # between two hosts; None: the same as ``link``
    pairs: tuple[Pair, ...] = ()
    origin: str = "assumed"  # where the links come from: "assumed", "measured" or "data sheet"
    host: Link | None = None  # between a device and its host's memory, in each direction

    def __post_init__(self) -> None:
        if not self.devices:
            raise ValueError("a cluster needs at least one device")
        for pair in self.pairs:
            if not 0 <= min(pair.first, pair.second) < max(pair.first, pair.second) < len(self):
                raise ValueError(f"{pair} must name two different ranks below {len(self)}, the lower one first")

    def __len__(self) -> int:
        return len(self.devices)

    @staticmethod
    def of(names: Sequence[str], link: Link | None = None) -> Cluster:
        """Equal devices with the given ``names``, on one host, with the same ``link`` between any two of them."""
        devices = tuple(map(Device, names))
        return Cluster(devices) if link is None else Cluster(devices, link)

    @staticmethod
    def from_name(name: str) -> Cluster:
        """Devices of a known kind: "8xH100"; "64xH100" (eight per host); "2x4xA100-40GB" (two hosts with four each).

        Raises:
            InputError: the name has another form, or the kind is unknown.
        """
        match = re.fullmatch(r"(?:(\d+)x)?(\d+)x([A-Za-z].*)", name)
        known = ", ".join(ACCELERATORS)
        if match is None or "0" in (match[1], match[2]):
            raise InputError(
                f"{name!r} is not the name of a cluster; write devices x kind, such as 8xH100, or hosts x devices x "
                f"kind, such as 2x8xA100-40GB; the known kinds are {known}"
            )
        kind = {each.lower(): each for each in ACCELERATORS}.get(match[3].lower())
        if kind is None:
            raise InputError(f"{match[3]!r} is not a known kind of device; use one of {known}")
        each = int(match[2]) if match[1] else min(int(match[2]), HOST_DEVICES)
        count = int(match[1] or 1) * int(match[2])
        it = ACCELERATORS[kind]
        devices = (Device(f"{kind}:{i}", memory=it.memory, host=i // each, kind=kind) for i in range(count))
        return Cluster(tuple(devices), it.link, it.network, origin="data sheet", host=it.host)

    def in_order(self, ranks: Sequence[int]) -> Cluster:
        """The same devices and links, renumbered: rank ``i`` of the result is rank ``ranks[i]`` of this cluster."""
        place = {rank: index for index, rank in enumerate(ranks)}
        pairs = (Pair(place[pair.first], place[pair.second], pair.link) for pair in self.pairs)
        return replace(self, devices=tuple(self.devices[rank] for rank in ranks), pairs=tuple(pairs))

    @property
    def accelerator(self) -> Accelerator | None:
        """The kind of the first device, if it is known."""
        return ACCELERATORS.get(self.devices[0].kind)

    @cached_property
    def _own(self) -> dict[frozenset[int], Link]:
        return {frozenset((pair.first, pair.second)): pair.link for pair in self.pairs}

    def between(self, source: int, target: int) -> Link:
        """The link from rank ``source`` to rank ``target``."""
        if own := self._own.get(frozenset((source, target))):
            return own
        near = self.devices[source].host == self.devices[target].host
        return self.link if near or self.network is None else self.network

    def transfer_seconds(self, source: int, target: int, nbytes: int) -> float:
        """Seconds to send ``nbytes`` from rank ``source`` to rank ``target``; zero within one rank."""
        return 0.0 if source == target else self.between(source, target).seconds(nbytes)

    def copy_seconds(self, rank: int, nbytes: int) -> float:
        """Seconds to copy ``nbytes`` from the device of a rank to its host, or back; zero if it is the host's own."""
        return 0.0 if self.devices[rank].is_cpu else (self.host or SOME_LINK).seconds(nbytes)
