"""The module that ``compile`` returns: it looks like the model to any tool, and runs the pipeline when called.

Trainers, checkpoints, PEFT, ``functional_call`` and freezing by path use a model's class, signature, attributes and
module paths. So the pipeline does not wrap the model. Its class is a new subclass of the model's class with the same
name, and it shares the model's ``__dict__``, so every attribute, parameter, hook and mode is that of the model. Only
two names differ: ``forward``, which runs the pipeline, and ``pipeline``. Notebooks show the pipeline (``_repr_html_``).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from types import new_class
from typing import Any

import torch
from torch import nn

from pipecompile.compiler.generation import (
    StagedEncoder,
    generated_unsplit,
    generating,
    images_pass_through,
    is_generating,
)
from pipecompile.distributed.share import Share
from pipecompile.errors import InputError
from pipecompile.forwards import NAME, class_forward, looking_up
from pipecompile.pipeline import Pipeline

RICH = "_repr_html_"  # what notebooks show, unless the model has its own
GENERATE = "generate"  # method of transformers' models that calls the model once per token


def as_model(pipeline: Pipeline) -> Any:
    """Returns a module that looks like the pipeline's model, and runs the pipeline when called.

    Raises:
        InputError: The model is a pipeline, has an attribute named ``pipeline``, or has a class that cannot be
            subclassed.
    """
    model = pipeline.model
    base = type(model)
    if isinstance(vars(base).get(NAME), property):
        raise InputError("the model is already a pipeline; compile pipe.pipeline.model instead")
    if _has(model, NAME):
        raise InputError(
            f"the model has an attribute {NAME!r} of its own, which conflicts with the pipeline's; rename it in the "
            f"model"
        )
    members = {
        "__new__": lambda kind, *args, **kwargs: base(*args, **kwargs),  # type(pipe)(...) creates a model
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__repr__": lambda self: f"{pipeline!r} of\n{base.__repr__(self)}",
        "forward": class_forward(pipeline),
        "__getattribute__": looking_up(base, pipeline),
        NAME: property(lambda self: pipeline, doc="The pipeline: its plan, program, report, stages and memory."),
        "__call__": _calling(base, pipeline),
        "__copy__": lambda self: as_model(pipeline),
        "__deepcopy__": _copied,
        "__reduce_ex__": lambda self, protocol: (_unmade, (base,), pipeline, None, None, _become),
        "__prepare_scriptable__": _refuse_script,
        "_replicate_for_data_parallel": _refuse_replicas,
    }
    if not hasattr(base, RICH):
        members[RICH] = lambda self: pipeline._repr_html_()
    if callable(getattr(base, GENERATE, None)):
        members |= _of_a_generator(base, pipeline)
    if pipeline.share is not None:
        members |= _of_a_process(base, pipeline.share)
    try:
        kind = new_class(base.__name__, (base,), exec_body=lambda namespace: namespace.update(members))
    except TypeError as error:
        raise InputError(
            f"class {base.__qualname__} cannot be subclassed, but the class of a pipeline must be a subclass of it: "
            f"{error}"
        ) from error
    pipe: Any = object.__new__(kind)
    object.__setattr__(pipe, "__dict__", model.__dict__)
    return pipe


def _has(model: nn.Module, name: str) -> bool:
    """Whether a model has an attribute, whatever its ``__getattr__`` may answer."""
    tables = (vars(model), *(vars(model).get(table, ()) for table in ("_parameters", "_buffers", "_modules")))
    return any(name in table for table in (*tables, *map(vars, type(model).__mro__)))


def _of_a_generator(base: type[Any], pipeline: Pipeline) -> dict[str, Any]:
    """Members of a pipe whose model generates: the stages run its calls, and its encoder."""

    @functools.wraps(getattr(base, GENERATE))
    def generate(pipe: Any, *args: Any, **kwargs: Any) -> Any:
        if pipeline.options.loss_fn is not None:
            raise InputError(
                "generate() needs the model's own output, but the stages return what loss_fn= returns; generate with a "
                "pipe that is compiled without loss_fn=, or with pipe.pipeline.model"
            )
        before = pipeline.calls
        with generating(moves_the_model=pipeline.captures == 0):
            found = getattr(base, GENERATE)(pipe, *args, **kwargs)
        if pipeline.calls == before:
            raise InputError(generated_unsplit(base, pipeline.model))
        return found

    def get_encoder(pipe: Any, *args: Any, **kwargs: Any) -> Any:
        encoder = base.get_encoder(pipe, *args, **kwargs)
        return StagedEncoder(pipe, encoder) if is_generating() and encoder is not pipe else encoder

    encodes = {"get_encoder": get_encoder} if hasattr(base, "get_encoder") else {}
    return {GENERATE: generate} | encodes | images_pass_through(base)


def _of_a_process(base: type[nn.Module], share: Share) -> dict[str, Any]:
    """Members of a pipe whose ranks are in several processes: its parameters are those of this process."""

    def named_parameters(
        pipe: Any, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        return share.parameters(base.named_parameters(pipe, prefix, recurse, remove_duplicate), prefix)

    def parameters(pipe: Any, recurse: bool = True) -> Iterator[nn.Parameter]:
        nothing = True
        for _, parameter in pipe.named_parameters(recurse=recurse):
            nothing = False
            yield parameter
        if nothing and recurse:
            yield from share.stand_in

    def refuse(pipe: Any, *args: Any, **kwargs: Any) -> Any:
        raise InputError(
            "no process of this pipeline has the whole model, so it cannot generate or load a state; load the weights "
            "before compile(), or use pipecompile.load()"
        )

    generates = {GENERATE: refuse} if hasattr(base, GENERATE) else {}
    return {"named_parameters": named_parameters, "parameters": parameters, "load_state_dict": refuse, **generates}


_UNTRACED = (  # torch says so where it must trace all: torch.compile(fullgraph=True), torch.export(strict=True)
    "a pipeline cannot be traced by torch.compile or torch.export, because its stages run in threads of their own; "
    "compile the stages with stage_compile=True of pipecompile.compile, or use the unsplit model, pipe.pipeline.model"
)


def _calling(base: type[nn.Module], pipeline: Pipeline) -> Callable[..., Any]:
    """Runs hooks on the model itself around the pipeline, on whole batches; ignores ``model.compile()``.

    With a loss function no hooks run here: they come before it, so stages run them.
    """
    call: Callable[..., Any] = nn.Module._call_impl if base.__call__ is nn.Module.__call__ else base.__call__

    @torch.compiler.disable(reason=_UNTRACED)  # type: ignore[no-untyped-call, untyped-decorator]
    def __call__(pipe: Any, *args: Any, **kwargs: Any) -> Any:
        pipeline.refuse_inside()
        if pipeline.runs_the_hooks:
            return pipe.forward(*args, **kwargs)
        return call(pipe, *args, **kwargs)

    called: Callable[..., Any] = __call__
    return called


def _copied(pipe: Any, memo: dict[int, Any]) -> Any:
    """A copy, known to the memo before the model is copied: a forward that is set on a pipe may be bound to it."""
    copy = memo[id(pipe)] = _unmade(type(pipe))
    _become(copy, pipe.pipeline.copied(memo))
    return copy


def _unmade(kind: type) -> Any:
    """An instance without attributes, until it becomes a pipe."""
    return object.__new__(kind)


def _become(unmade: Any, pipeline: Pipeline) -> None:
    pipe = as_model(pipeline)
    unmade.__class__ = type(pipe)
    object.__setattr__(unmade, "__dict__", pipe.__dict__)


def _refuse_replicas(pipe: Any) -> Any:
    raise InputError(
        "torch.nn.DataParallel copies the model to each device, but the stages of a pipeline have devices of their "
        "own; call the pipe itself, with PlanOptions(replicas=...) for stages on several devices (transformers' "
        "Trainer: set arguments._n_gpu = 1)"
    )


def _refuse_script(pipe: Any) -> Any:
    raise InputError(
        "a pipeline cannot be scripted, because its stages run in threads; use torch.jit.script(pipe.pipeline.model)"
    )
