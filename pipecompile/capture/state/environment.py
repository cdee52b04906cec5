"""Variables of the process's environment that forward reads.

``os.getenv`` reads ``os.environ`` inside the standard library, whose functions a trace does not follow. So
``os.environ`` itself notes, while forward runs, which variables are asked for, or that it is counted or gone through.
Reports name variables without their values, which may be secret.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import MappingProxyType
from typing import Any

from pipecompile.capture.state.sources import Answer


class Environment:
    """What one run of forward reads of the environment, as places."""

    def __init__(self) -> None:
        self.places: dict[Any, Answer] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """A context for forward; reads of other threads do not count."""
        kind: Any = type(os.environ)
        item, walk, count, thread = kind.__getitem__, kind.__iter__, kind.__len__, threading.get_ident()

        def noting_item(environment: Any, name: Any) -> Any:
            if threading.get_ident() == thread:
                self._note(environment, name)
            return item(environment, name)

        def noting_all(environment: Any) -> Any:
            if threading.get_ident() == thread:
                self.places[None] = Answer(_everything, "os.environ")
            return walk(environment)

        def noting_count(environment: Any) -> Any:
            if threading.get_ident() == thread:
                self.places[len] = Answer(partial(count, environment), "len(os.environ)")
            return count(environment)

        kind.__getitem__, kind.__iter__, kind.__len__ = noting_item, noting_all, noting_count
        try:
            yield
        finally:
            kind.__getitem__, kind.__iter__, kind.__len__ = item, walk, count

    def _note(self, environment: Any, name: Any) -> None:
        try:
            key = environment.encodekey(name)
        except TypeError:  # raised again by the read itself
            return
        self.places[key] = Answer(partial(_alone, environment._data, key), f"os.environ[{name!r}]")


def _alone(data: dict[Any, Any], key: Any) -> MappingProxyType[Any, Any]:
    return MappingProxyType({key: data[key]} if key in data else {})  # shown without its values


def _everything() -> MappingProxyType[Any, Any]:
    return MappingProxyType(dict(os.environ))
