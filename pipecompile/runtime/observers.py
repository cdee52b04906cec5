"""What observes the calling thread, and no other: dispatch modes, hooks on saved tensors, torch.profiler.

torch keeps them per thread, so they see nothing of ranks that run in threads of their own. While there is one, the
calling thread runs all ranks itself. Accelerators still work in parallel, since it only queues their work; stages on
the CPU run one after another.

``torch.profiler`` with ``_ExperimentalConfig(profile_all_threads=True)`` sees the ranks' own threads, and a function
mode (``TorchFunctionMode``) is part of the capture.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from pipecompile.ops.torch_internals import (
    _disable_current_modes,
    _enable_record_function,
    _get_current_dispatch_mode_stack,
    _profiler_enabled,
    _saved_tensors_hooks_disable,
    _saved_tensors_hooks_enable,
    _saved_tensors_hooks_get_disabled_error_message,
    _top_saved_tensors_default_hooks,
)


@dataclass(frozen=True)
class Observers:
    """What observes a thread.

    Attributes:
        modes: names of dispatch modes, such as ``FlopCounterMode``.
        hooks: whether there are hooks on saved tensors, other than those of a checkpoint around the call.
        profiler: whether torch.profiler records this thread alone.
    """

    modes: tuple[str, ...]
    hooks: bool
    profiler: bool

    @staticmethod
    def here() -> Observers:
        """Those of the calling thread."""
        modes = tuple(type(mode).__name__.lstrip("_") for mode in _get_current_dispatch_mode_stack())
        return Observers(modes, _are_the_users(_top_saved_tensors_default_hooks(True)), _profiler_enabled())

    def __bool__(self) -> bool:
        return bool(self.modes) or self.hooks or self.profiler

    def __str__(self) -> str:
        hooks, profiler = ["hooks on saved tensors"] * self.hooks, ["torch.profiler"] * self.profiler
        return ", ".join([*self.modes, *hooks, *profiler])


def _are_the_users(hooks: Any) -> bool:
    """Whether hooks on saved tensors are not those of a checkpoint, which would run the pipeline again."""
    return hooks is not None and getattr(hooks[0], "__module__", "") != "torch.utils.checkpoint"


def hooks_on_saved() -> bool:
    """Whether the calling thread has hooks on saved tensors, a checkpoint's included."""
    return _top_saved_tensors_default_hooks(True) is not None


def saved_as_they_are() -> Any:
    """A context that hides tensors saved in it from the thread's hooks on saved tensors."""
    if not hooks_on_saved():
        return nullcontext()  # torch.func in a forward does not allow hooks of any kind
    return torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)


@contextmanager
def unobserved() -> Iterator[None]:
    """A context for work that is not the model's, such as a capture: no observer of the thread sees it.

    Nor does the anomaly mode: gradients that are made up to time a backward may well be NaN.
    """
    with _disable_current_modes(), _allowing_hooks(), saved_as_they_are(), torch.autograd.set_detect_anomaly(False):
        before = _profiler_enabled()
        if before:
            _enable_record_function(False)
        try:
            yield
        finally:
            if before:
                _enable_record_function(True)


@contextmanager
def _allowing_hooks() -> Iterator[None]:
    """A context in which hooks on saved tensors are allowed, by which a profile finds what autograd keeps."""
    forbidden = _saved_tensors_hooks_get_disabled_error_message()
    if forbidden is None:
        yield
        return
    _saved_tensors_hooks_enable()
    try:
        yield
    finally:
        _saved_tensors_hooks_disable(forbidden)
