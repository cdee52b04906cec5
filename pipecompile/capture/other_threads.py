"""Attributes of a model that other threads set while it is traced.

A trace ends with the model as it was before, so what another thread has set in the meantime (``model.epoch = 3``) would
be lost, and might be in the trace by half. So it is noted, set again at the end, and the trace is repeated.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from pipecompile.capture.locks import busy
from pipecompile.capture.state.module_settings import settings_seen


class _Watcher:
    """What threads other than the present one set on the modules of a model; a pipe has the dict of its model."""

    def __init__(self, model: nn.Module) -> None:
        self.thread = threading.get_ident()
        self.paths = {id(vars(module)): path for path, module in model.named_modules()}
        self.names: list[str] = []
        self.found: dict[tuple[int, str], tuple[nn.Module, Any]] = {}

    def see(self, owner: nn.Module, name: str, value: Any) -> None:
        if busy().waited_for:  # a thread that runs a program for one that waits
            return
        path = self.paths.get(id(vars(owner)))
        if path is not None and threading.get_ident() != self.thread:
            self.found[id(vars(owner)), name] = owner, value
            self.names.append(f"{path}.{name}" if path else name)


@contextmanager
def set_by_others(model: nn.Module) -> Iterator[list[str]]:
    """A context in which a model is traced; at its end, what other threads have set on its modules is set again.

    Yields:
        A list that receives the names of such attributes.
    """
    watcher = _Watcher(model)
    try:
        with settings_seen(watcher.see):
            yield watcher.names
    finally:
        for (_, name), (owner, value) in watcher.found.items():
            setattr(owner, name, value)
