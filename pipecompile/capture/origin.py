"""Where a node comes from: the module whose forward made the call, and the user's source line."""

from __future__ import annotations

import os
import sys
import traceback
from dataclasses import dataclass

import torch
import torch.fx as fx

from pipecompile.regions import PLAIN, Region

_LIBRARIES = (os.path.dirname(torch.__file__) + os.sep, os.path.dirname(os.path.dirname(__file__)) + os.sep)


@dataclass(frozen=True, slots=True)
class Origin:
    """Kept in ``fx_node.meta["origin"]``.

    ``writes`` names the buffers that the node writes in place; such a node runs exactly once a microbatch. ``mutates``
    says that it writes to an argument at all.
    """

    path: str = ""
    source: str = ""
    region: Region = PLAIN
    writes: tuple[str, ...] = ()
    mutates: bool = False

    def __str__(self) -> str:
        module = f"module {self.path!r}" if self.path else "the model's own forward"
        return f"{module}, {self.source}" if self.source else module


def origin_of(node: fx.Node) -> Origin:
    """The origin recorded for a node; an empty one for what the tracer itself inserted."""
    origin = node.meta.get("origin")
    return origin if isinstance(origin, Origin) else Origin()


def user_line() -> str:
    """``file:line`` of the innermost frame outside torch and pipecompile; empty if there is none."""
    frame = sys._getframe(1)
    while frame is not None:
        filename = frame.f_code.co_filename
        if not filename.startswith(_LIBRARIES) and not filename.startswith("<frozen"):
            return f"{filename}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return ""


def failing_line(error: BaseException) -> str:
    """``file:line`` of the innermost frame outside torch and pipecompile that an exception came through."""
    lines = [
        f"{frame.f_code.co_filename}:{line}"
        for frame, line in traceback.walk_tb(error.__traceback__)
        if not frame.f_code.co_filename.startswith(_LIBRARIES)
    ]
    return lines[-1] if lines else ""


def short(source: str) -> str:
    """A source line with its folder alone: ``gpt2/modeling_gpt2.py:42``."""
    return "/".join(source.split(os.sep)[-2:])
