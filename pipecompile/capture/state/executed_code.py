"""Finds the Python functions that run while forward is traced, on which the trace depends.

Python calls a profile function at each call. It is active only while the model's own code runs, not while torch
computes, so that it costs little. Functions of torch (except the modules in ``torch.nn``) and of the standard library
are ignored.
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

from pipecompile.capture.state.namespaces import is_foreign
from pipecompile.capture.state.quiet_torch import not_collecting
from pipecompile.ops.source_lines import PACKAGE, is_library

_MOST_FRAMES = 64  # kept alive until they end, each with its variables
_STANDARD = os.path.dirname(os.__file__) + os.sep
_FOREIGN = (
    *(os.path.dirname(str(library.__file__)) + os.sep for library in (torch, numpy, sympy)),
    PACKAGE,
    "<frozen",
)
_GENERATED = "<"  # code that is in no file: typed at a prompt, or made from text by a program
_MODULES = tuple(os.path.join(os.path.dirname(torch.__file__), "nn", part) + os.sep for part in ("modules", "utils"))
_MODULE_ITSELF = os.path.join(_MODULES[0], "module.py")

QUESTIONS: dict[Any, str] = {  # with their labels for the user
    torch.is_grad_enabled: "torch.is_grad_enabled()",
    torch.is_inference_mode_enabled: "torch.is_inference_mode_enabled()",
    torch.get_num_threads: "torch.get_num_threads()",
    sys.getrecursionlimit: "sys.getrecursionlimit()",
    os.getcwd: "os.getcwd()",
}
Met = Callable[[FrameType], None]


class Ran:
    """The functions that have run.

    Attributes:
        functions: The functions by identity.
        asked: Those of ``QUESTIONS`` that the model's own code has called, about modes of the thread or the process.
    """

    def __init__(self) -> None:
        self.functions: dict[int, FunctionType] = {}
        self.asked: set[Any] = set()
        self._known: dict[int, CodeType] = {}  # code that need not be examined again
        self._inner: set[int] = set()  # code of functions defined inside functions that have run
        self._frames: list[FrameType] = []
        self._active = False
        self._first: Met | None = None

    @contextmanager
    def seen(self, first: Met) -> Iterator[None]:
        """A context for forward; ``first`` is called when a function starts to run for the first time.

        A profiler of the user and the garbage collector pause meanwhile.
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
        """Stops observing while torch computes. Returns whether it was observing."""
        before, self._active = self._active, False
        sys.setprofile(None)
        return before

    def resume(self, active: bool) -> None:
        """Observes again if ``active``."""
        if active and self._first is not None:
            self._active = True
            sys.setprofile(self._observer())

    def add(self, functions: Iterable[FunctionType]) -> None:
        """Adds functions that are known to run."""
        self.functions.update((id(function), function) for function in functions)

    def made_meanwhile(self, function: FunctionType) -> bool:
        """Whether a function is defined by forward itself, so that its outer variables belong to forward."""
        return self.defines(function.__code__)

    def defines(self, code: CodeType) -> bool:
        """Whether a function that has run defines functions of this code."""
        return id(code) in self._inner

    def _observer(self) -> Callable[[FrameType, str, Any], None]:
        """Returns the profile function, which Python calls several times for each line: a closure is the fastest."""
        known, begun, asked = self._known, self._see_call, self.asked

        def see(frame: FrameType, event: str, argument: Any) -> None:
            if event == "call":
                if id(frame.f_code) not in known:
                    begun(frame)
            elif event == "c_call" and argument in QUESTIONS and not is_library(frame.f_code.co_filename):
                asked.add(argument)

        return see

    def _see_call(self, frame: FrameType) -> None:
        code = frame.f_code
        foreign = is_ignored(code, frame.f_globals)
        if foreign or not code.co_freevars:  # several functions may share code with free variables
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
        """Finds the functions of the frames that have ended, among the referents of each frame."""
        running = []
        for frame in self._frames:
            held = [item for item in gc.get_referents(frame) if isinstance(item, FunctionType)]
            self.add(function for function in held if function.__code__ is frame.f_code)
            if not held:
                running.append(frame)
        self._frames = running


def is_ignored(code: CodeType, namespace: dict[str, Any]) -> bool:
    """Whether a trace ignores a function: one of the standard library, or of torch but not of its modules.

    Code that is in no file (``<stdin>``, ``<ipython-input-3>``, methods of data classes) belongs to the module whose
    globals it reads.
    """
    name = code.co_filename
    if name.startswith(_GENERATED) and not name.startswith(_FOREIGN):
        return is_foreign(namespace.get("__name__"))
    if name.startswith(_MODULES):
        return name == _MODULE_ITSELF
    if name.startswith(_FOREIGN) or code.co_name == "<module>":
        return True
    return name.startswith(_STANDARD) and "-packages" not in name


def _install(profiler: Any) -> None:
    """Restores the thread's earlier profiler: a function, or an object like that of cProfile."""
    if profiler is None or callable(profiler):
        sys.setprofile(profiler)
    else:
        profiler.enable()
