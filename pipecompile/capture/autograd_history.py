"""Checks the gradient history of recorded tensors, to find calls that the tracer did not see.

A graph of functions has the model's gradients only if it contains every function that autograd has seen. A call that
reaches autograd in another way (a C++ extension, an autograd node built in Python) leaves a mark: the ``grad_fn`` of a
tensor is not the one it was recorded with, or leads to a tensor that is not in the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from operator import attrgetter
from typing import Any

from torch import Tensor

from pipecompile.capture.fake_runs import run_on_fakes
from pipecompile.capture.functionalize import storage_key
from pipecompile.ops.symbols import Shapes
from pipecompile.ops.tensor_args import is_real

_GRAD_FN = attrgetter("grad_fn")


class Histories:
    """The gradient histories of one trace.

    Args:
        is_known: Returns whether a tensor is in the graph.
        shapes: The symbolic sizes of the trace.
    """

    def __init__(self, is_known: Callable[[Tensor], bool], shapes: Shapes | None) -> None:
        self.is_known = is_known
        self.shapes = shapes
        self.noted: dict[int, tuple[Any, int]] = {}  # by the tensor's identity: its grad_fn, and the writes before it
        self.writes: dict[int | None, int] = {}  # recorded writes, by storage: each changes the history of all views
        self.seen: set[Any] = set()  # autograd nodes created by recorded calls

    def note(self, tensor: Tensor) -> None:
        """Notes the history of a tensor after a recorded call."""
        if is_real(tensor) or not _has_history(tensor):
            return
        node = self._node(tensor)
        self.noted[id(tensor)] = (node, self.writes.get(storage_key(tensor), 0))
        self.seen.add(node)

    def forget(self, tensor: Tensor) -> None:
        """Accepts whatever history the tensor has the next time it is checked."""
        self.noted.pop(id(tensor), None)

    def note_write(self, tensor: Tensor) -> None:
        """Notes that a recorded call wrote to the memory of a tensor."""
        key = storage_key(tensor)
        self.writes[key] = self.writes.get(key, 0) + 1

    def stranger(self, tensor: Tensor) -> Any:
        """Returns the autograd node that entered a tensor's history unseen, or None."""
        if is_real(tensor) or not _has_history(tensor):
            return None
        noted = self.noted.get(id(tensor))
        if noted is None or noted[1] != self.writes.get(storage_key(tensor), 0):
            self.note(tensor)
            return None
        node = self._node(tensor)
        return None if node is noted[0] else node

    def lost(self, results: Iterable[Tensor]) -> Tensor | None:
        """Returns a tensor that the results of a call depend on but the graph does not contain, or None."""
        nodes = [self._node(t) for t in results if not is_real(t) and _has_history(t)]
        stack = [node for node in nodes if node is not None]
        while stack:
            node = stack.pop()
            if node in self.seen:
                continue
            self.seen.add(node)
            variable = getattr(node, "variable", None)  # of a leaf
            if isinstance(variable, Tensor) and not self.is_known(variable):
                return variable
            stack.extend(source for source, _ in node.next_functions if source is not None)
        return None

    def _node(self, tensor: Tensor) -> Any:
        """Returns the ``grad_fn`` of a tensor. After a write, autograd computes a view anew to make it."""
        return run_on_fakes(_GRAD_FN, (tensor,), {}, self.shapes)


def _has_history(tensor: Tensor) -> bool:
    return not tensor.is_inference()
