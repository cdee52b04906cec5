"""Suppresses torch's logs and the garbage collector during a trace, and most of its runs in a compilation.

torch logs an error when a size cannot be a symbol, but a later attempt may succeed, and a final failure is raised. The
log records of the calling thread are dropped at the loggers; the user's levels and handlers are not changed. Loggers
that a user has made more talkative (``TORCH_LOGS``, ``torch._logging.set_logs``, ``setLevel``) keep all their records.
"""

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from pipecompile.ops.torch_internals import dynamo

SELDOM = 50_000  # objects that a compilation makes between two collections, at least
_LOGGERS = ("torch.fx", "torch._subclasses", "torch._dynamo", "torch.utils._sympy")  # and their children


@contextmanager
def quiet() -> Iterator[None]:
    """Drops warnings and errors that torch's tracing logs in this thread, unless the user has asked for its logs."""
    thread = threading.get_ident()

    def passes(record: logging.LogRecord) -> bool:
        return record.thread != thread or record.levelno < logging.WARNING

    dynamo()  # fake tensors import it; its loggers must exist
    names = [name for name in list(logging.root.manager.loggerDict) if name.startswith(_LOGGERS)]
    loggers = [each for each in map(logging.getLogger, names) if not each.isEnabledFor(logging.INFO)]
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


@contextmanager
def seldom_collecting() -> Iterator[None]:
    """A context with fewer garbage collections: a compilation makes many objects, most of which it keeps.

    It may take minutes (torch.compile), so there are some, else cycles would pile up.
    """
    before = gc.get_threshold()
    if before[0]:  # else there are none
        gc.set_threshold(max(SELDOM, before[0]), *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
