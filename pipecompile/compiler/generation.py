"""What ``generate`` of transformers needs of a pipe in addition to its calls: an encoder that runs in the stages.

``generate`` calls the model once per token, which runs the pipeline. An encoder it calls by itself, once, before the
first token. As a module of the unsplit model, the encoder has its parameters on the devices of several stages. So its
place is taken by a call of the whole model with one token for the decoder, which returns what the encoder returns.

Images, too, ``generate`` encodes by itself (``get_image_features``). But the model's forward takes them as they are, so
they are left in the arguments of the first call.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from pipecompile.errors import InputError

OUTPUTS = "transformers.modeling_outputs"
_NOT_FOR_THE_ENCODER = frozenset({"return_dict", "labels"})  # an encoder ignores labels, which Seq2SeqTrainer passes on
_GENERATING: ContextVar[bool] = ContextVar("generating", default=False)


@contextmanager
def generating(moves_the_model: bool = False) -> Iterator[None]:
    """A context in which ``generate`` runs.

    Args:
        moves_the_model: whether the first call moves the model to the devices of the stages, so that the prompt may be
            there already, of which transformers would warn.
    """
    token = _GENERATING.set(True)
    try:
        with warnings.catch_warnings():
            if moves_the_model:
                warnings.filterwarnings("ignore", message=r"You are calling \.generate\(\) with the `input_ids`")
            yield
    finally:
        _GENERATING.reset(token)


def is_generating() -> bool:
    """Whether ``generate`` runs in this thread."""
    return _GENERATING.get()


def generated_unsplit(base: type[Any], model: nn.Module) -> str:
    """Says that ``generate`` of a class has not called the pipe, what it may have called, and what to do."""
    inside = [repr(name) for name, module in model.named_modules() if name and hasattr(type(module), "generate")]
    called = f"modules inside it ({', '.join(inside[:3])})" if inside else "modules inside it"
    adapter = base.__module__.partition(".")[0] == "peft"
    other = "compile the model inside (peft.get_peft_model(pipecompile.compile(model, ...), ...)), or "
    return (
        f"generate() of {base.__name__} has called {called} and never the pipe, so the unsplit model has generated; "
        f"{other if adapter else ''}generate with pipe.pipeline.model"
    )


_ENCODE_IMAGES = "_prepare_multimodal_encoder_kwargs_for_generation"  # of transformers, since 5.20
_EXPAND = "_expand_inputs_for_generation"


def images_pass_through(base: type[Any]) -> dict[str, Any]:
    """Members of a pipe whose model takes images: ``generate`` leaves them to the first call, whose stages encode them.

    If each row becomes several (beams, several sequences), the features of its images are repeated with it, so they are
    needed before; the unsplit model computes them.
    """
    encode, expand = getattr(base, _ENCODE_IMAGES, None), getattr(base, _EXPAND, None)
    if encode is None or expand is None:
        return {}

    def left_as_they_are(pipe: Any, model_kwargs: dict[str, Any]) -> dict[str, Any]:
        return model_kwargs

    def expanded(pipe: Any, expand_size: int = 1, is_encoder_decoder: bool = False, **arguments: Any) -> Any:
        if expand_size > 1 and not is_encoder_decoder and pipe._supports_mm_encoder_outputs():
            ids = arguments.pop("input_ids", None)
            try:
                arguments = {"input_ids": ids, **encode(pipe, arguments)}
            except RuntimeError as error:
                if len({parameter.device for parameter in pipe.parameters()}) == 1:
                    raise
                raise InputError(
                    f"with beams or several sequences, generate() encodes images with modules of {base.__name__} "
                    f"before the first call, but their weights are on the devices of several stages; pass "
                    f"mm_encoder_outputs= of the unsplit model, or generate one sequence for each row"
                ) from error
        return expand(pipe, expand_size, is_encoder_decoder, **arguments)

    return {_ENCODE_IMAGES: left_as_they_are, _EXPAND: expanded}


class StagedEncoder:
    """Stands for the encoder of a model, which ``generate`` calls, and runs in the stages.

    Args:
        pipe: the whole model; its output has ``encoder_last_hidden_state``.
        encoder: the encoder of the unsplit model, whose attributes it has.
    """

    def __init__(self, pipe: Callable[..., Any], encoder: nn.Module) -> None:
        self._pipe = pipe
        self._encoder = encoder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._encoder, name)

    def __call__(self, **arguments: Any) -> Any:
        """Runs the encoder.

        Args:
            arguments: of the encoder; with a batch in the first dimension of each tensor.

        Returns:
            A ``BaseModelOutput``, on the device of the stage that makes it.

        Raises:
            InputError: the whole model does not take an argument of the encoder, or does not return its output.
        """
        parameters = inspect.signature(self._pipe.forward).parameters  # type: ignore[attr-defined]
        takes_all = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
        given = {n: value for n, value in arguments.items() if value is not None and n not in _NOT_FOR_THE_ENCODER}
        for name in set() if takes_all else given.keys() - parameters.keys():
            raise InputError(
                f"generate() passes {name!r} to the encoder, but the forward of {type(self._pipe).__name__} does not "
                f"take it, so the stages cannot run the encoder; pass encoder_outputs= of the unsplit model"
            )
        rows, device = next((t.shape[0], t.device) for t in given.values() if isinstance(t, Tensor))
        start = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        output = self._pipe(**given, decoder_input_ids=start, use_cache=False, return_dict=True)
        if getattr(output, "encoder_last_hidden_state", None) is None:
            raise InputError(
                f"the output of {type(self._pipe).__name__} has no encoder_last_hidden_state, so the stages cannot run "
                f"the encoder for generate(); pass encoder_outputs= of the unsplit model"
            )
        return sys.modules[OUTPUTS].BaseModelOutput(
            last_hidden_state=output.encoder_last_hidden_state,
            hidden_states=getattr(output, "encoder_hidden_states", None),
            attentions=getattr(output, "encoder_attentions", None),
        )
