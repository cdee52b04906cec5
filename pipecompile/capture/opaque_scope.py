"""Chooses what to keep whole after a trace has failed: the innermost possible module or function around the failure.

The traceback shows what was running. From the inside out, the first part is taken that is not kept whole yet and can
be: a module, or a Python function outside torch that reads tensors only through its arguments. If the failure is inside
a part that is already kept whole, the next part outside it is taken.
"""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import takewhile
from types import CodeType, FrameType, FunctionType

from torch import nn

from pipecompile.capture.function_patching import function_of, intercepted_by
from pipecompile.capture.hidden_tensors import hides_tensors
from pipecompile.capture.patches import runs_a_module
from pipecompile.ops.source_lines import is_library, short

_OPTIONS = (bool, int, float, str, type(None))
Part = str | FunctionType  # a module's path, or a function


@dataclass(frozen=True)
class Reason:
    """Why a part is kept whole, and the line outside torch and pipecompile that failed in it."""

    text: str
    line: tuple[CodeType, int] | None = None

    @staticmethod
    def of(error: BaseException) -> Reason:
        lines = [(frame.f_code, number) for frame, number in traceback.walk_tb(error.__traceback__)]
        own = [line for line in lines if not is_library(line[0].co_filename)]
        return Reason((str(error) or type(error).__name__).splitlines()[0], own[-1] if own else None)


def next_whole(error: BaseException, paths: list[str], kept: Mapping[Part, Reason]) -> Part | None:
    """Returns the next part of a model to keep whole, or None.

    Args:
        error: The error that the trace failed with.
        paths: Paths of the modules that were running, innermost last.
        kept: Parts that are already kept whole.
    """
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    outside = list(takewhile(lambda part: not _is_kept(part, kept), _running(frames, paths, kept)))
    candidates = (_function(part) if isinstance(part, FrameType) else part for part in reversed(outside))
    return next((part for part in candidates if part), None)


def _is_kept(part: Part | FrameType, kept: Mapping[Part, Reason]) -> bool:
    if isinstance(part, str):
        return any(part == k or part.startswith(f"{k}.") for k in kept if isinstance(k, str))
    return part in kept


def all_alike(model: nn.Module, part: Part, kept: Mapping[Part, Reason]) -> dict[Part, Reason]:
    """Returns the modules like ``part``, to keep whole after another one like it failed at the same line.

    Finding each of them separately would cost one trace per module (a quantized model has hundreds). Alike are modules
    of one class with the same options and without modules inside: a block whose options take another branch stays cut.

    Args:
        model: The model.
        part: The last part that had to be kept whole.
        kept: Parts kept whole, with reasons; includes ``part``.
    """
    line, modules = kept[part].line, dict(model.named_modules())
    if line is None or not isinstance(part, str) or any(modules[part].children()):
        return {}
    alike = [path for path, module in modules.items() if _kind_and_options(module) == _kind_and_options(modules[part])]
    if sum(path in kept and kept[path].line == line for path in alike) < 2:
        return {}
    return {path: Reason(f"it has the class and options of {part!r}") for path in alike if not _is_kept(path, kept)}


def _kind_and_options(module: nn.Module) -> tuple[type, dict[str, object]]:
    return type(module), {name: value for name, value in vars(module).items() if isinstance(value, _OPTIONS)}


def name_of_part(part: Part) -> str:
    if isinstance(part, str):
        return f"module {part}"
    code = part.__code__
    return f"function {part.__qualname__} ({short(code.co_filename)}:{code.co_firstlineno})"


def _running(frames: list[FrameType], paths: list[str], kept: Mapping[Part, Reason]) -> list[Part | FrameType]:
    """Returns the modules (paths), functions kept whole, and other frames that were running, outermost first."""
    modules = iter(paths[1:])
    found: list[Part | FrameType] = []
    for frame in frames:
        if runs_a_module(frame.f_code):
            found.append(next(modules))
        elif (function := intercepted_by(frame.f_code)) is not None and function in kept:
            found.append(function)
        else:
            found.append(frame)
    return [*found, *modules]  # an error raised after the run has no frames of the modules


def _function(frame: FrameType) -> FunctionType | None:
    """Returns the function that a frame runs, if it can be kept whole."""
    code = frame.f_code
    arguments = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    if is_library(code.co_filename) or any(hides_tensors(frame.f_locals.get(name)) for name in arguments):
        return None
    return function_of(code)
