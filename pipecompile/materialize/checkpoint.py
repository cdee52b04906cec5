"""A checkpoint in safetensors' format: one file, or shards with an index."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipecompile.errors import InputError

INDEX = "model.safetensors.index.json"
ONE = "model.safetensors"
LISTED = 3  # names in a message


@dataclass(frozen=True)
class Entry:
    """A tensor of a checkpoint, which has not been read.

    Attributes:
        dtype: safetensors' name of its type: "F32", "BF16", "I64".
    """

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: str

    def read(self) -> Tensor:
        """Its value, in memory of its file until that of the result is freed."""
        with _opened(self.file) as opened:
            value: Tensor = opened.get_tensor(self.key)
        return value


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a checkpoint by key."""

    path: Path
    entries: Mapping[str, Entry]

    @staticmethod
    def at(path: str | Path) -> Checkpoint:
        """Reads the headers of the files of a checkpoint, but none of its tensors.

        Args:
            path: a file, or a directory with ``model.safetensors``, with shards and their index, or with one file of
                any name.

        Raises:
            InputError: there is no such checkpoint, or a file of it is missing or broken.
        """
        path = Path(path)
        entries: dict[str, Entry] = {}
        for file in _files(path):
            with _opened(file) as opened:
                for key in opened.keys():  # noqa: SIM118  it is not a dict
                    there = opened.get_slice(key)
                    entries[key] = Entry(file, key, tuple(there.get_shape()), there.get_dtype())
        return Checkpoint(path, entries)

    def __str__(self) -> str:
        lines = (f"{key} {entry.dtype} {entry.shape}" for key, entry in sorted(self.entries.items()))
        return "\n".join(lines)

    def for_model(self, model: nn.Module) -> dict[str, tuple[Entry, ...]]:
        """The entries of each tensor in a model's ``state_dict``, by its first key there; several if it is tied.

        As in transformers' ``from_pretrained``, the prefix of the base model ("model.", "transformer.") may be absent
        or present in all keys, and keys that the model's class ignores are ignored.

        Raises:
            InputError: keys are missing or unexpected, or shapes or kinds of types differ; it names the first ones.
        """
        wanted = _keys_by_tensor(model)
        known = [key for keys in wanted.values() for key in keys]
        entries = self._named_for(model, known)
        found = {keys[0]: tuple(entries[key] for key in keys if key in entries) for keys in wanted.values()}
        tensors = {keys[0]: tensor for tensor, keys in wanted.items()}
        missing = [key for key, there in found.items() if not there]
        unexpected = _not_ignored(entries.keys() - set(known), model)
        if missing or unexpected:
            seen = [f"{word} {_listed(keys)}" for word, keys in (("lacks", missing), ("also has", unexpected)) if keys]
            raise InputError(
                f"from_checkpoint={str(self.path)!r} {' and '.join(seen)}; it must have the keys of "
                f"model.state_dict(): save that of a model of this class and configuration (transformers may rename "
                f"or merge keys in save_pretrained)"
            )
        for key, there in found.items():
            for entry in there:
                _refuse_misfit(key, entry, tensors[key], self.path)
        return found

    def _named_for(self, model: nn.Module, known: Sequence[str]) -> dict[str, Entry]:
        """The entries by the model's own keys, with the prefix of its base model put in or left out."""
        prefix = f"{getattr(model, 'base_model_prefix', '')}."
        if prefix == "." or not self.entries.keys().isdisjoint(known):
            return dict(self.entries)
        if any(key.startswith(prefix) for key in known):
            return {prefix + key: entry for key, entry in self.entries.items()}
        return {key.removeprefix(prefix): entry for key, entry in self.entries.items()}


def _keys_by_tensor(model: nn.Module) -> dict[Tensor, list[str]]:
    """The keys of each tensor in the model's ``state_dict``; a tied one has several."""
    names: dict[Tensor, list[str]] = {}
    for key, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor):
            names.setdefault(tensor, []).append(key)
    return names


def _not_ignored(keys: Iterable[str], model: nn.Module) -> list[str]:
    """The unexpected keys that a transformers model does not ignore when it loads."""
    ignored: Iterable[str] = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    return sorted(key for key in keys if not any(re.search(pattern, key) for pattern in ignored))


def _refuse_misfit(key: str, entry: Entry, tensor: Tensor, path: Path) -> None:
    if entry.shape != tuple(tensor.shape):
        raise InputError(
            f"from_checkpoint={str(path)!r} has {key!r} of shape {entry.shape}, but that of the model is "
            f"{tuple(tensor.shape)}; use a checkpoint of a model of this configuration"
        )
    if entry.dtype.startswith(("F", "BF")) != tensor.is_floating_point():
        raise InputError(
            f"from_checkpoint={str(path)!r} has {key!r} as {entry.dtype}, but that of the model is {tensor.dtype}; "
            f"floating-point types are converted to one another, others must be those of the model"
        )


def _files(path: Path) -> list[Path]:
    """The files of a checkpoint.

    Raises:
        InputError: there are none, or it is not clear which.
    """
    if path.is_file() and path.suffix != ".json":
        return [path]
    index = path if path.is_file() else path / INDEX
    if index.is_file():
        return _shards(index)
    if (path / ONE).is_file():
        return [path / ONE]
    others = sorted(path.glob("*.safetensors"))
    if not others and (path / ".metadata").is_file():
        raise InputError(
            f"from_checkpoint={str(path)!r} is a checkpoint of torch.distributed.checkpoint, but files of safetensors "
            f"are read here; leave it out and call pipecompile.load() after compile(), or pass what "
            f"export_safetensors() has written"
        )
    if len(others) != 1:
        seen = f"has {len(others)} files *.safetensors and no {INDEX}" if path.is_dir() else "does not exist"
        raise InputError(
            f"from_checkpoint={str(path)!r} {seen}; it must be a file in safetensors' format, or a directory with "
            f"{ONE}, or with shards and {INDEX}"
        )
    return others


def _shards(index: Path) -> list[Path]:
    try:
        names = json.loads(index.read_text())["weight_map"].values()
        files = [index.parent / name for name in sorted(set(names))]
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise InputError(
            f"{str(index)!r} is not an index of shards ({type(error).__name__}: {error}); it must be a JSON object "
            f"with a 'weight_map' of keys to files"
        ) from error
    for file in files:
        if not file.is_file():
            raise InputError(f"{str(index)!r} names {file.name!r}, which does not exist; complete the checkpoint")
    return files


class _Opened:
    """An open safetensors file."""

    def __init__(self, file: Path) -> None:
        try:
            from safetensors import SafetensorError, safe_open
        except ImportError as error:
            raise InputError("from_checkpoint= needs safetensors; pip install safetensors") from error
        try:
            self.held: Any = safe_open(file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"{str(file)!r} cannot be read ({error}); it must be a file in safetensors' format"
            ) from error

    def __enter__(self) -> Any:
        return self.held.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.held.__exit__(*error)


def _opened(file: Path) -> _Opened:
    return _Opened(file)


def _listed(keys: Sequence[str]) -> str:
    more = f" and {len(keys) - LISTED} more" if len(keys) > LISTED else ""
    return ", ".join(map(repr, keys[:LISTED])) + more


def load(entries: Mapping[str, Sequence[Entry]], tensors: Mapping[str, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields each tensor with its value in the type of the tensor, reading one after another.

    Raises:
        InputError: the values under the names of a tied tensor differ.
    """
    for key, tensor in tensors.items():
        first, *others = entries[key]
        value = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(first.read())
        for other in others:
            if not torch.equal(other.read().to(tensor.dtype), value):
                raise InputError(
                    f"the checkpoint has other values under {other.key!r} than under {first.key!r}, which are one "
                    f"parameter of the model; build the model without this tie (tie_word_embeddings=False)"
                )
        yield tensor, value
