"""Parameters of which each part of the batch keeps a part: ``compile(fully_shard=True)``.

As with ``torch.distributed.fsdp.fully_shard``, a parameter is divided along its first dimension over the processes of
one rank, and is a DTensor there, which optimizers, ``state_dict`` and checkpoints take as it is:

    rows of a parameter    0 1 2 | 3 4 5 | 6        of 7 rows on 3 parts
    kept by part           0     | 1     | 2

The model's own parameter keeps its identity, shape and type, and has no memory (``ops/away.py``). A call gathers what
its stages read when it begins, once for all microbatches, and frees it after its program. Gradients are summed once,
where they would be summed without shards, and each part gets the sum of its own rows, added in the order of the parts.

Source: Rajbhandari et al. 2020, "ZeRO", section 5 (stage 3), but gathered once a call, since a pipeline would gather a
layer again for every microbatch; Zhao et al. 2023, "PyTorch FSDP", section 3.2.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as Rows

from pipecompile.distributed.members import BUCKET, Members
from pipecompile.errors import InputError
from pipecompile.ops.away import is_away, send_away

ALIGNED = 64  # bytes


@dataclass(frozen=True, eq=False)
class Divided:
    """One parameter that is divided.

    Attributes:
        own: the model's, which has no memory.
        kept: this process's rows of it.
        strides: of the whole.
        rows: of each part but the last ones, which have fewer.
    """

    own: nn.Parameter
    kept: nn.Parameter
    strides: tuple[int, ...]
    rows: int

    def whole(self) -> Tensor:
        """Memory for all of it."""
        return torch.empty_strided(self.own.shape, self.strides, dtype=self.own.dtype)

    def of(self, part: int) -> slice:
        """The rows of a part."""
        begin = min(part * self.rows, len(self.own))
        return slice(begin, min(begin + self.rows, len(self.own)))

    @property
    def nbytes(self) -> int:
        """Of each part, in a bucket."""
        row = self.own.shape[1:].numel() * self.own.dtype.itemsize
        return -(-self.rows * row // ALIGNED) * ALIGNED

    def view(self, bucket: Tensor, start: int, rows: int) -> Tensor:
        """The first rows of the place in a bucket that begins at ``start``."""
        shape = torch.Size((rows, *self.own.shape[1:]))
        found: Tensor = bucket[start : start + shape.numel() * self.own.dtype.itemsize].view(self.own.dtype)
        return found.view(shape)


class Shards:
    """The divided parameters of one process.

    Args:
        mesh: of the parts.
        column: the processes that run the same stages.
        part: of this process.
        owned: the parameters that it trains, in an order that is the same in all of ``column``.
        lent: parameters that its stages read, of which another rank brings the values in each program.
    """

    def __init__(
        self,
        mesh: DeviceMesh,
        column: Members,
        part: int,
        owned: Sequence[nn.Parameter],
        lent: Sequence[nn.Parameter],
    ) -> None:
        self.mesh = mesh
        self.column = column
        self.part = part
        self.lent = {id(parameter): (parameter, parameter.stride()) for parameter in lent}
        self.divided = {id(parameter): self._divided(parameter) for parameter in owned}
        self._trained = {id(parameter): parameter.requires_grad for parameter in owned}
        send_away([*owned, *lent])

    def home(self, tensor: Tensor) -> Tensor:
        """The rows of a tensor of the model that this process keeps; the tensor itself if it is not divided."""
        found = self.divided.get(id(tensor))
        return tensor if found is None else found.kept

    def gathered(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The values of those tensors that are divided, and memory for those that are lent."""
        names = {id(tensor): name for name, tensor in tensors.items()}
        found = {}
        for name, tensor in tensors.items():
            if lent := self.lent.get(id(tensor)):
                found[name] = torch.empty_strided(tensor.shape, lent[1], dtype=tensor.dtype)
        mine = [divided for key, divided in self.divided.items() if key in names]
        for bucket in _buckets(mine, len(self.column)):
            wholes = self._gather(bucket)
            found |= {names[id(divided.own)]: whole for divided, whole in zip(bucket, wholes, strict=True)}
        return found

    def totals(self, gradients: MutableMapping[int, Tensor], keys: Sequence[int]) -> dict[int, Tensor]:
        """This process's rows of the sums of gradients over the parts, by ``id`` of the model's parameter.

        Args:
            gradients: of this part, from which those of ``keys`` are removed; None counts as zero.
            keys: the divided parameters that have a gradient in some part.
        """
        found: dict[int, Tensor] = {}
        for bucket in _buckets([self.divided[key] for key in keys], len(self.column)):
            for divided, rows in zip(bucket, self._scatter(bucket, gradients), strict=True):
                found[id(divided.own)] = self._distributed(rows, divided.own.shape, divided.strides)
        return found

    def follow(self) -> None:
        """Takes over whether parameters are trained, which may be said to the model's own or to their rows.

        Raises:
            InputError: their type has changed.
        """
        for key, divided in self.divided.items():
            own, kept = divided.own.requires_grad, divided.kept.requires_grad
            trained = kept if own == self._trained[key] else own  # what has changed
            self._trained[key] = trained
            divided.own.requires_grad_(trained)
            divided.kept.requires_grad_(trained)
            if divided.own.dtype != divided.kept.dtype:
                raise InputError(
                    f"a parameter of shape {list(divided.own.shape)} was cast to {divided.own.dtype} after compile(), "
                    f"but its rows of type {divided.kept.dtype} are divided over processes; cast the model before "
                    f"compile()"
                )

    def _divided(self, own: nn.Parameter) -> Divided:
        rows = -(-len(own) // len(self.column))
        begin = min(self.part * rows, len(own))
        local = own.detach()[begin : begin + rows].clone()
        kept = nn.Parameter(self._distributed(local, own.shape, own.stride()), own.requires_grad)
        found = Divided(own, kept, own.stride(), rows)
        if own.grad is not None:
            kept.grad = self._distributed(own.grad[found.of(self.part)].clone(), own.shape, own.stride())
        return found

    def _distributed(self, local: Tensor, shape: torch.Size, strides: Sequence[int]) -> DTensor:
        return DTensor.from_local(local, self.mesh, [Rows(0)], run_check=False, shape=shape, stride=tuple(strides))

    def _gather(self, bucket: Sequence[Divided]) -> list[Tensor]:
        parts, wholes = len(self.column), [divided.whole() for divided in bucket]
        local = [_local(divided.kept) for divided in bucket]
        if len(bucket) == 1 and _is_even(wholes[0], parts):
            self.column.gather_into(_bytes(wholes[0]), _bytes(local[0].contiguous()))
            return wholes
        starts, size = _places(bucket)
        mine = torch.empty(size, dtype=torch.uint8)
        for divided, start, rows in zip(bucket, starts, local, strict=True):
            divided.view(mine, start, len(rows)).copy_(rows)
        out = torch.empty(parts * size, dtype=torch.uint8)
        self.column.gather_into(out, mine)
        for part in range(parts):
            for divided, start, whole in zip(bucket, starts, wholes, strict=True):
                rows = whole[divided.of(part)]
                rows.copy_(divided.view(out, part * size + start, len(rows)))
        return wholes

    def _scatter(self, bucket: Sequence[Divided], gradients: MutableMapping[int, Tensor]) -> list[Tensor]:
        """This part's rows of the sum of each gradient."""
        parts = len(self.column)
        found = [gradients.pop(id(divided.own), None) for divided in bucket]
        starts, size = _places(bucket)
        if len(bucket) == 1 and found[0] is not None and _is_even(found[0], parts) and size * parts == found[0].nbytes:
            given = _bytes(found[0])
        else:
            given = torch.zeros(parts * size, dtype=torch.uint8)
            for part in range(parts):
                for divided, start, gradient in zip(bucket, starts, found, strict=True):
                    if gradient is not None:
                        rows = gradient[divided.of(part)]
                        divided.view(given, part * size + start, len(rows)).copy_(rows)
        found.clear()
        out, sums = self.column.scattered(given), []
        for divided, start in zip(bucket, starts, strict=True):
            count = len(divided.own[divided.of(self.part)])
            sums.append(reduce(torch.add, (divided.view(out, part * size + start, count) for part in range(parts))))
        return sums


def _local(kept: Tensor) -> Tensor:
    assert isinstance(kept, DTensor)
    found: Tensor = kept.to_local()
    return found.detach()


def _is_even(whole: Tensor, parts: int) -> bool:
    return len(whole) % parts == 0 and whole.is_contiguous()


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.view(-1).view(torch.uint8)


def _places(bucket: Sequence[Divided]) -> tuple[list[int], int]:
    """Where the rows of each parameter begin, in bytes, and the bytes of one part."""
    starts, end = [], 0
    for divided in bucket:
        starts.append(end)
        end += divided.nbytes
    return starts, end


def _buckets(divided: Sequence[Divided], parts: int) -> Iterator[list[Divided]]:
    """Parameters that travel at once: up to ``BUCKET`` bytes, or a single one."""
    bucket: list[Divided] = []
    for each in divided:
        if bucket and parts * sum(other.nbytes for other in (*bucket, each)) > BUCKET:
            yield bucket
            bucket = []
        bucket.append(each)
    if bucket:
        yield bucket


def can_be_divided(tensor: Tensor) -> bool:
    """Whether a tensor of a model is a parameter that has rows, and memory for each of its entries here."""
    if not isinstance(tensor, nn.Parameter) or tensor.ndim == 0 or tensor.is_meta or is_away(tensor):
        return False
    return tensor.untyped_storage().nbytes() >= tensor.nbytes  # not one that repeats entries
