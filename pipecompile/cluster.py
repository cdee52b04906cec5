"""The devices that stages run on and the links between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipecompile.serial import Json


@dataclass(frozen=True, slots=True)
class Device:
    """A place where a rank runs: torch's name for it, its speed relative to the profile, and its memory in bytes."""

    name: str  # "cuda:0", "cpu"
    speed: float = 1.0  # seconds on this device = profiled seconds / speed
    memory: int | None = None  # bytes; None: no limit is known


@dataclass(frozen=True, slots=True)
class Link:
    """A connection: sending n bytes takes ``latency + n / bandwidth`` seconds."""

    bandwidth: float  # bytes per second
    latency: float = 0.0  # seconds

    def seconds(self, nbytes: int) -> float:
        return self.latency + nbytes / self.bandwidth


@dataclass(frozen=True)
class Cluster(Json):
    """One device per rank, and one kind of link between any two of them."""

    devices: tuple[Device, ...]
    link: Link = Link(bandwidth=10e9, latency=20e-6)

    def __post_init__(self) -> None:
        if not self.devices:
            raise ValueError("a cluster needs at least one device")

    def __len__(self) -> int:
        return len(self.devices)

    @staticmethod
    def of(names: Sequence[str], link: Link | None = None) -> Cluster:
        """Equal devices under the given names."""
        devices = tuple(map(Device, names))
        return Cluster(devices) if link is None else Cluster(devices, link)

    def transfer_seconds(self, source: int, target: int, nbytes: int) -> float:
        """Seconds to send ``nbytes`` from rank ``source`` to rank ``target``; nothing within one rank."""
        return 0.0 if source == target else self.link.seconds(nbytes)
