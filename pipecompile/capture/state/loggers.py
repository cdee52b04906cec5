"""Levels of loggers that forward asks for: ``if log.isEnabledFor(logging.DEBUG)``.

A level is looked up inside the standard library, whose functions a trace does not follow, along the parents of a
logger. So the two methods that answer note, while forward runs, what they are asked. What a logger asks itself, to log
a message or not, changes no result and is not noted.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from pipecompile.capture.state.sources import Answer

_QUESTIONS = ("isEnabledFor", "getEffectiveLevel")


class Loggers:
    """What one run of forward asks loggers, as places."""

    def __init__(self) -> None:
        self.places: dict[Any, Answer] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """A context for forward; questions of other threads do not count."""
        kind: Any = logging.Logger
        originals = {name: getattr(kind, name) for name in _QUESTIONS}
        for name, original in originals.items():
            setattr(kind, name, self._noting(name, original))
        try:
            yield
        finally:
            for name, original in originals.items():
                setattr(kind, name, original)

    def _noting(self, name: str, original: Any) -> Any:
        thread = threading.get_ident()

        def noting(logger: Any, *args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() == thread and not _is_logging():
                ask = partial(original, logger, *args, **kwargs)
                self.places[id(logger), name, args, *kwargs.items()] = Answer(ask, f"the level of {logger.name!r}")
            return original(logger, *args, **kwargs)

        return noting


def _is_logging() -> bool:
    """Whether the question comes from a method that logs a message, and not from outside of ``logging``."""
    frame, name = sys._getframe(2), ""
    while frame.f_back is not None and frame.f_code.co_filename == logging.__file__:
        frame, name = frame.f_back, frame.f_code.co_name
    return bool(name) and name not in _QUESTIONS
