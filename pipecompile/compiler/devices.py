"""Parses devices= and cluster=."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch

from pipecompile.errors import InputError
from pipecompile.ir.cluster import Cluster, Device
from pipecompile.ops.accelerators import total_memory
from pipecompile.profile.links import copy_seconds, with_measured_host, with_measured_links


def parse_devices(devices: Sequence[torch.device | str | int]) -> tuple[torch.device, ...]:
    """The devices of ``devices=``, given by torch's names or, for accelerators, by number.

    Raises:
        InputError: the list is empty, or a device is not valid or does not exist.
    """
    if not isinstance(devices, list | tuple) or not devices:
        raise InputError(
            f"devices={devices!r}; it must be a list with one device per stage, such as ['cpu', 'cpu'] or [0, 1]"
        )
    parsed = []
    for name in devices:
        try:
            device = torch.device(_accelerator(), name) if isinstance(name, int) else torch.device(name)
        except (RuntimeError, TypeError) as error:
            raise InputError(
                f"{name!r} is not a device ({str(error).splitlines()[0]}); use names such as 'cpu' and 'cuda:0', or "
                f"numbers of accelerators"
            ) from None
        parsed.append(_present(device))
    return tuple(parsed)


def cluster_of(devices: Sequence[torch.device], measure: bool = False) -> Cluster:
    """The cluster to plan for: equal devices, accelerators with their memory divided by the ranks on each.

    Args:
        devices: one per rank.
        measure: measure the links between the devices; otherwise they are assumed.
    """
    ranks = Counter(devices)
    cluster = Cluster(tuple(Device(str(device), memory=_memory(device, ranks[device])) for device in devices))
    return with_measured_host(with_measured_links(cluster, devices, copy_seconds), devices) if measure else cluster


def _memory(device: torch.device, ranks: int) -> int | None:
    total = total_memory(device)
    return None if total is None else total // ranks


def named_cluster(cluster: Cluster | str, devices: Sequence[torch.device]) -> Cluster:
    """The cluster of ``cluster=``, given as a ``Cluster`` or by name.

    Raises:
        InputError: its name is not known, or it does not have one device per rank.
    """
    found = Cluster.from_name(cluster) if isinstance(cluster, str) else cluster
    if len(found) != len(devices):
        raise InputError(
            f"cluster= has {len(found)} devices, but devices= has {len(devices)}; they must have the same number"
        )
    return found


def _present(device: torch.device) -> torch.device:
    if device.type == "cpu":
        return device
    if device.type == "meta":
        raise InputError("stages cannot run on meta, which has no memory; name a cpu or an accelerator in devices=")
    here = torch.accelerator.current_accelerator(check_available=True)
    count = torch.accelerator.device_count() if here is not None and here.type == device.type else 0
    device = torch.device(device.type, device.index or 0)
    if device.index >= count:
        raise InputError(
            f"{device} does not exist: torch {torch.__version__} sees {count} {device.type} devices; "
            f"use devices=['cpu', 'cpu'] to run the same pipeline on the CPU"
        )
    return device


def _accelerator() -> str:
    """The type of the accelerators that numbers name; CUDA if there is none, so that the error says so."""
    here = torch.accelerator.current_accelerator(check_available=True)
    return "cuda" if here is None else here.type
