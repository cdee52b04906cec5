"""Loads the model that is named on the command line, with sample inputs.

    package.module:function    a function that returns (model, inputs), in an installed or local package
    path/file.py:function      the same in a file
    hf:gpt2                    a type of transformers model, with its default config
    hf:path/or/name            a config.json, a directory with one, or a model in the local Hugging Face cache

Inputs are a dict of keyword arguments, a tuple of arguments, or one tensor. Transformers models are created from their
config with random weights, because a plan does not depend on weights. Nothing is downloaded.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from pipecompile.errors import InputError

Loaded = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]

FORMS = "write module:function, path/file.py:function, or hf: and a type of transformers model, such as hf:gpt2"


def load(spec: str, batch: int = 2, length: int = 128, meta: bool = False) -> Loaded:
    """Loads a model, and the positional and keyword arguments of a sample call.

    Args:
        spec: the name of the model, in one of the forms above.
        batch: batch size of the inputs of a transformers model.
        length: sequence length of these inputs, or the model's maximum if that is less.
        meta: create a transformers model on the meta device, without memory for its weights.

    Raises:
        InputError: ``spec`` is not in one of the forms above, or the model cannot be found or created.
    """
    kind, colon, name = spec.partition(":")
    if kind == "hf" and name:
        from pipecompile.cli.huggingface import load_config  # transformers is optional

        return load_config(name, batch, length, meta)
    place, colon, function = spec.rpartition(":")
    if not (place and colon and function):
        raise InputError(f"{spec!r} is not the name of a model; {FORMS}")
    return _checked(spec, _call(spec, _function(_module(place), place, function)))


def _module(place: str) -> ModuleType:
    try:
        return _file_module(Path(place)) if place.endswith(".py") else _named_module(place)
    except InputError:
        raise
    except Exception as error:  # the user's module can raise anything
        raise InputError(f"importing {place} failed with {_told(error)}; it must be importable from here") from error


def _named_module(name: str) -> ModuleType:
    _make_importable(Path.cwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # the module exists, but imports one that does not
        raise InputError(f"module {error.name!r} is neither in this directory nor installed; {FORMS}") from None


def _file_module(path: Path) -> ModuleType:
    if not path.is_file():
        raise InputError(f"file {path} does not exist; {FORMS}")
    _make_importable(path.resolve().parent)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)  # dataclasses and pickle look a class's module up
    spec.loader.exec_module(module)
    return module


def _make_importable(directory: Path) -> None:
    if str(directory) not in sys.path:
        sys.path.insert(0, str(directory))


def _function(module: ModuleType, place: str, name: str) -> Callable[[], Any]:
    found = getattr(module, name, None)
    if found is None:
        close = get_close_matches(name, [key for key, value in vars(module).items() if callable(value)], n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "name a function that it defines"
        raise InputError(f"{place} has no function {name!r}; {hint}")
    if not callable(found):
        raise InputError(
            f"{place}:{name} is of type {type(found).__name__}; it must be a function that returns (model, inputs)"
        )
    return found  # type: ignore[no-any-return]


def _call(spec: str, function: Callable[[], Any]) -> Any:
    try:
        return function()
    except Exception as error:  # the user's function can raise anything
        raise InputError(f"{spec} raised {_told(error)}; it must work without arguments") from error


def _checked(spec: str, result: Any) -> Loaded:
    if not isinstance(result, tuple) or len(result) != 2:
        raise InputError(f"{spec} returned {type(result).__name__}; it must return a pair (model, inputs)")
    model, inputs = result
    if not isinstance(model, nn.Module):
        raise InputError(f"{spec} returned {type(model).__name__} first; the first must be the model, an nn.Module")
    if isinstance(inputs, dict) and all(isinstance(key, str) for key in inputs):
        return model, (), inputs
    if isinstance(inputs, Tensor):
        return model, (inputs,), {}
    if isinstance(inputs, tuple | list):
        return model, tuple(inputs), {}
    raise InputError(
        f"{spec} returned {type(inputs).__name__} second; the second must be the inputs: a dict of keyword arguments, "
        f"a tuple of arguments, or one tensor"
    )


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".rstrip(": ")
