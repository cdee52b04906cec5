"""Runs a model and restores everything that it may have changed."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import _lru_cache_wrapper
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipecompile.capture.state.containers import contents, is_same, put_back
from pipecompile.capture.state.guards import Itself
from pipecompile.capture.state.namespaces import drop, names_of, put
from pipecompile.capture.state.reachable import Generator, Reach, reach_of
from pipecompile.ops.accelerators import default_generators
from pipecompile.ops.randomness import set_state, state_of
from pipecompile.ops.torch_internals import _unsafe_preserve_version_counter


@contextmanager
def left_as_before(
    model: nn.Module,
    functions: Iterable[Callable[..., Any]] = (),
    tensors: Iterable[Tensor] = (),
    reach: Reach | None = None,
) -> Iterator[None]:
    """A context in which a model's forward and backward may run; at its end, what they may change is restored.

    This covers: attributes of modules and the objects they hold, of classes and of functions; variables of files and
    closures; lists, dicts and sets in any of these; values of buffers and of tensors stored elsewhere; random
    generators of the model, torch, Python and numpy. Values of parameters and gradients are not restored.

    Args:
        model: The model.
        functions: Other functions that run in the context, such as a loss.
        tensors: Other tensors to restore, such as parameters that forward writes.
        reach: Reach of the model and the functions, if already known.
    """
    reach = reach_of(model, functions) if reach is None else reach
    values = {id(t): t for t in (*model.buffers(), *reach.tensors, *tensors) if not t.is_meta}
    kept = [(tensor, tensor.detach().clone()) for tensor in values.values()]
    versions = _unsafe_preserve_version_counter(tuple(t for t in values.values() if not t.is_inference()))
    with versions, generators_kept(reach.generators), Noted(reach).kept():  # versions: saved tensors stay valid
        try:
            yield
        finally:
            with torch.no_grad():
                for tensor, value in kept:
                    _write(tensor, value)


class Noted:
    """The reachable state at the time of construction."""

    def __init__(self, reach: Reach) -> None:
        self._names = [(owner, names, names_of(owner, names)) for owner, _, names in reach.owners]
        self._contents = [(holder, contents(holder)) for holder, _ in reach.containers]
        self._labels = [label for _, label in reach.containers]
        self._memos = [(memo, memo.cache_info().misses) for memo in reach.memos]

    @contextmanager
    def kept(self) -> Iterator[None]:
        """A context that calls ``put_back`` at its end."""
        try:
            yield
        finally:
            self.put_back()

    def filled(self) -> Iterator[tuple[Itself, list[Any], list[Any]]]:
        """Yields the containers whose contents have changed, with present and earlier contents."""
        for (holder, before), label in zip(self._contents, self._labels, strict=True):
            if not is_same(now := contents(holder), before):
                yield Itself(holder, label), now, before

    def put_back(self) -> None:
        """Restores names and contents, and clears the caches of functions that have new entries."""
        for owner, names, before in self._names:
            now = names_of(owner, names)
            for name in now.keys() - before.keys():
                drop(owner, name)
            for name, value in before.items():
                if name not in now or now[name] is not value:
                    put(owner, name, value)
        for holder, items in self._contents:
            put_back(holder, items)
        for memo, misses in self._memos:
            _forget(memo, misses)


@contextmanager
def generators_kept(generators: Iterable[Generator] = ()) -> Iterator[None]:
    """A context; at its end, the generators of torch, Python and numpy, and others, are restored."""
    others = [(generator, state_of(generator)) for generator in (*default_generators(), *generators)]
    python, numpy = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        for generator, state in others:
            set_state(generator, state)


def _write(tensor: Tensor, value: Tensor) -> None:
    """Restores a tensor's value, even if its ``.data`` was replaced."""
    if tensor.shape != value.shape or tensor.dtype != value.dtype or tensor.device != value.device:
        tensor.data = value
    elif tensor.layout != torch.strided or not torch.equal(tensor, value):  # sparse ones are not compared
        tensor.copy_(value)


def _forget(memo: _lru_cache_wrapper[Any], misses: int) -> None:
    if memo.cache_info().misses != misses:
        memo.cache_clear()
