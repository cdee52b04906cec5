"""The gradient history of each recorded tensor: where it changes and the tracer has seen no call, something was missed.

A graph of functions has the model's gradients only if every function that autograd has seen is in it. What reaches
autograd some other way (a function of a C++ extension, a node of its own that Python builds) leaves a mark: a tensor
whose ``grad_fn`` is no longer the one that it was recorded with, or a ``grad_fn`` that leads to a tensor nobody knows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from pipecompile.capture.functionalize import storage_key
from pipecompile.ops.tensor_args import is_real


class Histories:
    """Those of one trace.

    Args:
        is_known: whether the graph has a tensor.
    """

    def __init__(self, is_known: Callable[[Tensor], bool]) -> None:
        self.is_known = is_known
        self.noted: dict[int, tuple[Any, int]] = {}  # by the tensor's identity: its grad_fn, and the writes before it
        self.writes: dict[int | None, int] = {}  # recorded writes, by storage: each changes the history of all views
        self.seen: set[Any] = set()  # nodes of autograd that recorded calls have made

    def note(self, tensor: Tensor) -> None:
        """Notes a tensor as a recorded call leaves it."""
        if is_real(tensor) or not _has_history(tensor):
            return
        self.noted[id(tensor)] = (tensor.grad_fn, self.writes.get(storage_key(tensor), 0))
        self.seen.add(tensor.grad_fn)

    def forget(self, tensor: Tensor) -> None:
        """Takes whatever history a tensor has when it is met next."""
        self.noted.pop(id(tensor), None)

    def note_write(self, tensor: Tensor) -> None:
        """Notes that a recorded call has written to the memory of a tensor."""
        key = storage_key(tensor)
        self.writes[key] = self.writes.get(key, 0) + 1

    def stranger(self, tensor: Tensor) -> Any:
        """The node of autograd that has come into a tensor's history unseen; None if there is none."""
        if is_real(tensor) or not _has_history(tensor):
            return None
        noted = self.noted.get(id(tensor))
        if noted is None or noted[1] != self.writes.get(storage_key(tensor), 0):
            self.note(tensor)
            return None
        return None if tensor.grad_fn is noted[0] else tensor.grad_fn

    def lost(self, results: Iterable[Tensor]) -> Tensor | None:
        """A tensor that results of a call have a gradient for, and that the graph does not have; None if none."""
        stack = [t.grad_fn for t in results if not is_real(t) and _has_history(t) and t.grad_fn is not None]
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


def _has_history(tensor: Tensor) -> bool:
    return not tensor.is_inference()
