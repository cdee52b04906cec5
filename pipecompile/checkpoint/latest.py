"""``latest`` finds the checkpoint to continue from."""

from __future__ import annotations

from pathlib import Path

from pipecompile.checkpoint.files import is_complete
from pipecompile.checkpoint.staged import numbered


def latest(directory: str | Path) -> Path | None:
    """The complete checkpoint in a directory whose name ends in the largest number; None if there is none.

        >>> print(latest("a/directory/that/does/not/exist"))
        None

    Args:
        directory: holds checkpoints, such as ``runs`` for ``runs/step_100``; need not exist.
    """
    found = [folder for _, _, folder in numbered(Path(directory)) if is_complete(folder)]
    return found[-1] if found else None
