"""What works on this machine, and what what is missing costs: optional packages, compilers, backends, the cache."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import torch

from pipecompile.compiler.disk_cache import OFF, VARIABLE, DiskCache
from pipecompile.errors import InputError
from pipecompile.ops.backends import check_backend

OPTIONAL = {  # by package: what it is for
    "safetensors": "from_checkpoint= and export_safetensors(): models from and to safetensors files",
    "transformers": "hf: models on the command line",
    "accelerate": "transformers' Trainer",
    "peft": "adapters (LoRA and others)",
}


@dataclass(frozen=True)
class Ability:
    """Something that works here or does not.

    Attributes:
        what: what it is, in words.
        works: whether it works.
        note: the version; or what is missing, and what to do.
    """

    what: str
    works: bool
    note: str


def abilities(devices: Sequence[torch.device]) -> Iterator[Ability]:
    """What works with these devices, and what does not."""
    yield _torch()
    for kind in dict.fromkeys(device.type for device in devices):
        yield _compiled(torch.device(kind))
    yield _processes(devices)
    for package, use in OPTIONAL.items():
        found = _version(package)
        yield Ability(use, bool(found), f"{package} {found}" if found else f"missing: pip install {package}")
    yield _cache()


def _version(package: str) -> str:
    """The version of an installed package; empty if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _torch() -> Ability:
    """Whether this torch is one that pipecompile is tested with."""
    try:
        wanted = next((it for it in requires("pipecompile") or () if re.match(r"torch\b", it)), "torch")
    except PackageNotFoundError:  # run from a folder that is not installed
        wanted = "torch"
    low, high = (re.search(rf"{sign}(\d+)\.(\d+)", wanted) for sign in (">=", "<"))
    mine = tuple(map(int, torch.__version__.split(".")[:2]))
    works = (low is None or _pair(low) <= mine) and (high is None or mine < _pair(high))
    outside = "" if works else f", but pipecompile is tested with {wanted}; install one of these"
    return Ability("torch's interfaces that pipecompile needs", works, f"torch {torch.__version__}{outside}")


def _pair(match: re.Match[str]) -> tuple[int, ...]:
    return tuple(map(int, match.groups()))


def _compiled(device: torch.device) -> Ability:
    what = f"stage_compile=True: stages on {device.type} compiled by Inductor"
    try:
        check_backend(True, [device])
    except InputError as error:
        return Ability(what, False, str(error).partition(", but ")[2] or str(error))
    return Ability(what, True, "a compiler was found")


def _processes(devices: Sequence[torch.device]) -> Ability:
    what = "mesh=: a process per stage"
    distributed = torch.distributed
    if not distributed.is_available():
        return Ability(what, False, "this torch is built without torch.distributed; install another build")
    if any(device.type != "cpu" for device in devices):
        return Ability(what, True, "on CPU devices only; accelerators run in one process (devices=)")
    if not distributed.is_gloo_available():
        return Ability(what, False, "this torch is built without gloo; install another build")
    return Ability(what, True, "gloo")


def _cache() -> Ability:
    what = "the cache: costs and plans are found again by later processes"
    try:
        folder = DiskCache.of_user().folder
    except InputError as error:
        return Ability(what, False, str(error))
    if folder is None:
        return Ability(what, False, f"{VARIABLE}={OFF}")
    if os.access(_existing(folder), os.W_OK):
        home = Path.home()
        return Ability(what, True, f"~/{folder.relative_to(home)}" if folder.is_relative_to(home) else str(folder))
    return Ability(what, False, f"{folder} cannot be written; name another folder in {VARIABLE}")


def _existing(folder: Path) -> Path:
    """The folder, or the innermost one around it that exists."""
    return next(each for each in (folder, *folder.absolute().parents) if each.exists())
