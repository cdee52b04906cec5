"""The whole batch of a call whose parts are passed in different processes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pipecompile.capture.call import Call, TensorName
from pipecompile.distributed.members import Members
from pipecompile.errors import InputError


@dataclass(frozen=True)
class Whole:
    """The tensors of a whole batch.

    Attributes:
        tensors: by name, those with a batch joined along their first dimension, the others as they are in all parts.
        sizes: the number of rows of each part.
    """

    tensors: Mapping[str, Tensor]
    sizes: tuple[int, ...]


def whole_batch(call: Call, column: Members) -> Whole:
    """Joins the batches that the processes of a column pass to one call.

    Args:
        call: in this process.

    Raises:
        InputError: the batches cannot be joined; raised in all processes.
    """
    if call.batch is None:
        raise InputError(
            "no argument has a batch dimension, so there is nothing to divide over the mesh's dimension 'data'; use a "
            "mesh with the dimension 'stage' only, or say which dimension is the batch (in_dims=)"
        )
    if meta := next((name for name, tensor in call.tensors.items() if tensor.is_meta), None):
        raise InputError(
            f"argument {meta!r} is on the meta device, so it cannot be joined with those of the other parts of the "
            f"batch; pass a tensor on a real device"
        )
    batched = {name: call.tensors[name].detach().to("cpu") for name in sorted(call.batched)}
    each = column.gathered((_described(call), batched))
    first, _ = each[0]
    for part, (other, _) in enumerate(each):
        for name in first.keys() | other.keys():
            if first.get(name) != other.get(name):
                raise InputError(
                    f"{name} is {first.get(name, 'missing')} in the first part of the batch and "
                    f"{other.get(name, 'missing')} in part {part}, so they are not one batch; pass batches that differ "
                    f"in their numbers of rows only (pad all sequences to one length)"
                )
    joined = {name: torch.cat([tensors[name] for _, tensors in each]).to(call.tensors[name].device) for name in batched}
    return Whole({**call.tensors, **joined}, tuple(len(next(iter(tensors.values()))) for _, tensors in each))


def _described(call: Call) -> dict[str, str]:
    """What must be the same in all parts, by what it is."""
    found = {"the structure of the arguments": str(call.key[0])}
    for name, leaf in zip(call.names, call.leaves, strict=True):
        if not isinstance(leaf, TensorName):
            found[f"argument {name!r}"] = repr(leaf)[:200]
    for name, tensor in call.tensors.items():
        kind = str(tensor.dtype).removeprefix("torch.")
        if name in call.batched:
            sizes = ", ".join(map(str, ("rows", *tensor.shape[1:])))
            found[f"argument {name!r}"] = f"{kind} of shape ({sizes})"
        else:
            content = hashlib.blake2b(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            found[f"argument {name!r}, which has no batch,"] = (
                f"{kind} of shape {tuple(tensor.shape)} with digest {content.hexdigest()[:8]}"
            )
    return found
