"""The user's options for the batch dimension."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from pipecompile.errors import InputError

BatchNorm = Literal["microbatch", "deferred"]


@dataclass(frozen=True)
class Batching:
    """Which tensors have a batch dimension, and which modules may mix samples within a microbatch.

        Batching(in_dims={"x": 1, "table": None}, out_dims={"scores": 1})

    The command line shows the descriptions of these arguments too, so they fit both.

    Args:
        in_dims: the batch dimension of arguments, by name; None for an argument that all microbatches share. By
            default, tensors are divided along dimension 0, where most of them have the same size.
        out_dims: the batch dimension of outputs, by name or number; it overrides the analysis. Operations used only for
            such an output may mix samples within a microbatch. With None, the output of the first microbatch is
            returned.
        batch_norm: in training, batch normalization uses the statistics of each microbatch, as GPipe does (Huang et al.
            2019, section 2.2). "microbatch": it updates its running statistics once per microbatch; "deferred": once
            per batch, from all rows, as GPipe does.
        allow_mixing: paths of modules that may mix samples within a microbatch. By default, a model that mixes samples
            before its last weights is refused, because microbatches cannot compute what the whole batch computes.

    Raises:
        InputError: a value has the wrong type or is not known.
    """

    in_dims: Mapping[str, int | None] = field(default_factory=dict)
    out_dims: Mapping[str, int | None] = field(default_factory=dict)
    batch_norm: BatchNorm = "microbatch"
    allow_mixing: Sequence[str] = ()

    def __post_init__(self) -> None:
        paths = self.allow_mixing
        if isinstance(paths, str) or not isinstance(paths, Sequence) or not all(isinstance(it, str) for it in paths):
            raise InputError(f"allow_mixing={self.allow_mixing!r}; it must be a list of module paths")
        for name in ("in_dims", "out_dims"):
            if not isinstance(getattr(self, name), Mapping):
                raise InputError(f"{name}={getattr(self, name)!r}; it must be a dict from names to dimensions")
        object.__setattr__(self, "in_dims", dict(self.in_dims))
        object.__setattr__(self, "out_dims", {str(name): dim for name, dim in self.out_dims.items()})
        object.__setattr__(self, "allow_mixing", tuple(self.allow_mixing))
        if self.batch_norm not in get_args(BatchNorm):
            known = " or ".join(map(repr, get_args(BatchNorm)))
            raise InputError(f"batch_norm={self.batch_norm!r} is not known; it must be {known}")
        for name, dims in (("in_dims", self.in_dims), ("out_dims", self.out_dims)):
            for key, dim in dims.items():
                if dim is not None and (not isinstance(dim, int) or isinstance(dim, bool)):
                    raise InputError(
                        f"{name}[{key!r}] = {dim!r}; it must be the number of a dimension, or None for no batch"
                    )

    @property
    def may_mix(self) -> bool:
        """Whether the user allows results that differ from those of the whole batch."""
        return bool(self.allow_mixing or self.out_dims)


DEFAULT_BATCHING = Batching()
