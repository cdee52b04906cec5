"""Suppresses torch's logs and the garbage collector during a trace.

torch logs an error when a size cannot be a symbol, but a later attempt may succeed, and a final failure is raised. The
log records of the calling thread are dropped at the loggers; the user's levels and handlers are not changed.
"""

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_LOGGERS = ("torch.fx", "torch._subclasses", "torch._dynamo", "torch.utils._sympy")  # and their children


@contextmanager
def quiet() -> Iterator[None]:
    """Drops warnings and errors that torch's tracing logs in this thread; records for ``TORCH_LOGS`` are kept."""
    thread = threading.get_ident()

    def passes(record: logging.LogRecord) -> bool:
        return record.thread != thread or record.levelno < logging.WARNING

    loggers = [logging.getLogger(name) for name in list(logging.root.manager.loggerDict) if name.startswith(_LOGGERS)]
    for logger in loggers:
        logger.addFilter(passes)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(passes)


@contextmanager
def not_collecting() -> Iterator[None]:
    """A context without garbage collection, which could run ``gc.callbacks`` that set state and are not the model's."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()
