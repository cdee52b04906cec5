"""Creates a transformers model with random weights from its config, and sample inputs. Works offline."""

from __future__ import annotations

import os
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipecompile.errors import InputError

try:
    import transformers
except ImportError as error:
    raise InputError(f"hf: needs transformers ({error}); pip install 'pipecompile[hf]'") from error

# The heads to look for, by kind of model, most specific first.
ENCODER_DECODER = ("SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ")
OTHERS = ("IMAGE_CLASSIFICATION", "MASKED_LM", "CAUSAL_LM", "CTC", "AUDIO_CLASSIFICATION", "SEMANTIC_SEGMENTATION")
FUNCTION = "write a function that returns the model and inputs, and name it instead: path/file.py:function"

transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # default configs cause warnings


def load_config(name: str, batch: int, length: int, meta: bool) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """Creates the model of a config, and the arguments of a sample call; see ``model_spec.load``.

    Raises:
        InputError: the config is not found, or the model or its sample inputs cannot be created from it.
    """
    config = _config(name)
    model = _build(name, _class(name, config), config, meta)
    return model, (), _inputs(name, model, batch, length)


def _config(name: str) -> Any:
    there = Path(name).exists()
    try:
        if not there and name in transformers.CONFIG_MAPPING:
            return transformers.AutoConfig.for_model(name)
        return transformers.AutoConfig.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        if there:
            raise InputError(
                f"{name} is not a config that transformers can read ({error}); use a directory with a config.json"
            ) from error
        close = get_close_matches(name, list(transformers.CONFIG_MAPPING), n=3)
        raise InputError(
            f"hf:{name} is not a model type of transformers, a path, or a model in the local Hugging Face cache; "
            + (
                f"did you mean hf:{' or hf:'.join(close)}?"
                if close
                else "see transformers.CONFIG_MAPPING for all types"
            )
        ) from error


def _class(name: str, config: Any) -> Callable[[Any], nn.Module]:
    """The class named in the config, otherwise the class with the most specific head."""
    for architecture in getattr(config, "architectures", None) or ():
        if hasattr(transformers, architecture):
            return getattr(transformers, architecture)  # type: ignore[no-any-return]
    auto = transformers.models.auto.modeling_auto
    for head in ENCODER_DECODER if getattr(config, "is_encoder_decoder", False) else OTHERS:
        found = getattr(auto, f"MODEL_FOR_{head}_MAPPING").get(type(config), None)
        if found is not None:
            return found  # type: ignore[no-any-return]
    base: Any = auto.MODEL_MAPPING.get(type(config), None)
    if base is None:
        raise InputError(
            f"hf:{name}: transformers does not have a model for configs of type {config.model_type!r}; {FUNCTION}"
        )
    return base[0] if isinstance(base, tuple) else base  # type: ignore[no-any-return]


def _build(name: str, make: Callable[[Any], nn.Module], config: Any, meta: bool) -> nn.Module:
    try:
        draft = _without_memory(make, config)
        if draft is not None and meta:
            return draft
        if draft is not None:
            _refuse_too_large(name, draft)
        return make(config)
    except InputError:
        raise
    except Exception as error:  # an incomplete config, or a missing package
        raise InputError(
            f"hf:{name}: the model cannot be created ({type(error).__name__}: {str(error).strip()}); {FUNCTION}"
        ) from error


def _without_memory(make: Callable[[Any], nn.Module], config: Any) -> nn.Module | None:
    """The model on the meta device; None if its constructor reads values."""
    try:
        with torch.device("meta"):
            return make(config)
    except (NotImplementedError, RuntimeError):
        return None


def _refuse_too_large(name: str, draft: nn.Module) -> None:
    nbytes = sum(parameter.nbytes for parameter in draft.parameters())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if nbytes > memory:
        raise InputError(
            f"hf:{name} has {nbytes / 2**30:.0f} GiB of parameters, but this machine has {memory / 2**30:.0f} GiB of "
            f"memory; use --costs count, which does not allocate parameters"
        )


def _inputs(name: str, model: nn.Module, batch: int, length: int) -> dict[str, Tensor]:
    config: Any = model.config
    match main := getattr(model, "main_input_name", "input_ids"):
        case "input_ids" if hasattr(config, "vision_config"):
            raise InputError(f"hf:{name} takes text and images; {FUNCTION}")
        case "input_ids":
            ids = _ids(config, batch, length)
            return {"input_ids": ids, **_decoder_ids(config, ids), **_labels(model, ids)}
        case "pixel_values":
            pixels = _pixels(config, batch)
            return {"pixel_values": pixels, **_labels(model, pixels)}
        case "input_features" if hasattr(config, "max_source_positions"):
            features = torch.randn(batch, config.num_mel_bins, 2 * config.max_source_positions)
            ids = _ids(config, batch, length)
            return {"input_features": features, **_decoder_ids(config, ids), **_labels(model, ids)}
        case "input_values":
            return {"input_values": torch.randn(batch, 16_000)}
        case _:
            raise InputError(f"hf:{name} takes {main}, which cannot be created from a config; {FUNCTION}")


def _ids(config: Any, batch: int, length: int) -> Tensor:
    text = config.get_text_config(decoder=True)
    limits = (getattr(text, key, None) for key in ("max_position_embeddings", "n_positions", "max_target_positions"))
    length = min([length, *(limit for limit in limits if isinstance(limit, int) and limit > 0)])
    return torch.randint(0, text.vocab_size, (batch, length))


def _decoder_ids(config: Any, ids: Tensor) -> dict[str, Tensor]:
    return {"decoder_input_ids": ids.clone()} if getattr(config, "is_encoder_decoder", False) else {}


def _pixels(config: Any, batch: int) -> Tensor:
    size = getattr(config, "image_size", 224)
    height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    return torch.randn(batch, getattr(config, "num_channels", 3), height, width)


def _labels(model: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    """Labels for the model's head, so that the plan includes the loss."""
    kind = type(model).__name__
    if kind.endswith(
        ("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForConditionalGeneration", "ForTokenClassification")
    ):
        return {"labels": inputs.clone() if "Token" not in kind else torch.zeros_like(inputs)}
    if kind.endswith(("ForSequenceClassification", "ForImageClassification")):
        return {"labels": torch.zeros(len(inputs), dtype=torch.long)}
    if kind.endswith("ForQuestionAnswering"):
        return dict.fromkeys(("start_positions", "end_positions"), torch.zeros(len(inputs), dtype=torch.long))
    return {}
