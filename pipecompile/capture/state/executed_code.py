"""Which Python functions run while a forward is traced: those that the trace depends on.

Python tells a profile function of each call. It is told only while the model's own code runs, not while torch computes,
so that it costs little. torch's and the standard library's functions are left out, but for the modules in ``torch.nn``.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import CodeType, FrameType, FunctionType
from typing import Any

import numpy
import sympy
import torch

from pipecompile.capture.state.quiet_torch import not_collecting
from pipecompile.ops.source_lines import PACKAGE, is_library

_MOST_FRAMES = 64  # that are kept until they end, each with its variables
_STANDARD = os.path.dirname(os.__file__) + os.sep
_FOREIGN = (
    *(os.path.dirname(str(library.__file__)) + os.sep for library in (torch, numpy, sympy)),
    PACKAGE,
    "<",
)
_MODULES = tuple(os.path.join(os.path.dirname(torch.__file__), "nn", part) + os.sep for part in ("modules", "utils"))
_MODULE_ITSELF = os.path.join(_MODULES[0], "module.py")

_QUESTIONS = frozenset({torch.is_grad_enabled, torch.is_inference_mode_enabled})
Met = Callable[[FrameType], None]


class Ran:
    """The functions that have run.

    Attributes:
        functions: by identity.
        asked: what the model's own code has asked of the calling thread's modes.
    """

    def __init__(self) -> None:
        self.functions: dict[int, FunctionType] = {}
        self.asked: set[Any] = set()
        self._known: dict[int, CodeType] = {}  # code that needs no second look
        self._inner: set[int] = set()  # code written inside functions that have run
        self._frames: list[FrameType] = []
        self._active = False
        self._first: Met | None = None

    @contextmanager
    def seen(self, first: Met) -> Iterator[None]:
        """The time of a forward; ``first`` is called as each function begins to run for the first time.

        A profiler of the user's pauses meanwhile, and so does the garbage collector.
        """
        other = sys.getprofile()
        with not_collecting():
            self._first = first
            self.resume(True)
            try:
                yield
            finally:
                self.pause()
                self._first = None
                _install(other)
                self._find()
                self._frames.clear()

    def pause(self) -> bool:
        """Stops looking while torch computes; whether it was looking."""
        before, self._active = self._active, False
        sys.setprofile(None)
        return before

    def resume(self, active: bool) -> None:
        """Looks again if it did before."""
        if active and self._first is not None:
            self._active = True
            sys.setprofile(self._see)

    def add(self, functions: Iterable[FunctionType]) -> None:
        """Functions known to run."""
        self.functions.update((id(function), function) for function in functions)

    def made_meanwhile(self, function: FunctionType) -> bool:
        """Whether a function is one that the forward itself makes: the variables that it reads are the forward's."""
        return id(function.__code__) in self._inner

    def _see(self, frame: FrameType, event: str, argument: Any) -> None:
        if event == "call":
            if id(frame.f_code) not in self._known:
                self._see_call(frame)
        elif event == "c_call" and argument in _QUESTIONS and not is_library(frame.f_code.co_filename):
            self.asked.add(argument)

    def _see_call(self, frame: FrameType) -> None:
        code = frame.f_code
        foreign = is_foreign(code)
        if foreign or not code.co_freevars:  # one code with variables of an outer function may be that of several
            self._known[id(code)] = code
        if foreign:
            return
        if self._first is not None:
            self._first(frame)
        self._inner.update(id(constant) for constant in code.co_consts if isinstance(constant, CodeType))
        self._frames.append(frame)
        if len(self._frames) > _MOST_FRAMES:
            self._find()

    def _find(self) -> None:
        """Finds the functions of the frames that have ended: Python tells what such a frame refers to."""
        running = []
        for frame in self._frames:
            held = [item for item in gc.get_referents(frame) if isinstance(item, FunctionType)]
            self.add(function for function in held if function.__code__ is frame.f_code)
            if not held:
                running.append(frame)
        self._frames = running


def is_foreign(code: CodeType) -> bool:
    """Whether a function is not one that a trace depends on: torch's own below its modules, the standard library's."""
    name = code.co_filename
    if name.startswith(_MODULES):
        return name == _MODULE_ITSELF
    if name.startswith(_FOREIGN) or code.co_name == "<module>":
        return True
    return name.startswith(_STANDARD) and "-packages" not in name


def _install(profiler: Any) -> None:
    """Puts back what profiled the thread before: a function, or a profiler of cProfile's kind."""
    if profiler is None or callable(profiler):
        sys.setprofile(profiler)
    else:
        profiler.enable()
