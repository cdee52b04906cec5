"""Observes which attributes of modules are set, in any thread, by ``module.name = value``.

``nn.Module.__setattr__`` is patched once for all who observe: a patch is passed on to each class of modules, of which
there may be thousands.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

See = Callable[[nn.Module, str, Any], None]

_LOCK = threading.Lock()
_OBSERVERS: list[See] = []
_OWN: list[See] = []  # the __setattr__ that was there before, perhaps another's patch


def _noting(self: nn.Module, name: str, value: Any) -> None:
    for see in _OBSERVERS.copy():
        see(self, name, value)
    _OWN[-1](self, name, value)


@contextmanager
def settings_seen(see: See) -> Iterator[None]:
    """A context in which ``see`` is called before an attribute of a module is set."""
    with _LOCK:
        if not _OBSERVERS:
            _OWN[:] = [nn.Module.__setattr__]
            nn.Module.__setattr__ = _noting  # type: ignore[method-assign]
        _OBSERVERS.append(see)
    try:
        yield
    finally:
        with _LOCK:
            _OBSERVERS.remove(see)
            if not _OBSERVERS:
                nn.Module.__setattr__ = _OWN[-1]  # type: ignore[method-assign, assignment]
