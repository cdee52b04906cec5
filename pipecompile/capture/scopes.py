"""The scopes around the call being recorded: modules, checkpoints, autocasts, parts kept whole, and transforms."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pipecompile.capture.origin import Origin
from pipecompile.ops.modes import Autocast, Region
from pipecompile.ops.source_lines import user_line


class Scopes:
    """What one run of forward has entered and not yet left.

    Attributes:
        paths: Paths of the modules being run, innermost last.
        autocasts: Autocasts that the model entered, innermost last.
        inside_leaf: Whether a part kept whole is being run, whose calls are not recorded.
        inside_transform: Whether aten operations are being recorded, not functions.
    """

    def __init__(self) -> None:
        self.paths: list[str] = [""]
        self.autocasts: list[Autocast] = []
        self._num_autocasts = 0  # outermost ones so far
        self.inside_leaf = False
        self.inside_transform = False
        self._checkpoints: list[int] = []  # of the model, being run, innermost last
        self._num_checkpoints = 0

    @property
    def path(self) -> str:
        """The path of the module being run."""
        return self.paths[-1]

    @property
    def here(self) -> Origin:
        """The place in the model, for messages."""
        return Origin(self.path, user_line())

    @property
    def keep_whole(self) -> str:
        """What the user can do where this part of forward cannot be recorded; only the model's parts can be leaves."""
        if self.path:
            return "keep the module around it whole with leaf_modules="
        return "move it into a module of its own, which can be kept whole"

    @property
    def region(self) -> Region:
        grad = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        return Region(grad, tuple(self.autocasts), entry=self._num_autocasts if self.autocasts else 0)

    def enter(self, autocast: Autocast) -> None:
        """Enters an autocast."""
        self._num_autocasts += not self.autocasts
        self.autocasts.append(autocast)

    def leave(self) -> None:
        """Leaves the innermost autocast."""
        self.autocasts.pop()

    @property
    def recompute(self) -> int | None:
        """The outermost checkpoint being run; everything inside it is recomputed."""
        return self._checkpoints[0] if self._checkpoints else None

    @contextmanager
    def checkpoint(self) -> Iterator[None]:
        """A context for a function that the model runs under ``torch.utils.checkpoint``."""
        self._checkpoints.append(self._num_checkpoints)
        self._num_checkpoints += 1
        try:
            yield
        finally:
            self._checkpoints.pop()
