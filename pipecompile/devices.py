"""The devices that a user names."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pipecompile.errors import InputError


def parse_devices(devices: Sequence[torch.device | str | int]) -> tuple[torch.device, ...]:
    """Devices by torch's name, or CUDA devices by number.

    Raises:
        InputError: none are given, or one is not there.
    """
    if not isinstance(devices, list | tuple) or not devices:
        raise InputError(
            f"devices= takes a list with one device a stage, such as ['cpu', 'cpu'] or [0, 1]; got {devices!r}"
        )
    parsed = []
    for name in devices:
        try:
            device = torch.device("cuda", name) if isinstance(name, int) else torch.device(name)
        except (RuntimeError, TypeError) as error:
            raise InputError(f"{name!r} is no device: {error}") from None
        parsed.append(_present(device))
    return tuple(parsed)


def _present(device: torch.device) -> torch.device:
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise InputError(f"{device} is asked for, but stages run on cpu and cuda devices")
    device = torch.device("cuda", device.index or 0)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.index >= count:
        raise InputError(
            f"{device} is asked for, but torch {torch.__version__} sees {count} CUDA devices; "
            f"use devices=['cpu', 'cpu'] to run the same pipeline on the CPU"
        )
    return device
