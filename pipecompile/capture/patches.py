"""Patches torch during a trace, to show the tracer what a ``TorchFunctionMode`` does not see.

- calls of modules: the path of each node, and which modules are leaves; functions that are leaves
- ``torch.autograd.Function.apply``: recorded as one call, which keeps the custom backward
- ``torch.utils.checkpoint``: the nodes inside are marked for recomputation
- autocast regions that the model enters
- ``Tensor.set_``, ``F.l1_loss`` with ``weight=``: recorded, though torch does not dispatch them
- ``torch.utils.swap_tensors``, ``torch.manual_seed``: refused
- ``torch.from_numpy``: creates a constant
- checks of libraries whether they are being traced, to take other branches: the answer is no
- arithmetic on symbolic sizes: cached
- ``len(x)``: returns a symbolic size
- code that was scripted or compiled: runs as Python
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from functools import lru_cache, partial
from types import CodeType, FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import handle_torch_function
from torch.utils.checkpoint import CheckpointFunction

from pipecompile.capture.function_patching import intercepted
from pipecompile.capture.functorch_transforms import transforms_seen
from pipecompile.capture.hidden_tensors import hides_tensors
from pipecompile.capture.node_table import NodeTable
from pipecompile.capture.recorder import Recorder
from pipecompile.capture.scopes import Scopes
from pipecompile.capture.size_cache import REMEMBERED
from pipecompile.capture.symbolic_len import symbolic_lengths
from pipecompile.capture.torchscript import as_python
from pipecompile.capture.unseen_calls import check_module
from pipecompile.errors import CaptureError, DependsOnData
from pipecompile.ops.autograd_functions import APPLY, Applied
from pipecompile.ops.device_args import same_device
from pipecompile.ops.torch_internals import (
    DisableTorchFunction,
    ScriptFunction,
    SymNode,
    _disable_current_modes,
    _is_torch_function_mode_enabled,
    _parse_to,
)

SWAP: Any = torch.utils.swap_tensors


@contextmanager
def patched(
    recorder: Recorder, model: nn.Module, paths: Mapping[int, str], functions: Iterable[FunctionType] = ()
) -> Iterator[None]:
    """Patches torch while a model is traced; calls in other threads are not affected.

    Args:
        recorder: Records the trace.
        model: The model being traced.
        paths: Path of each module by identity.
        functions: Functions kept whole.
    """
    scopes = recorder.scopes
    with (
        _modules(recorder, paths),
        intercepted(functions, recorder.leaves.call_function),
        intercepted([APPLY], partial(_apply, recorder)),
        intercepted([SWAP], partial(_swap, scopes)),
        _set(recorder),
        _checkpoints(scopes),
        transforms_seen(partial(_below, recorder, threading.get_ident())),
        _autocast(scopes),
        _scripts(scopes),
        _numpy(),
        _seeds(scopes),
        _weighted_differences(),
        _eager_branches(),
        _unvalidated_distributions(),
        _arithmetic(),
        symbolic_lengths(model),
        as_python(model),
    ):
        yield


@contextmanager
def _modules(recorder: Recorder, paths: Mapping[int, str]) -> Iterator[None]:
    original, scopes = nn.Module.__call__, recorder.scopes
    thread = threading.get_ident()

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != thread:
            return original(self, *args, **kwargs)
        scopes.paths.append(paths.get(id(self), f"{scopes.path}<{type(self).__name__}>"))
        if recorder.leaves.is_leaf:
            out = recorder.leaves.call_module(self, args, kwargs, lambda *a, **k: original(self, *a, **k))
        else:
            out = original(self, *args, **kwargs)
            check_module(recorder.table, out)
        recorder.returned(scopes.path, out)
        scopes.paths.pop()  # not on an exception: its message names the innermost module
        return out

    with _replaced(nn.Module, "__call__", call), _replaced(nn.Module, "to", _unchanging(nn.Module.to, recorder.table)):
        yield


def runs_a_module(code: CodeType) -> bool:
    """Whether a frame with this code is a call of a module during a trace."""
    return code.co_name == "call" and code.co_filename == __file__


def _unchanging(original: Any, table: NodeTable) -> Any:
    """Wraps ``Module.to``: nothing to do is allowed; moving or casting parameters of the model is refused."""

    def to(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        device, dtype, _, _ = _parse_to(*args, **kwargs)
        tensors = [*self.parameters(), *self.buffers()]
        moved = [t for t in tensors if device is not None and not same_device(t.device, device)]
        cast = [t for t in tensors if dtype is not None and t.is_floating_point() and t.dtype != dtype]
        if not moved and not cast:
            return self
        if any(id(t) in table.names for t in tensors):
            raise CaptureError(
                f"{table.scopes.here}: forward moves parameters of a {type(self).__name__} to {device or dtype}, but a "
                f"step must find them there; run the model once before the first step, or call .to() on the module"
            )
        return original(self, *args, **kwargs)

    return to


def _apply(
    recorder: Recorder, function: FunctionType, original: FunctionType, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Handles a call of ``torch.autograd.Function.apply``."""
    cls, *rest = args
    if cls is CheckpointFunction:  # its function closes over parameters: trace into it
        return _reentrant_checkpoint(recorder.scopes, *rest)
    if recorder.scopes.inside_transform:
        raise DependsOnData(
            f"{recorder.scopes.here}: {cls.__qualname__}.apply is called inside torch.vmap or torch.func, where its "
            f"custom backward cannot be recorded; the module around it must be kept whole"
        )
    if not _is_torch_function_mode_enabled():
        return original(*args, **kwargs)
    if hides_tensors((rest, kwargs)):
        raise DependsOnData(
            f"{recorder.scopes.here}: {cls.__name__} takes modules, or objects that contain tensors, whose gradients a "
            f"graph of functions would lose; {recorder.scopes.keep_whole}"
        )
    with DisableTorchFunction():
        return recorder.call(Applied(cls), tuple(rest), kwargs, partial(original, cls))


def _swap(
    scopes: Scopes, function: FunctionType, original: FunctionType, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    if not _is_torch_function_mode_enabled():
        return original(*args, **kwargs)
    raise CaptureError(
        f"{scopes.here}: torch.utils.swap_tensors() also exchanges the autograd history of the tensors, which a "
        f"pipeline cannot follow; write to the existing tensor instead: tensor.data.copy_(other)"
    )


@contextmanager
def _set(recorder: Recorder) -> Iterator[None]:
    """Records ``x.set_(y)``, which does not dispatch to function modes."""
    original: Any = torch.Tensor.set_
    thread = threading.get_ident()

    def set_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != thread or not _is_torch_function_mode_enabled():
            return original(self, *args, **kwargs)
        with DisableTorchFunction():
            recorder.data_writes.set_storage(original, self, *args, **kwargs)
        return self

    torch.Tensor.set_ = set_  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del torch.Tensor.set_  # uncovers that of the base class


def _reentrant_checkpoint(scopes: Scopes, run: Any, preserve: bool, *args: Any) -> Any:
    """Handles ``checkpoint(..., use_reentrant=True)``: no gradients inside unless an argument requires grad."""
    if scopes.inside_leaf:
        raise CaptureError(
            f"{scopes.here}: torch.utils.checkpoint with use_reentrant=True is called inside a module that is kept "
            f"whole, where its gradients would not reach the pipeline; pass use_reentrant=False"
        )
    wanted = any(isinstance(arg, torch.Tensor) and arg.requires_grad for arg in args)
    with scopes.checkpoint(), nullcontext() if wanted else torch.no_grad():
        return run(*args)


@contextmanager
def _checkpoints(scopes: Scopes) -> Iterator[None]:
    """Handles ``checkpoint(..., use_reentrant=False)``, which runs its function between two steps of a generator."""

    original = torch.utils.checkpoint._checkpoint_without_reentrant_generator
    thread = threading.get_ident()

    def generator(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs) if threading.get_ident() != thread else marking()

    def marking() -> Iterator[None]:
        with scopes.checkpoint():
            yield

    with _replaced(torch.utils.checkpoint, "_checkpoint_without_reentrant_generator", generator):
        yield


def _below(recorder: Recorder, thread: int) -> Any:
    return recorder.below() if threading.get_ident() == thread else nullcontext()


@contextmanager
def _scripts(scopes: Scopes) -> Iterator[None]:
    """Runs scripted functions as Python, whose operations the mode sees; TorchScript's interpreter would hide them."""
    original = ScriptFunction.__call__
    thread = threading.get_ident()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        python = getattr(self, "_torchdynamo_inline", None)
        traced = threading.get_ident() == thread and not scopes.inside_leaf
        return python(*args, **kwargs) if traced and python is not None else original(self, *args, **kwargs)

    with _replaced(ScriptFunction, "__call__", call):
        yield


@contextmanager
def _numpy() -> Iterator[None]:
    original = torch.from_numpy

    def from_numpy(array: Any) -> Any:
        with DisableTorchFunction(), _disable_current_modes():
            return original(array)

    with _replaced(torch, "from_numpy", from_numpy):
        yield


@contextmanager
def _seeds(scopes: Scopes) -> Iterator[None]:
    original, thread = torch.manual_seed, threading.get_ident()

    def manual_seed(seed: int) -> Any:
        if threading.get_ident() != thread or scopes.inside_leaf:
            return original(seed)
        raise CaptureError(
            f"{scopes.here}: forward seeds torch's generator, but in a pipeline every random call has a seed of its "
            f"own, so the numbers would differ; draw them outside the model and pass them in"
        )

    with _replaced(torch, "manual_seed", manual_seed), _replaced(torch.random, "manual_seed", manual_seed):
        yield


@contextmanager
def _weighted_differences() -> Iterator[None]:
    """Makes ``F.l1_loss`` dispatch with all its arguments; torch leaves out ``weight=``."""
    original = F.l1_loss

    def l1_loss(*args: Any, **kwargs: Any) -> Any:
        if not _is_torch_function_mode_enabled():
            return original(*args, **kwargs)
        return handle_torch_function(original, (*args[:2], *kwargs.values()), *args, **kwargs)

    with _replaced(F, "l1_loss", l1_loss):
        yield


@contextmanager
def _eager_branches() -> Iterator[None]:
    """Makes transformers take the branches of an eager run; on fake tensors it would take others, with other masks."""
    transformers = sys.modules.get("transformers.utils.import_utils")
    original = getattr(transformers, "is_tracing", None)
    if original is None:
        yield
        return
    with ExitStack() as stack:
        for holder in _holders("is_tracing", original, tuple(map(id, sys.modules.values()))):
            stack.enter_context(_replaced(holder, "is_tracing", lambda *args, **kwargs: False))
        yield


@lru_cache(maxsize=1)
def _holders(name: str, value: Any, imported: tuple[int, ...]) -> list[Any]:
    """Returns the files that have a value among their variables; ``imported`` only keys the cache."""
    return [m for m in list(sys.modules.values()) if getattr(m, "__dict__", {}).get(name) is value]


@contextmanager
def _unvalidated_distributions() -> Iterator[None]:
    """Turns off the checks of distributions on the values of their arguments, which fake tensors do not have."""
    validates = torch.distributions.Distribution._validate_args
    torch.distributions.Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        torch.distributions.Distribution.set_default_validate_args(validates)


@contextmanager
def _arithmetic() -> Iterator[None]:
    with ExitStack() as stack:
        for name, method in REMEMBERED.items():
            stack.enter_context(_replaced(SymNode, name, method))
        yield


@contextmanager
def _autocast(scopes: Scopes) -> Iterator[None]:
    enter: Any = torch.autocast.__enter__
    leave: Any = torch.autocast.__exit__

    thread = threading.get_ident()

    def entered(self: Any) -> Any:
        if threading.get_ident() == thread:
            dtype = str(self.fast_dtype).removeprefix("torch.")
            scopes.enter((self.device, dtype, bool(self._enabled), bool(self._cache_enabled)))
        return enter(self)

    def left(self: Any, *exception: Any) -> Any:
        if threading.get_ident() == thread:
            scopes.leave()
        return leave(self, *exception)

    with _replaced(torch.autocast, "__enter__", entered), _replaced(torch.autocast, "__exit__", left):
        yield


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    original = owner.__dict__[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)
