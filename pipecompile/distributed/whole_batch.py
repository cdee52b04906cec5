"""The whole batch of a call whose parts are passed in different processes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pipecompile.capture.call import Call, TensorName
from pipecompile.distributed.members import Members
from pipecompile.errors import InputError

LONGEST = 500  # characters of what is said of a batch


@dataclass(frozen=True)
class Whole:
    """The tensors of a whole batch.

    Attributes:
        tensors: by name, those with a batch joined along their first dimension, the others as they are in all parts.
        sizes: the number of rows of each part.
    """

    tensors: Mapping[str, Tensor]
    sizes: tuple[int, ...]


def refuse_undivided(call: Call) -> None:
    """Raises ``InputError`` if what this process passes is no part of a batch. The others hear of it elsewhere."""
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


def whole_batch(call: Call, column: Members) -> Whole:
    """Joins the batches that the processes of a column pass to one call.

    Args:
        call: in this process; ``described`` says the same of all of them.
    """
    batched = {name: call.tensors[name].detach().to("cpu") for name in sorted(call.batched)}
    each = column.gathered(batched)
    joined = {name: torch.cat([tensors[name] for tensors in each]).to(call.tensors[name].device) for name in batched}
    return Whole({**call.tensors, **joined}, tuple(len(next(iter(tensors.values()))) for tensors in each))


def described(call: Call) -> str:
    """What must be the same in all parts of a batch. Ends with a digest, if there is more than can be said."""
    text = ", ".join(_described(call))
    if len(text) <= LONGEST:
        return text
    return f"{text[:LONGEST]}... with the digest {hashlib.blake2b(text.encode(), digest_size=4).hexdigest()}"


def _described(call: Call) -> Iterator[str]:
    for name, leaf in zip(call.names, call.leaves, strict=True):
        if not isinstance(leaf, TensorName):
            yield f"{name}: {leaf!r:.200}"
    for name, tensor in call.tensors.items():
        kind = str(tensor.dtype).removeprefix("torch.")
        if name in call.batched:
            yield f"{name}: {kind} {['rows', *tensor.shape[1:]]}".replace("'", "")
        else:
            content = hashlib.blake2b(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            yield f"{name}: {kind} {list(tensor.shape)} without a batch, with the digest {content.hexdigest()[:8]}"
    structure = hashlib.blake2b(str(call.key[0]).encode(), digest_size=4).hexdigest()
    yield f"in a structure with the digest {structure}"
