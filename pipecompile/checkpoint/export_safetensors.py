"""``export_safetensors`` writes a model as ``from_pretrained`` reads it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor, nn

from pipecompile.checkpoint import staged
from pipecompile.checkpoint.subject import Subject
from pipecompile.errors import InputError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000
CONFIGS = ("config", "generation_config")  # attributes of transformers' models, which write themselves


def export_safetensors(directory: str | Path, model: nn.Module, shard_bytes: int = SHARD_BYTES) -> None:
    """Writes the weights of a pipe or of a plain model under their names, tied ones once, and the configuration.

    In several processes, all of them call it, and each writes files of its own. The directory is complete or absent.

    Args:
        directory: must not exist.
        model: a pipe, or a model that is not split.
        shard_bytes: of a file at most, if no single tensor is larger.

    Raises:
        InputError: the directory exists, or safetensors is not installed, or the model has not been split yet.
        CheckpointError: the files could not be written.
        RankError: a process has failed.
    """
    subject, folder = Subject.of(model), Path(directory)
    subject.agree(f"export to {str(folder)!r}")
    company = subject.company
    company.do(_refuse_missing)
    shards = company.do(lambda: list(_shards(subject.whole_written(), shard_bytes)))
    counts = company.gathered(len(shards))
    writing = company.do_first(lambda: staged.begin(folder))
    first, count = sum(counts[: company.rank]), sum(counts)

    def write() -> dict[str, tuple[str, int]]:
        """The file and the bytes of each tensor that this process writes."""
        from safetensors.torch import save_file

        found: dict[str, tuple[str, int]] = {}
        for number, shard in enumerate(shards, first + 1):
            file = WEIGHTS if count == 1 else f"model-{number:05}-of-{count:05}.safetensors"
            save_file({name: t.detach().contiguous() for name, t in shard.items()}, writing / file, {"format": "pt"})
            found |= {name: (file, tensor.nbytes) for name, tensor in shard.items()}
        return found

    def commit(index: Mapping[str, tuple[str, int]]) -> None:
        if count > 1:
            sizes = {"total_size": sum(nbytes for _, nbytes in index.values())}
            files = {name: file for name, (file, _) in index.items()}
            (writing / INDEX).write_text(json.dumps({"metadata": sizes, "weight_map": files}, indent=2) + "\n")
        for config in (getattr(subject.model, name, None) for name in CONFIGS):
            if (write_config := getattr(config, "save_pretrained", None)) is not None:
                write_config(writing)
        staged.commit(writing, folder)

    try:
        written = company.gathered(company.do(write))
        company.do_first(lambda: commit({name: each for part in written for name, each in part.items()}))
    except Exception:
        if company.rank == 0:
            staged.drop(writing)
        raise


def _shards(tensors: Mapping[str, Tensor], limit: int) -> Iterator[Mapping[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if shard and sum(t.nbytes for t in shard.values()) + tensor.nbytes > limit:
            yield shard
            shard = {}
        shard[name] = tensor
    if shard:
        yield shard


def _refuse_missing() -> None:
    try:
        import safetensors.torch  # noqa: F401
    except ImportError as error:
        raise InputError("safetensors is not installed, which writes the files; pip install safetensors") from error
