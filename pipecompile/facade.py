"""The module that ``compile`` returns: it looks like the model to any tool, and runs the pipeline when called.

Trainers, checkpoints, PEFT, ``functional_call`` and freezing by path use a model's class, signature, attributes and
module paths. So the pipeline does not wrap the model. Its class is a new subclass of the model's class with the same
name, and it shares the model's ``__dict__``, so every attribute, parameter, hook and mode is that of the model. Only
two names differ: ``forward``, which runs the pipeline, and ``pipeline``. Notebooks show the pipeline (``_repr_html_``).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from types import FunctionType, MethodType, new_class
from typing import Any

from torch import nn

from pipecompile.compiler.generation import StagedEncoder, generating, is_generating
from pipecompile.distributed.share import Share
from pipecompile.errors import InputError
from pipecompile.pipeline import Pipeline

NAME = "pipeline"  # the only attribute that is added to those of the model
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
        "forward": _forward(pipeline),
        "__getattribute__": _looking_up(base),
        NAME: property(lambda self: pipeline, doc="The pipeline: its plan, program, report, stages and memory."),
        "__call__": _call_without_hooks if pipeline.runs_the_hooks else _calling(base),
        "__deepcopy__": lambda self, memo: as_model(pipeline.copied(memo)),
        "__reduce_ex__": lambda self, protocol: (as_model, (pipeline,)),
        "__prepare_scriptable__": _refuse_script,
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


def _forward(pipeline: Pipeline) -> Any:
    """Returns ``forward`` of the class: it runs the pipeline and has the signature of the model's."""

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
    """Always looks up ``forward`` in the class; one set on the instance (``pipe.forward = f``) is the model's."""

    def __getattribute__(pipe: Any, name: str) -> Any:
        return MethodType(type(pipe).forward, pipe) if name == "forward" else base.__getattribute__(pipe, name)

    return __getattribute__


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
            raise InputError(
                f"generate() of {base.__name__} has called modules inside it and never the pipe, so the unsplit model "
                f"has generated; compile the model inside (peft.get_peft_model(pipecompile.compile(model, ...), ...)), "
                f"or generate with pipe.pipeline.model"
            )
        return found

    def get_encoder(pipe: Any, *args: Any, **kwargs: Any) -> Any:
        encoder = base.get_encoder(pipe, *args, **kwargs)
        return StagedEncoder(pipe, encoder) if is_generating() and encoder is not pipe else encoder

    return {GENERATE: generate} | ({"get_encoder": get_encoder} if hasattr(base, "get_encoder") else {})


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


def _calling(base: type[nn.Module]) -> Callable[..., Any]:
    """Runs hooks on the model itself around the pipeline, on whole batches; ignores ``model.compile()``."""
    call = nn.Module._call_impl if base.__call__ is nn.Module.__call__ else base.__call__

    def __call__(pipe: Any, *args: Any, **kwargs: Any) -> Any:
        return call(pipe, *args, **kwargs)

    return __call__


def _call_without_hooks(pipe: Any, *args: Any, **kwargs: Any) -> Any:
    """Calls the pipeline without hooks: those on the model come before the loss function, so stages run them."""
    return pipe.forward(*args, **kwargs)


def _refuse_script(pipe: Any) -> Any:
    raise InputError(
        "a pipeline cannot be scripted, because its stages run in threads; use torch.jit.script(pipe.pipeline.model)"
    )
