"""Refuses calls of a pipeline in contexts that its threads would not see.

``torch.func``, ``torch.jit.trace``, ``make_fx``, ``torch.export`` and fake tensors follow the computation of one
thread. A pipeline computes in its own threads, so they would record constants, or fail far from the cause.
"""

from __future__ import annotations

from collections.abc import Iterable

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
    forward_ad,
    parametrize,
    peek_interpreter_stack,
)


def check_surroundings(arguments: Iterable[object]) -> None:
    """Checks that a pipeline can be called in this context, with these leaves of its arguments.

    Raises:
        InputError: it cannot; the message names the transform and the remedy.
    """
    if peek_interpreter_stack() is not None:
        _refuse("inside torch.func (grad, vmap, jacrev ...)", "transforms functions")
    if _get_tracing_state() is not None:
        _refuse("inside torch.jit.trace", "records what is computed")
    if torch.compiler.is_compiling():
        _refuse("inside torch.compile or torch.export", "records what is computed")
    for mode in _get_current_dispatch_mode_stack():
        if isinstance(mode, ProxyTorchDispatchMode | FakeTensorMode):
            _refuse(f"inside {type(mode).__name__} (make_fx, torch.export)", "records what is computed")
    if forward_ad._current_level >= 0:
        _refuse("inside torch.autograd.forward_ad.dual_level", "computes derivatives forward")
    if parametrize._cache_enabled:
        raise InputError(
            "a pipeline cannot be called inside torch.nn.utils.parametrize.cached(), whose tensors have the history of "
            "one thread, because its stages compute parametrized weights in threads of their own; call it outside"
        )
    for argument in arguments:
        if isinstance(argument, FakeTensor):
            _refuse("with fake tensors", "computes only shapes")
        if isinstance(argument, torch.fx.Proxy):
            _refuse("inside torch.fx.symbolic_trace", "records what is computed")


class Substituted(InputError):
    """A parameter of the model has been replaced by another tensor."""


def check_parameters(model: nn.Module) -> None:
    """Checks that the model can be captured with its own parameters.

    Raises:
        Substituted: a parameter has been replaced by a plain tensor.
        InputError: a parameter has no shape yet.
    """
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise InputError(
                f"parameter {name!r} has no shape yet, because its module infers it from the first batch; before "
                f"compile, call the model on a batch: with torch.no_grad(): model(...)"
            )
        if not isinstance(parameter, nn.Parameter):
            raise Substituted(
                f"{name!r} is a plain tensor in place of a parameter, as under torch.func.functional_call(), but a "
                f"pipeline captures the model's own parameters, and an asynchronous one trains them; call "
                f"functional_call(pipe.pipeline.model, ...), or copy the values into the parameters"
            )


def _refuse(where: str, what: str) -> None:
    raise InputError(
        f"a pipeline cannot be called {where}, which {what} in one thread, because its stages run in threads of their "
        f"own; call the unsplit model instead, pipe.pipeline.model"
    )
