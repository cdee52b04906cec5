"""Lets a model run as it likes, and puts everything back that it may have changed."""

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
from pipecompile.ops.randomness import set_state, state_of
from pipecompile.ops.torch_internals import _unsafe_preserve_version_counter


@contextmanager
def left_as_before(
    model: nn.Module,
    functions: Iterable[Callable[..., Any]] = (),
    tensors: Iterable[Tensor] = (),
    reach: Reach | None = None,
) -> Iterator[None]:
    """In which a model's forward and backward may run; at its end all is as before that they may have changed.

    That is: attributes of modules and of what they hold, of classes and functions; variables of files and closures;
    lists, dicts and sets in any of them; the values of buffers and of tensors kept elsewhere; random generators, the
    model's own and those of torch, Python and numpy. Values of parameters and gradients are not copied.

    Args:
        functions: others that run in it, as a loss.
        tensors: others whose values are put back, as the parameters that a forward writes.
        reach: of the model and the functions, where it has been found before.
    """
    reach = reach_of(model, functions) if reach is None else reach
    values = {id(t): t for t in (*model.buffers(), *reach.tensors, *tensors) if not t.is_meta}
    kept = [(tensor, tensor.detach().clone()) for tensor in values.values()]
    versions = _unsafe_preserve_version_counter(tuple(t for t in values.values() if not t.is_inference()))
    with versions, generators_kept(reach.generators), Noted(reach).kept():  # who has saved a tensor finds what it saved
        try:
            yield
        finally:
            with torch.no_grad():
                for tensor, value in kept:
                    _write(tensor, value)


class Noted:
    """The state within reach, as it is when this is made."""

    def __init__(self, reach: Reach) -> None:
        self._names = [(owner, names, names_of(owner, names)) for owner, _, names in reach.owners]
        self._contents = [(holder, contents(holder)) for holder, _ in reach.containers]
        self._labels = [label for _, label in reach.containers]
        self._memos = [(memo, memo.cache_info().misses) for memo in reach.memos]

    @contextmanager
    def kept(self) -> Iterator[None]:
        """The time after which ``put_back`` is called."""
        try:
            yield
        finally:
            self.put_back()

    def filled(self) -> Iterator[tuple[Itself, list[Any], list[Any]]]:
        """The containers with other contents by now: what they hold, and what they held."""
        for (holder, before), label in zip(self._contents, self._labels, strict=True):
            if not is_same(now := contents(holder), before):
                yield Itself(holder, label), now, before

    def put_back(self) -> None:
        """Puts names and contents back; what functions have remembered since is forgotten."""
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
    """The generators of torch, Python and numpy, and others, are as before at its end."""
    others = [(generator, state_of(generator)) for generator in generators]
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        for generator, state in others:
            set_state(generator, state)


def _write(tensor: Tensor, value: Tensor) -> None:
    """Puts a tensor's value back, also where ``.data`` has been given another memory."""
    if tensor.shape != value.shape or tensor.dtype != value.dtype or tensor.device != value.device:
        tensor.data = value
    elif tensor.layout != torch.strided or not torch.equal(tensor, value):  # sparse ones are not compared
        tensor.copy_(value)


def _forget(memo: _lru_cache_wrapper[Any], misses: int) -> None:
    if memo.cache_info().misses != misses:
        memo.cache_clear()
