"""Attributes of a model that other threads set while it is traced.

A trace ends with the model as it was before, so what another thread has set in the meantime (``model.epoch = 3``) would
be lost, and might be in the trace by half. So it is noted, set again at the end, and the trace is repeated.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from pipecompile.capture.locks import busy


class _Watcher:
    """What threads other than the present one set on the modules of a model; a pipe has the dict of its model."""

    def __init__(self, model: nn.Module) -> None:
        self.thread = threading.get_ident()
        self.paths = {id(vars(module)): path for path, module in model.named_modules()}
        self.names: list[str] = []
        self.found: dict[tuple[int, str], tuple[nn.Module, Any]] = {}

    def see(self, owner: nn.Module, name: str, value: Any) -> None:
        path = self.paths.get(id(vars(owner)))
        if path is not None and threading.get_ident() != self.thread:
            self.found[id(vars(owner)), name] = owner, value
            self.names.append(f"{path}.{name}" if path else name)


_LOCK = threading.Lock()
_WATCHERS: list[_Watcher] = []
_OWN: list[Callable[[nn.Module, str, Any], None]] = []  # the __setattr__ that was there before, perhaps another's patch


def _noting(self: nn.Module, name: str, value: Any) -> None:
    if not busy().waited_for:  # else it is a thread that runs a program for one that waits
        for watcher in _WATCHERS.copy():
            watcher.see(self, name, value)
    _OWN[-1](self, name, value)


@contextmanager
def set_by_others(model: nn.Module) -> Iterator[list[str]]:
    """A context in which a model is traced; at its end, what other threads have set on its modules is set again.

    Yields:
        A list that receives the names of such attributes.
    """
    watcher = _Watcher(model)
    with _LOCK:
        if not _WATCHERS:
            _OWN[:] = [nn.Module.__setattr__]
        _WATCHERS.append(watcher)
        nn.Module.__setattr__ = _noting  # type: ignore[method-assign]
    try:
        yield watcher.names
    finally:
        with _LOCK:
            _WATCHERS.remove(watcher)
            if not _WATCHERS:
                nn.Module.__setattr__ = _OWN[-1]  # type: ignore[method-assign, assignment]
        for (_, name), (owner, value) in watcher.found.items():
            setattr(owner, name, value)
