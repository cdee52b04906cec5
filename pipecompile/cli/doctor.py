"""Looks at the machine: its devices, the links between them, and whether a step split over them is exact."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from pipecompile.api import compile
from pipecompile.compiler.devices import cluster_of
from pipecompile.errors import PipecompileError
from pipecompile.ops.accelerators import is_accelerator

WIDTH, ROWS = 64, 16  # of the model that is tried


@dataclass(frozen=True)
class Seen:
    """One device."""

    device: str
    name: str
    free: int | None  # bytes; None: no limit of its own
    total: int | None
    peers: tuple[str, ...]  # devices whose memory it reaches directly


@dataclass(frozen=True)
class Measured:
    """The link between two devices, the same in both directions."""

    devices: tuple[str, str]
    bandwidth: float  # bytes per second
    latency: float  # seconds


@dataclass(frozen=True)
class Examination:
    """What was found.

    Attributes:
        versions: of Python and torch, and the type of the accelerators.
        step: what the comparison of a split step with the unsplit model says.
        exact: whether they agree.
    """

    versions: dict[str, str]
    devices: tuple[Seen, ...]
    links: tuple[Measured, ...]
    step: str
    exact: bool

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def show(self, console: Console) -> None:
        console.print(", ".join(f"{name} {value}" for name, value in self.versions.items()))
        table = Table("device", "name", "free", "total", "reaches")
        for seen in self.devices:
            table.add_row(seen.device, seen.name, _gib(seen.free), _gib(seen.total), ", ".join(seen.peers) or "-")
        console.print(table)
        if self.links:
            table = Table("link", "bandwidth", "latency")
            for link in self.links:
                table.add_row(
                    " - ".join(link.devices), f"{link.bandwidth / 1e9:.3g} GB/s", f"{link.latency * 1e6:.3g} us"
                )
            console.print(table)
        console.print(self.step)


def examine(devices: Sequence[torch.device]) -> Examination:
    """Examines devices: what they are, their links, and one step of a small model split over all of them.

    Args:
        devices: one per stage of the step; a device may be repeated.
    """
    here = torch.accelerator.current_accelerator(check_available=True)
    versions = {"Python": platform.python_version(), "torch": torch.__version__, "accelerator": str(here or "none")}
    apart = list(dict.fromkeys(devices))
    step, exact = _step(devices)
    return Examination(
        versions=versions,
        devices=tuple(_seen(device, apart) for device in apart),
        links=tuple(_links(apart)),
        step=step,
        exact=exact,
    )


def all_devices() -> list[torch.device]:
    """All accelerators of the machine, twice if there is one; without any, the CPU twice."""
    here = torch.accelerator.current_accelerator(check_available=True)
    found = [] if here is None else [torch.device(here.type, i) for i in range(torch.accelerator.device_count())]
    return found if len(found) > 1 else 2 * (found or [torch.device("cpu")])


def _seen(device: torch.device, others: Sequence[torch.device]) -> Seen:
    if not is_accelerator(device):
        name = f"{platform.machine()}, {torch.get_num_threads()} threads"
        return Seen(device=str(device), name=name, free=None, total=None, peers=())
    module = torch.get_device_module(device)
    free, total = torch.accelerator.get_memory_info(device)
    reaches = getattr(module, "can_device_access_peer", lambda one, two: False)
    near = [o for o in others if o.type == device.type and o != device and reaches(device.index, o.index)]
    name = module.get_device_properties(device).name
    return Seen(device=str(device), name=name, free=free, total=total, peers=tuple(map(str, near)))


def _links(devices: Sequence[torch.device]) -> list[Measured]:
    if len(devices) < 2:
        return []
    cluster = cluster_of(devices, measure=True)
    found = []
    for one, two in combinations(range(len(devices)), 2):
        link = cluster.between(one, two)
        found.append(Measured((str(devices[one]), str(devices[two])), link.bandwidth, link.latency))
    return found


class _Tried(nn.Module):
    """As many layers as stages, each with a residual, and a loss."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2 * layers))

    def forward(self, x: Tensor) -> Tensor:
        h = x
        for layer in self.layers:
            h = h + torch.tanh(layer(h))
        return h.square().mean()


def _step(devices: Sequence[torch.device]) -> tuple[str, bool]:
    """One step over the devices, compared with the unsplit model; what to say, and whether they agree."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, x = _Tried(len(devices)), torch.randn(ROWS, WIDTH)
    where = f"a step split over {', '.join(map(str, devices))}"
    pipe = compile(model, devices, costs="count")
    try:
        verification = pipe.pipeline.verify(x)
    except (PipecompileError, RuntimeError) as error:
        return f"{where} failed: {error}", False
    finally:
        pipe.pipeline.close()
    if not verification.exact:
        return f"{where} is not exact:\n{verification}", False
    compared = sum(len(check.differences) for check in verification.checks)
    return f"{where} is exact: {compared} tensors in {len(verification.checks)} comparisons", True


def _gib(nbytes: int | None) -> str:
    return "-" if nbytes is None else f"{nbytes / 2**30:.2f} GiB"
