"""What ``compile`` returns: a module that everybody takes for the model, and that runs the pipeline when it is called.

Tools look at a model's class, its signature, its attributes and its modules' paths: trainers, checkpoints, PEFT,
``functional_call``, freezing by path. So the pipeline is no wrapper around the model. Its class is a subclass of the
model's, made for it, of the same name; it shares the model's ``__dict__``, so each attribute, parameter, hook and mode
is that of the model itself. Two names are not the model's: ``forward``, which runs the pipeline, and ``pipeline``.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import FunctionType, MethodType, new_class
from typing import Any

from torch import nn

from pipecompile.errors import InputError
from pipecompile.pipeline import Pipeline

NAME = "pipeline"  # what is ours of all the attributes that the module has
GENERATE = "generate"  # the method of transformers' models that the unsplit model runs


def as_model(pipeline: Pipeline) -> Any:
    """A module that is the pipeline's model to everybody who looks, and runs the pipeline when it is called.

    Raises:
        InputError: the model has an attribute of the name that is ours, or a class that nothing can inherit from.
    """
    model = pipeline.model
    base = type(model)
    if isinstance(vars(base).get(NAME), property):
        raise InputError("the model is a pipeline already; compile pipe.pipeline.model")
    if _has(model, NAME):
        raise InputError(
            f"the model has an attribute {NAME!r} of its own, which would hide the pipeline's; rename it in the model"
        )
    members = {
        "__new__": lambda kind, *args, **kwargs: base(*args, **kwargs),  # what makes more of its kind makes models
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "forward": _forward(pipeline),
        "__getattribute__": _looking_up(base),
        NAME: property(lambda self: pipeline, doc="The pipeline: its plan, program, report, stages and memory."),
        "__call__": _call_without_hooks if pipeline.runs_the_hooks else _calling(base),
        "__deepcopy__": lambda self, memo: as_model(pipeline.copied(memo)),
        "__reduce_ex__": lambda self, protocol: (as_model, (pipeline,)),
        "__prepare_scriptable__": _refuse_script,
    }
    if callable(getattr(base, GENERATE, None)):  # passes a cache of keys and values from call to call
        members[GENERATE] = _by_the_model(getattr(base, GENERATE), pipeline)
    try:
        kind = new_class(base.__name__, (base,), exec_body=lambda namespace: namespace.update(members))
    except TypeError as error:
        raise InputError(
            f"class {base.__qualname__} cannot be inherited from, as a pipeline has to: {error}"
        ) from error
    pipe: Any = object.__new__(kind)
    object.__setattr__(pipe, "__dict__", model.__dict__)
    return pipe


def _has(model: nn.Module, name: str) -> bool:
    """Whether a model has an attribute, whatever its ``__getattr__`` may answer."""
    tables = (vars(model), *(vars(model).get(table, ()) for table in ("_parameters", "_buffers", "_modules")))
    return any(name in table for table in (*tables, *map(vars, type(model).__mro__)))


def _forward(pipeline: Pipeline) -> Any:
    """``forward`` of the class: runs the pipeline, and has the signature of the model's."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return pipeline(*args, **kwargs)

    models = inspect.getattr_static(type(pipeline.model), "forward")
    if isinstance(models, FunctionType):  # a scripted model has none
        functools.update_wrapper(forward, models)
    own = inspect.signature(pipeline.signature)
    unbound = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    forward.__signature__ = own.replace(parameters=[unbound, *own.parameters.values()])  # type: ignore[attr-defined]
    return forward


def _looking_up(base: type[nn.Module]) -> Callable[[Any, str], Any]:
    """``forward`` is the class's, whatever the instance has: one that is set, ``pipe.forward = f``, is the model's."""

    def __getattribute__(pipe: Any, name: str) -> Any:
        return MethodType(type(pipe).forward, pipe) if name == "forward" else base.__getattribute__(pipe, name)

    return __getattribute__


def _by_the_model(method: Callable[..., Any], pipeline: Pipeline) -> Any:
    """A method that the unsplit model runs, as it would without a pipeline."""

    @functools.wraps(method)
    def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return getattr(pipeline.model, method.__name__)(*args, **kwargs)

    return run


def _calling(base: type[nn.Module]) -> Callable[..., Any]:
    """Hooks on the model itself run around the pipeline, on whole batches; ``model.compile()`` compiles no pipeline."""
    call = nn.Module._call_impl if base.__call__ is nn.Module.__call__ else base.__call__

    def __call__(pipe: Any, *args: Any, **kwargs: Any) -> Any:
        return call(pipe, *args, **kwargs)

    return __call__


def _call_without_hooks(pipe: Any, *args: Any, **kwargs: Any) -> Any:
    """Hooks on the model itself are between it and the loss function, so stages run them."""
    return pipe.forward(*args, **kwargs)


def _refuse_script(pipe: Any) -> Any:
    raise InputError(
        "a pipeline cannot be scripted: its stages run in threads; use torch.jit.script(pipe.pipeline.model)"
    )
