"""Counts the bytes that each rank holds in a real run, as if each were a device of its own.

A dispatch mode in every thread notes each storage that an operation makes and when it dies; a value that goes to
another rank is copied, as it would be to another device. It knows nothing of plans or programs.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import pipecompile
from pipecompile.runtime import Executor, Lane
from pipecompile.runtime.executor import RankRun
from pipecompile.runtime.observers import Observers


class Ledger:
    """The bytes that one rank holds, now and at most."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def add(self, storage: torch.UntypedStorage, known: dict[int, Any]) -> None:
        key, nbytes = id(storage), storage.nbytes()
        if key not in known:
            known[key] = weakref.finalize(storage, self._remove, key, nbytes, known)
            self.now += nbytes
            self.most = max(self.most, self.now)

    def _remove(self, key: int, nbytes: int, known: dict[int, Any]) -> None:
        del known[key]
        self.now -= nbytes


class Mode(TorchDispatchMode):
    """Notes what a thread makes in the ledger of its rank."""

    def __init__(self, ledger: Ledger, known: dict[int, Any]) -> None:
        super().__init__()
        self.ledger, self.known = ledger, known

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        before = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(out):
            if (
                isinstance(tensor, Tensor)
                and not isinstance(tensor, FakeTensor)
                and id(tensor.untyped_storage()) not in before
            ):
                self.ledger.add(tensor.untyped_storage(), self.known)
        return out


@contextmanager
def counting(pipe: pipecompile.Pipeline) -> Iterator[list[Ledger]]:
    """The ledgers of a pipeline's ranks while steps run; what the calling thread makes is the last rank's."""
    ledgers = [Ledger() for _ in pipe.pipeline.devices]
    known: dict[int, Any] = {}
    here = threading.local()
    run_rank, move, fetch = Executor._run_rank, Lane.move, Lane.fetch

    def counted(self: Executor, run: RankRun, *args: Any) -> Any:
        rank = next(rank for rank, lane in self.lanes.items() if lane is run.row.lane)
        here.mode = Mode(ledgers[rank], known)
        with here.mode:
            return run_rank(self, run, *args)

    def copied(self: Lane, values: tuple[Tensor | None, ...], target: Lane) -> Any:
        mode, mine = here.mode, here.mode.ledger
        mode.ledger = ledgers[list(pipe.pipeline._session.lanes.values()).index(target)]
        try:
            return move(
                self, tuple(None if v is None else v.clone().requires_grad_(v.requires_grad) for v in values), target
            )
        finally:
            mode.ledger = mine

    for stage, rank in zip(pipe.pipeline.stages, pipe.pipeline.plan.rank_of, strict=True):
        for tensor in (*stage.parameters(), *stage.buffers()):
            ledgers[rank].add(tensor.untyped_storage(), known)
    _add_versions(pipe, ledgers, known)
    with pytest.MonkeyPatch.context() as patch, Mode(ledgers[-1], known):
        patch.setattr(Observers, "here", staticmethod(lambda: Observers((), False, False)))  # ranks keep their threads
        patch.setattr(Executor, "_run_rank", counted)
        patch.setattr(Lane, "move", copied)
        patch.setattr(Lane, "fetch", lambda self, tensor: fetch(self, tensor).clone())
        yield ledgers


def _add_versions(pipe: Any, ledgers: list[Ledger], known: dict[int, Any]) -> None:
    """Adds the weights of earlier steps that are still in use."""
    session = pipe.pipeline._session
    for stage, weights in session.weights.items():
        flying = [m.versions[stage] for m in session.stream.microbatches.values() if stage in m.versions]
        for version in (weights.current, *weights.made, *flying):
            for leaf in version.leaves.values():
                ledgers[pipe.pipeline.plan.rank_of[stage]].add(leaf.untyped_storage(), known)


def peaks(pipe: Any, step: Callable[[], Any], optimizer: torch.optim.Optimizer | None) -> list[int]:
    """The most bytes that each rank holds in a step, optimizer state included."""
    step()
    step()  # some models read in their second call what the first has set
    state: dict[int, int] = {}
    inside = [weights.optimizer for weights in pipe.pipeline._session.weights.values() if weights.optimizer is not None]
    for each in inside if optimizer is None else [optimizer]:
        for parameter, kept in each.state.items():
            state[id(parameter)] = sum(t.nbytes for t in kept.values() if isinstance(t, Tensor))
        each.zero_grad(set_to_none=True)
    with counting(pipe) as ledgers:
        step()
    extra = [0] * len(ledgers)
    for stage, rank in zip(pipe.pipeline.stages, pipe.pipeline.plan.rank_of, strict=True):
        extra[rank] += sum(state.get(id(p), 0) for p in stage.parameters())
    return [ledger.most + more for ledger, more in zip(ledgers, extra, strict=True)]
