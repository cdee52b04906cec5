"""What to keep whole when a trace has failed: the innermost module or function around the place that can be.

The traceback shows what was running. From the inside out, the first part that is not kept whole yet and may be is
taken: a module by its path, or a function of the model's or a library's own whose arguments tell all that it reads.
Within a part that is kept whole already, and cannot be after all, the next further out.
"""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from itertools import takewhile
from types import FrameType, FunctionType

from pipecompile.capture.function_patching import function_of, intercepted_by
from pipecompile.capture.hidden_tensors import hides_tensors
from pipecompile.capture.patches import runs_a_module
from pipecompile.ops.source_lines import is_library, short

Part = str | FunctionType  # a module's path, or a function


def next_whole(error: BaseException, paths: list[str], kept: Mapping[Part, str]) -> Part | None:
    """The next part of a model to keep whole.

    Args:
        error: what the trace has failed with.
        paths: of the modules that were being run, innermost last.
        kept: parts that are kept whole already.
    """
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    outside = list(takewhile(lambda part: not _is_kept(part, kept), _running(frames, paths, kept)))
    candidates = (_function(part) if isinstance(part, FrameType) else part for part in reversed(outside))
    return next((part for part in candidates if part), None)


def _is_kept(part: Part | FrameType, kept: Mapping[Part, str]) -> bool:
    if isinstance(part, str):
        return any(part == k or part.startswith(f"{k}.") for k in kept if isinstance(k, str))
    return part in kept


def name_of_part(part: Part) -> str:
    if isinstance(part, str):
        return f"module {part}"
    code = part.__code__
    return f"function {part.__qualname__} ({short(code.co_filename)}:{code.co_firstlineno})"


def _running(frames: list[FrameType], paths: list[str], kept: Mapping[Part, str]) -> list[Part | FrameType]:
    """Modules (paths), functions that are kept whole, and other frames, outermost first."""
    modules = iter(paths[1:])
    found: list[Part | FrameType] = []
    for frame in frames:
        if runs_a_module(frame.f_code):
            found.append(next(modules))
        elif (function := intercepted_by(frame.f_code)) is not None and function in kept:
            found.append(function)
        else:
            found.append(frame)
    return [*found, *modules]  # what is refused when the run is over is in no frame


def _function(frame: FrameType) -> FunctionType | None:
    """The function that a frame runs, if it can be kept whole."""
    code = frame.f_code
    arguments = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    if is_library(code.co_filename) or any(hides_tensors(frame.f_locals.get(name)) for name in arguments):
        return None
    return function_of(code)
