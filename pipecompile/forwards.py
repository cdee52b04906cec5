"""``pipe.forward``: that of the model's class, or one that a tool has set on the pipe.

Tools wrap a forward, ``model.forward = wrapped(model.forward)``: accelerate for mixed precision and for offloading,
others to count or to time calls. What is set is the model's forward, so the pipeline captures it. It calls what
``pipe.forward`` was before, which therefore has two meanings. It runs the pipeline; but inside a call of the pipeline,
in a capture or a comparison, it runs what it stands for: the model's own Python.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn

from pipecompile.pipeline import Pipeline

NAME = "pipeline"  # the only attribute that is added to those of the model
FORWARD = "forward"


def class_forward(pipeline: Pipeline) -> Any:
    """Returns ``forward`` for the class of a pipe; it stands for that of the model's class."""
    model = pipeline.model

    def own(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = _pipeline_of(self)
        model = self if found is None else found.model
        if FORWARD in vars(model):
            return type(model).forward(model, *args, **kwargs)
        return model.forward(*args, **kwargs)

    return _standing_for(own, inspect.getattr_static(type(model), FORWARD), pipeline)


def looking_up(base: type[nn.Module], pipeline: Pipeline) -> Callable[[Any, str], Any]:
    """Returns ``__getattribute__`` for the class of a pipe, by which each forward that it finds runs the pipeline."""
    attributes = vars(pipeline.model)
    found: list[tuple[Any, Any]] = []  # the forward that was last set, and what stands for it

    def __getattribute__(pipe: Any, name: str) -> Any:
        if name != FORWARD:
            return base.__getattribute__(pipe, name)
        if FORWARD not in attributes:
            return MethodType(type(pipe).forward, pipe)
        given = attributes[FORWARD]
        if not found or found[0][0] is not given:
            found[:] = [(given, _standing_for(*_as_method(given), pipeline))]
        return MethodType(found[0][1], pipe)

    return __getattribute__


def _pipeline_of(module: Any) -> Pipeline | None:
    """The pipeline of a pipe; None for its model, and for any other module."""
    return getattr(module, NAME) if isinstance(getattr(type(module), NAME, None), property) else None


def _as_method(given: Any) -> tuple[Callable[..., Any], Any]:
    """Returns what was set on an instance as a function of the instance, and what it looks like."""
    if isinstance(given, MethodType):
        return given.__func__, given.__func__
    return lambda self, *args, **kwargs: given(*args, **kwargs), given


def _standing_for(own: Callable[..., Any], described: Any, pipeline: Pipeline) -> Any:
    """Returns a method that runs the pipeline, and inside a call of it ``own``; looks like ``described``."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = _pipeline_of(self)  # a copy of a pipe may have a forward that wraps this one
        return own(self, *args, **kwargs) if found is None or found.is_inside else found(*args, **kwargs)

    def seen(*args: Any, **kwargs: Any) -> None: ...

    if hasattr(described, "__name__"):  # a scripted model has none
        functools.update_wrapper(seen, described)
    signature = inspect.signature(pipeline.signature)
    unbound = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    seen.__signature__ = signature.replace(parameters=[unbound, *signature.parameters.values()])  # type: ignore[attr-defined]
    functools.update_wrapper(forward, seen)
    del forward.__dict__["__signature__"]  # or what wraps a bound forward would copy it
    return forward
