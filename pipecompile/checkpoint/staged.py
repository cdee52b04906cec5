"""Folders that are complete or absent: they are written under another name, then renamed.

step_100                       complete
.step_90.1f2e3d4c.writing      under way, or left by a process that was killed
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from pipecompile.errors import CheckpointError, InputError

NUMBERED = re.compile(r"(.*?)(\d+)")


def begin(folder: Path) -> Path:
    """Makes the folder to write to, beside the one that it will be renamed to.

    Raises:
        InputError: that one exists.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise InputError(
            f"{str(folder)!r} exists, and is not overwritten, since a process that is killed then would leave nothing; "
            f"choose a new name, such as one with the number of the step, or remove it first"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    writing = folder.parent / f".{folder.name}.{secrets.token_hex(4)}.writing"
    writing.mkdir()
    return writing


def commit(writing: Path, folder: Path) -> None:
    """Gives a folder its name, once all that is in it is on the disk. Removes what killed processes left of it.

    Raises:
        CheckpointError: somebody else has written a folder of that name meanwhile.
    """
    for file in writing.iterdir():
        _sync(file)
    _sync(writing)
    try:
        writing.rename(folder)
    except OSError as error:
        if not folder.exists():
            raise
        raise CheckpointError(
            f"{str(folder)!r} was written by somebody else meanwhile; let two trainings write to two folders"
        ) from error
    _sync(folder.parent)
    for left in folder.parent.glob(f".{folder.name}.*.writing"):
        drop(left)


def drop(folder: Path) -> None:
    """Removes a folder."""
    shutil.rmtree(folder, ignore_errors=True)


def prune(folder: Path, keep: int) -> None:
    """Removes those with a smaller number and the same prefix as ``folder``, except for the ``keep - 1`` largest."""
    name = NUMBERED.fullmatch(folder.name)
    assert name is not None
    own = int(name[2])
    older = [each for number, prefix, each in numbered(folder.parent) if prefix == name[1] and number < own]
    for each in older[: len(older) - keep + 1]:
        hidden = each.with_name(f".{each.name}.{secrets.token_hex(4)}.writing")
        each.rename(hidden)  # at once: it is complete or absent
        drop(hidden)


def numbered(parent: Path) -> Iterator[tuple[int, str, Path]]:
    """The folders whose names end in a number, in its order, each with the number and what is before it."""
    found = []
    for each in parent.iterdir() if parent.is_dir() else ():
        if not each.name.startswith(".") and each.is_dir() and (name := NUMBERED.fullmatch(each.name)):
            found.append((int(name[2]), name[1], each))
    return iter(sorted(found))


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
