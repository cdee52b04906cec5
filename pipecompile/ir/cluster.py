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

HOST_DEVICES = 8  # on one host, where a name tells the number of all devices alone
SOME_LINK = Link(bandwidth=10e9, latency=20e-6)  # where nothing is known
HANDED_OVER = Link(bandwidth=1e12, latency=5e-6)  # a reference, within a process and a device: a lock and a notice


@dataclass(frozen=True, slots=True)
class Device:
    """A place where a rank runs: torch's name for it, its speed relative to the profile, its memory and its host."""

    name: str  # "cuda:0", "cpu"
    speed: float = 1.0  # seconds on this device = profiled seconds / speed
    memory: int | None = None  # bytes; None: no limit is known
    host: int = 0
    kind: str = ""  # a name of ``ACCELERATORS``, where it is one


@dataclass(frozen=True, slots=True)
class Pair:
    """Two ranks with a link of their own, in both directions."""

    first: int
    second: int
    link: Link


@dataclass(frozen=True)
class Cluster(Json):
    """One device per rank; a link within a host, one between hosts, and those of single pairs that differ."""

    devices: tuple[Device, ...]
    link: Link = SOME_LINK  # between two devices of one host
    network: Link | None = None  # between two hosts; None: as within one
    pairs: tuple[Pair, ...] = ()
    origin: str = "assumed"  # what is known of the links: "measured", "data sheet"

    def __post_init__(self) -> None:
        if not self.devices:
            raise ValueError("a cluster needs at least one device")
        for pair in self.pairs:
            if not 0 <= min(pair.first, pair.second) < max(pair.first, pair.second) < len(self):
                raise ValueError(f"{pair} is no pair of two of the {len(self)} ranks")

    def __len__(self) -> int:
        return len(self.devices)

    @staticmethod
    def of(names: Sequence[str], link: Link | None = None) -> Cluster:
        """Equal devices under the given names, on one host."""
        devices = tuple(map(Device, names))
        return Cluster(devices) if link is None else Cluster(devices, link)

    @staticmethod
    def from_name(name: str) -> Cluster:
        """Devices of a known kind: "8xH100"; "64xH100", eight on a host; "2x4xA100-40GB", two hosts of four.

        Raises:
            InputError: the name has another form, or the kind is not known.
        """
        match = re.fullmatch(r"(?:(\d+)x)?(\d+)x([A-Za-z].*)", name)
        known = ", ".join(ACCELERATORS)
        if match is None or "0" in (match[1], match[2]):
            raise InputError(
                f"{name!r} names no cluster; write devices x kind, such as 8xH100, or hosts x devices x kind, such as "
                f"2x8xA100-40GB; known kinds are {known}"
            )
        kind = {each.lower(): each for each in ACCELERATORS}.get(match[3].lower())
        if kind is None:
            raise InputError(f"{match[3]!r} is no kind of device that is known here; there are {known}")
        each = int(match[2]) if match[1] else min(int(match[2]), HOST_DEVICES)
        count = int(match[1] or 1) * int(match[2])
        it = ACCELERATORS[kind]
        devices = (Device(f"{kind}:{i}", memory=it.memory, host=i // each, kind=kind) for i in range(count))
        return Cluster(tuple(devices), it.link, it.network, origin="data sheet")

    def in_order(self, ranks: Sequence[int]) -> Cluster:
        """The same devices and links, numbered anew: first the device of ``ranks[0]``, and so on through all ranks."""
        place = {rank: index for index, rank in enumerate(ranks)}
        pairs = (Pair(place[pair.first], place[pair.second], pair.link) for pair in self.pairs)
        return replace(self, devices=tuple(self.devices[rank] for rank in ranks), pairs=tuple(pairs))

    @property
    def accelerator(self) -> Accelerator | None:
        """The kind of the first device, if it is one that is known."""
        return ACCELERATORS.get(self.devices[0].kind)

    @cached_property
    def _own(self) -> dict[frozenset[int], Link]:
        return {frozenset((pair.first, pair.second)): pair.link for pair in self.pairs}

    def between(self, source: int, target: int) -> Link:
        """The link from one rank to another."""
        if own := self._own.get(frozenset((source, target))):
            return own
        near = self.devices[source].host == self.devices[target].host
        return self.link if near or self.network is None else self.network

    def transfer_seconds(self, source: int, target: int, nbytes: int) -> float:
        """Seconds to send ``nbytes`` from rank ``source`` to rank ``target``; nothing within one rank."""
        return 0.0 if source == target else self.between(source, target).seconds(nbytes)
