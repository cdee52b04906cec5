"""Tracks the current and peak bytes of live tensors that were created while this mode was active."""

from __future__ import annotations

import weakref
from typing import Any

import torch

from pipecompile.ops.torch_internals import TorchDispatchMode, tree_leaves
from pipecompile.profile.storages import has_storage


class Allocations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Tracks the tensors that torch operations return. Workspace inside kernels is not tracked."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = 0
        self._made: dict[int, weakref.finalize[..., Any]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        before = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if has_storage(t)}
        for tensor in tree_leaves(out):
            if has_storage(tensor) and id(storage := tensor.untyped_storage()) not in before:
                self._add(storage)
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, nbytes = id(storage), storage.nbytes()
        if key not in self._made:
            self._made[key] = weakref.finalize(storage, self._remove, key, nbytes)
            self.now += nbytes
            self.most = max(self.most, self.now)

    def _remove(self, key: int, nbytes: int) -> None:
        del self._made[key]
        self.now -= nbytes
