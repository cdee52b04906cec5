"""A module's table of parameters or buffers during a trace: only the thread that traces finds fakes in it.

One thread may run a model eagerly while another captures it. So fakes are not written into the module's own tables;
during the trace, the module has tables of this class instead.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor


class Table(dict[str, Any]):
    """A dict of fakes in the thread that created it; in any other thread, the module's own table."""

    def __init__(self, fakes: Mapping[str, Tensor | None], own: dict[str, Any]) -> None:
        super().__init__(fakes)
        self.own = own
        self.thread = threading.get_ident()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return dict, (dict(self.items()),)


def _as_seen(name: str) -> Callable[..., Any]:
    """Returns a method of dict that acts on the fakes or on the module's own table."""
    method = getattr(dict, name)

    def seen(self: Table, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() == self.thread:
            return method(self, *args, **kwargs)
        return getattr(self.own, name)(*args, **kwargs)

    return seen


_SEEN = (
    "__contains__", "__delitem__", "__eq__", "__getitem__", "__ior__", "__iter__", "__len__", "__ne__", "__or__",
    "__repr__", "__reversed__", "__ror__", "__setitem__",
    "clear", "copy", "get", "items", "keys", "pop", "popitem", "setdefault", "update", "values",
)  # fmt: skip

for _name in _SEEN:
    setattr(Table, _name, _as_seen(_name))
