"""The files of a checkpoint: torch.distributed.checkpoint's for the tensors, and one for the rest.

    .metadata, __0_0.distcp, ...    the tensors by key; each rank writes a file
    state.pt                        plain values

``torch.distributed.checkpoint.load`` reads the tensors too. Its planners and its storage do the work here. What it asks
the processes to exchange goes through ``Company``, so that an error of one is raised in all. Nothing that is read can
run code: ``.metadata`` is a pickle, of which only torch's own descriptions of tensors are accepted.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from pipecompile.checkpoint.company import Company
from pipecompile.errors import CheckpointError, InputError

METADATA, PLAIN = ".metadata", "state.pt"
FORMAT = 1
ACCEPTED = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    ("pathlib._local", "PosixPath"),
    ("pathlib._local", "WindowsPath"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
}


def is_complete(folder: Path) -> bool:
    """Whether a folder is a checkpoint; those under way have another name."""
    return all((folder / name).is_file() for name in (METADATA, PLAIN))


def write_tensors(folder: Path, tensors: Mapping[str, Tensor], company: Company) -> None:
    """Writes the tensors of all processes; each key must be in one of them, and its tensor on the CPU."""
    planner = DefaultSavePlanner()
    writer = FileSystemWriter(folder, overwrite=False, per_thread_copy_ahead=0)  # nothing is to be copied from devices
    is_first = company.rank == 0
    planner.set_up_planner(dict(tensors), writer.storage_meta(), is_first)
    writer.set_up_storage_writer(is_first, rank=company.rank, use_collectives=True)
    plans = company.gathered(company.do(lambda: writer.prepare_local_plan(planner.create_local_plan())))
    plans, metadata = planner.create_global_plan(plans)  # the same in all processes
    own = planner.finish_plan(writer.prepare_global_plan(plans)[company.rank])
    written = company.gathered(company.do(lambda: writer.write_data(own, planner).value()))
    company.do_first(lambda: writer.finish(metadata, written))


def write_plain(folder: Path, content: bytes) -> None:
    """Writes plain values, as ``packed`` returns them."""
    (folder / PLAIN).write_bytes(content)


def packed(values: Mapping[str, Any]) -> bytes:
    """Plain values as bytes, which later changes do not reach."""
    return _pack({"format": FORMAT, **values})


def refuse_not_plain(values: Mapping[str, Any]) -> None:
    """
    Raises:
        InputError: one of them is not plain, so that reading it could run code.
    """
    for name, value in values.items():
        if not _is_plain(value):
            place, odd = _odd(name, value)
            kind = type(odd)
            raise InputError(
                f"{place} is a {kind.__module__}.{kind.__qualname__}, which could not be read without running code; a "
                f"checkpoint takes numbers, strings, tensors, and lists, tuples and dicts of them"
            )


def _odd(place: str, value: object) -> tuple[str, object]:
    """The innermost part of a value that is not plain, and where it is."""
    pairs = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list | tuple) else ()
    for key, each in pairs:
        if not _is_plain(each):
            return _odd(f"{place}[{key!r}]", each)
    return place, value


def _is_plain(value: object) -> bool:
    try:
        _unpacked(_pack(value))
    except (pickle.PicklingError, pickle.UnpicklingError, TypeError, AttributeError):
        return False
    return True


def read_plain(folder: Path) -> dict[str, Any]:
    """The plain values of a checkpoint.

    Raises:
        InputError: it is not a checkpoint, or one of a newer version.
        CheckpointError: it is damaged.
    """
    if not is_complete(folder):
        what = "is not a checkpoint" if folder.exists() else "does not exist"
        raise InputError(f"{str(folder)!r} {what}; pass the folder that save() was given, or latest(folder of many)")
    try:
        found: dict[str, Any] = _unpacked((folder / PLAIN).read_bytes())
    except Exception as error:
        raise _damaged(folder / PLAIN, error) from error
    if found["format"] > FORMAT:
        raise InputError(
            f"{str(folder)!r} has format {found['format']}, but this version reads up to {FORMAT}; update pipecompile"
        )
    return found


def read_metadata(folder: Path) -> Metadata:
    """What tensors a checkpoint has, and where.

    Raises:
        CheckpointError: it is damaged.
    """
    try:
        with (folder / METADATA).open("rb") as file:
            found: Metadata = _Unpickler(file).load()
    except Exception as error:
        raise _damaged(folder / METADATA, error) from error
    return found


def described(metadata: Metadata) -> dict[str, TensorStorageMetadata]:
    """The sizes and types of the tensors, by key."""
    kept = metadata.state_dict_metadata.items()
    return {key: each for key, each in kept if isinstance(each, TensorStorageMetadata)}


def read_tensors(folder: Path, metadata: Metadata, targets: Mapping[str, Tensor]) -> None:
    """Reads tensors by key into the memory of those given, which have the same sizes.

    Raises:
        CheckpointError: a file is damaged; some of the tensors may have been read.
    """
    planner, reader = DefaultLoadPlanner(), FileSystemReader(folder)
    planner.set_up_planner(dict(targets), metadata, True)
    reader.set_up_storage_reader(metadata, True, rank=0, use_collectives=True)
    plan = reader.prepare_local_plan(planner.create_local_plan())
    (plan,) = reader.prepare_global_plan(planner.create_global_plan([plan]))
    try:
        reader.read_data(planner.finish_plan(plan), planner).wait()
    except Exception as error:
        raise _damaged(folder, error) from error


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ACCEPTED and not (module == "torch" and isinstance(getattr(torch, name), torch.dtype)):
            raise pickle.UnpicklingError(f"{module}.{name} is not what torch writes there")
        return super().find_class(module, name)


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{str(path)!r} cannot be read: {type(error).__name__}: {_first_line(error)}; the model may have been loaded "
        f"in part; load another checkpoint"
    )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]


def _pack(value: object) -> bytes:
    buffer = BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _unpacked(content: bytes) -> Any:
    return torch.load(BytesIO(content), map_location="cpu", weights_only=True)
