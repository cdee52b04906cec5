"""A part of a stage that ``torch.compile`` compiles as one graph.

A part owns no tensors: parameters are arguments, like all that it reads. So nothing in it depends on which tensors they
are, and a new version of the weights compiles nothing again. Sizes that change from call to call are marked in the
arguments, so that the first graph holds for all of them. (torch.compile treats a size of 1 as a case of its own.)

Nothing falls back silently. ``fullgraph=True`` makes torch raise where it would break the graph, or where it would give
up after too many graphs of one part. The part then runs uncompiled from that call on, with a warning, and ``why`` says
what was raised.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from pipecompile.ops.backends import Backend
from pipecompile.ops.torch_internals import backwards_without_autocast, compile_errors, mark_dynamic


class CompiledPart:
    """Runs a part of a stage, compiled at its first call.

    Args:
        module: Takes the values that the part reads and returns those read from it; owns no tensors.
        name: Name of the part in generated code.
        backend: Compiles a graph.
        changing: By position of the argument, the dimensions whose sizes may change from call to call.
        where: The part in messages: its stage and modules.

    Attributes:
        graphs: How often it was compiled: for other sizes of 1, with and without gradients.
        seconds: The time of the calls that compiled.
        why: Why it runs uncompiled; empty if it does not.
    """

    def __init__(
        self, module: fx.GraphModule, name: str, backend: Backend, changing: Mapping[int, Sequence[int]], where: str
    ) -> None:
        self.module = module
        self.__name__ = name
        self.where = where
        self.changing = tuple((position, tuple(dims)) for position, dims in changing.items() if dims)
        self.graphs = 0
        self.seconds = 0.0
        self.why = ""
        self._backend = backend
        self._compiled: Callable[..., Any] | None = None

    def __call__(self, *values: Any) -> tuple[Any, ...]:
        if self.why:
            return self._uncompiled(values)
        for position, dims in self.changing:
            if isinstance(values[position], Tensor):
                mark_dynamic(values[position], dims)
        before, start = self.graphs, time.perf_counter()
        try:
            out: tuple[Any, ...] = self._ready()(*values)
        except compile_errors() as error:
            again = self._uncompiled(values)  # raises what the model raises, if that is why
            self._give_up(error)
            return again
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, IndexError, ValueError, TypeError):
            self._uncompiled(values)  # fails too, in a line that can be told
            raise
        if self.graphs > before:
            self.seconds += time.perf_counter() - start
        return out

    def _ready(self) -> Callable[..., Any]:
        if self._compiled is None:
            self._compiled = torch.compile(self.module.forward, fullgraph=True, backend=self._counted)
        return self._compiled

    def _counted(self, graph: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        with backwards_without_autocast():
            compiled = self._backend(graph, inputs)
        self.graphs += 1
        return compiled

    def _uncompiled(self, values: tuple[Any, ...]) -> tuple[Any, ...]:
        out: tuple[Any, ...] = self.module(*values)
        return out

    def _give_up(self, error: Exception) -> None:
        self.why = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:300]
        warnings.warn(
            f"{self.where} runs uncompiled, which computes the same, more slowly, because torch.compile raised "
            f"{self.why}",
            stacklevel=2,
        )
