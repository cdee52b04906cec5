"""Runs scripted or compiled parts of a model as the Python that they were written in, during a trace.

TorchScript's interpreter and ``torch.compile`` run code that Python modes do not see. Both keep the original functions,
which compute the same.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from pipecompile.errors import DependsOnData
from pipecompile.ops.torch_internals import ScriptFunction, ScriptMethod


@contextmanager
def as_python(model: nn.Module) -> Iterator[None]:
    """Runs calls of scripted functions, methods of scripted modules, and compiled functions as Python."""
    thread = threading.get_ident()
    scripted = [m for m in model.modules() if isinstance(m, torch.jit._script.RecursiveScriptModule)]

    def python_of_method(method: Any) -> Callable[..., Any] | None:
        module = next((m for m in scripted if m._c == method.owner), None)
        kind = getattr(getattr(module, "_concrete_type", None), "py_class", None)
        function = getattr(kind, method.name, None)
        return None if function is None else lambda *args, **kwargs: function(module, *args, **kwargs)

    with ExitStack() as stack:
        stack.enter_context(_run_as(ScriptFunction, _python_of_function, thread))
        stack.enter_context(_run_as(ScriptMethod, python_of_method, thread))
        if "torch._dynamo" in sys.modules:  # otherwise nothing has been compiled
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


def _python_of_function(function: Any) -> Callable[..., Any] | None:
    return getattr(function, "_torchdynamo_inline", None)


@contextmanager
def _run_as(kind: Any, python_of: Callable[[Any], Callable[..., Any] | None], thread: int) -> Iterator[None]:
    original = kind.__dict__["__call__"]

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != thread:
            return original(self, *args, **kwargs)
        python = python_of(self)
        if python is None:
            raise DependsOnData(
                f"TorchScript runs {self.name}, whose Python source is missing (it was traced, or loaded from a "
                f"file); build the module in Python, or keep the module around it whole with leaf_modules="
            )
        return python(*args, **kwargs)

    kind.__call__ = call
    try:
        yield
    finally:
        kind.__call__ = original
