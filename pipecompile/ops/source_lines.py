"""Lines of the user's source: where a call was made, and where an exception was raised."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback

import torch

PACKAGE = os.path.dirname(os.path.dirname(__file__)) + os.sep  # the folder of pipecompile
_LIBRARIES = (os.path.dirname(torch.__file__) + os.sep, PACKAGE, contextlib.__file__)


def user_line() -> str:
    """Returns ``file:line`` of the innermost frame outside torch and pipecompile; empty if all frames are inside."""
    frame = sys._getframe(1)
    while frame is not None:
        filename = frame.f_code.co_filename
        if not is_library(filename):
            return f"{filename}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return ""


def caller_file(depth: int) -> str:
    """Returns the file of the frame ``depth`` calls above the caller of this function."""
    return sys._getframe(depth + 1).f_code.co_filename


def failing_line(error: BaseException) -> str:
    """Returns ``file:line`` of the innermost frame outside torch and pipecompile in the traceback of an exception."""
    lines = [
        f"{frame.f_code.co_filename}:{line}"
        for frame, line in traceback.walk_tb(error.__traceback__)
        if not is_library(frame.f_code.co_filename)
    ]
    return lines[-1] if lines else ""


def is_library(filename: str) -> bool:
    """Whether a file belongs to torch or pipecompile."""
    return filename.startswith((*_LIBRARIES, "<frozen"))


def short(source: str) -> str:
    """Returns a source line with only the last folder of its path: ``gpt2/modeling_gpt2.py:42``."""
    return "/".join(source.split(os.sep)[-2:])
