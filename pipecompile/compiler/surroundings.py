"""What a pipeline cannot be called in, or with: transforms that the ranks' threads would not see.

``torch.func``, ``torch.jit.trace``, ``make_fx``, ``torch.export`` and fake tensors follow what one thread computes. A
pipeline computes in threads of its own: they would record constants, or fail far from the cause.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from pipecompile.errors import InputError
from pipecompile.ops.torch_internals import (
    FakeTensor,
    FakeTensorMode,
    ProxyTorchDispatchMode,
    _get_current_dispatch_mode_stack,
    _get_tracing_state,
    _top_saved_tensors_default_hooks,
    peek_interpreter_stack,
    set_eval_frame,
)


def check_surroundings(arguments: Iterable[object]) -> None:
    """Passes if a call can be made here, with these leaves of its arguments.

    Raises:
        InputError: says what follows the call, and what to do.
    """
    if peek_interpreter_stack() is not None:
        _refuse("inside torch.func (grad, vmap, jacrev ...)", "transforms a function")
    if _get_tracing_state() is not None:
        _refuse("inside torch.jit.trace", "records what is computed")
    if torch.compiler.is_compiling():
        _refuse("inside torch.compile or torch.export", "records what is computed")
    for mode in _get_current_dispatch_mode_stack():
        if isinstance(mode, ProxyTorchDispatchMode | FakeTensorMode):
            _refuse(f"inside {type(mode).__name__} (make_fx, torch.export)", "records what is computed")
    for argument in arguments:
        if isinstance(argument, FakeTensor):
            _refuse("with fake tensors", "computes shapes alone")
        if isinstance(argument, torch.fx.Proxy):
            _refuse("inside torch.fx.symbolic_trace", "records what is computed")


@contextmanager
def uncompiled() -> Iterator[None]:
    """Within ``torch.compile``: what follows is run as it is, a break in the compiled graph."""
    before = set_eval_frame(None)
    try:
        yield
    finally:
        set_eval_frame(before)


def saved_as_they_are() -> Any:
    """Hooks of the caller on saved tensors (a checkpoint around the call) see nothing of what runs in it."""
    if _top_saved_tensors_default_hooks(True) is None:
        return nullcontext()  # torch.func in a forward does not go with hooks, of whatever kind
    return torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)


class Substituted(InputError):
    """Other tensors stand in the place of a model's parameters."""


def check_parameters(model: nn.Module) -> None:
    """Passes if the model has parameters of its own, to be captured with.

    Raises:
        Substituted: names one in whose place there is another tensor.
        InputError: names one that has no shape yet.
    """
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise InputError(
                f"parameter {name!r} has no shape yet: its module takes it from the first batch; call the model once "
                f"on such a batch before the first step: with torch.no_grad(): model(...)"
            )
        if not isinstance(parameter, nn.Parameter):
            raise Substituted(
                f"{name!r} is a plain tensor in the place of a parameter, as under torch.func.functional_call: a "
                f"pipeline plans for, and an asynchronous one trains, the model's own parameters; call "
                f"functional_call(pipe.pipeline.model, ...), or copy the values into the parameters"
            )


def _refuse(where: str, what: str) -> None:
    raise InputError(
        f"a pipeline is called {where}, which {what} in one thread; a pipeline's stages run in threads of their own; "
        f"use the unsplit model there, pipe.pipeline.model"
    )
