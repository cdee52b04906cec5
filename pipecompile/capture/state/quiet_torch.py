"""What goes on beside a model that is tried out, and is kept from it: torch's logs, and the garbage collector.

That a size cannot be a symbol is an error to torch, not to us: each attempt that fails may be followed by one that does
not, and what fails for good is raised. The records of the calling thread are dropped at the loggers themselves; levels
and handlers stay as the user has them.
"""

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_LOGGERS = ("torch.fx", "torch._subclasses", "torch._dynamo", "torch.utils._sympy")  # with those below them


@contextmanager
def quiet() -> Iterator[None]:
    """Drops warnings and errors that torch's tracing logs in this thread; what ``TORCH_LOGS`` asks for stays."""
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
    """In which no garbage is collected: what is called at that (``gc.callbacks``) is nobody's code, and sets state."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()
