"""Looks at the machine: its devices, the links between them, what works, and whether a split step is exact."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from pipecompile.api import compile
from pipecompile.cli.abilities import Ability, abilities
from pipecompile.compiler.devices import cluster_of
from pipecompile.errors import PipecompileError
from pipecompile.ir.units import bytes_text, count_text, seconds_text
from pipecompile.ops.accelerators import is_accelerator
from pipecompile.render.fitted import Fitted

WIDTH, ROWS = 64, 16  # of the model that is tried


@dataclass(frozen=True)
class Seen:
    """One device."""

    device: str
    name: str
    free: int | None  # bytes; None: not known
    total: int | None  # of the CPU, the memory that this process may use
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
        versions: of pipecompile, Python, torch and what torch is built for, the type of the accelerators, the system.
        abilities: what works, and what does not.
        step: what the comparison of a split step with the unsplit model says.
        exact: whether they agree.
    """

    versions: dict[str, str]
    devices: tuple[Seen, ...]
    links: tuple[Measured, ...]
    abilities: tuple[Ability, ...]
    step: str
    exact: bool

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def show(self, console: Console) -> None:
        console.print(Text(", ".join(f"{name} {value}" for name, value in self.versions.items())))
        devices = _table("device", "name", "free", "total", "reaches", right=("free", "total"))
        for seen in self.devices:
            devices.add_row(seen.device, seen.name, _text(seen.free), _text(seen.total), ", ".join(seen.peers) or "-")
        console.print(Fitted(devices))
        if self.links:
            links = _table("link", "bandwidth", "latency", right=("bandwidth", "latency"))
            for link in self.links:
                links.add_row(" - ".join(link.devices), f"{count_text(link.bandwidth)}B/s", seconds_text(link.latency))
            console.print(Fitted(links))
        works = _table("works", "what", "by, or what is missing")
        for it in self.abilities:
            works.add_row(Text("yes", "green") if it.works else Text("no", "yellow"), it.what, it.note)
        console.print(Fitted(works))
        console.print(Text(self.step, "" if self.exact else "red"))


def _table(*headings: str, right: Sequence[str] = ()) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for heading in headings:
        table.add_column(heading, justify="right" if heading in right else "left", no_wrap=heading in right)
    return table


def examine(devices: Sequence[torch.device]) -> Examination:
    """Examines devices: what they are, their links, and one step of a small model split over all of them.

    Args:
        devices: one per stage of the step; a device may be repeated.
    """
    apart = list(dict.fromkeys(devices))
    step, exact = _step(devices)
    return Examination(
        versions=_versions(),
        devices=tuple(_seen(device, apart) for device in apart),
        links=tuple(_links(apart)),
        abilities=tuple(abilities(apart)),
        step=step,
        exact=exact,
    )


def _versions() -> dict[str, str]:
    here = torch.accelerator.current_accelerator(check_available=True)
    built = {"CUDA": torch.version.cuda, "HIP": torch.version.hip, "XPU": torch.version.xpu}
    return {
        "pipecompile": version("pipecompile"),
        "Python": platform.python_version(),
        "torch": torch.__version__,
        **{name: of for name, of in built.items() if of},
        "accelerator": str(here or "none"),
        "system": f"{platform.system()} {platform.machine()}",
    }


def all_devices() -> list[torch.device]:
    """All accelerators of the machine, twice if there is one; without any, the CPU twice."""
    here = torch.accelerator.current_accelerator(check_available=True)
    found = [] if here is None else [torch.device(here.type, i) for i in range(torch.accelerator.device_count())]
    return found if len(found) > 1 else 2 * (found or [torch.device("cpu")])


def _seen(device: torch.device, others: Sequence[torch.device]) -> Seen:
    if not is_accelerator(device):
        name = f"{platform.machine()}, {torch.get_num_threads()} threads"
        return Seen(device=str(device), name=name, free=_free_memory(), total=_memory(), peers=())
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


def _memory() -> int | None:
    """The bytes of memory of this machine, or of the container that it is."""
    found = []
    with suppress(ValueError, OSError, AttributeError):  # not a POSIX system
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    with suppress(ValueError, OSError):  # no limit ("max"), or no Linux
        found.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(found, default=None)


def _free_memory() -> int | None:
    """The bytes that new work can use, as Linux estimates them."""
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    return None


def _text(nbytes: int | None) -> str:
    return "-" if nbytes is None else bytes_text(nbytes)
