"""Functions whose calls a trace wants to see: every call of one arrives here, wherever the caller found it.

A function may be looked up in a module, a class, a table, or a closure. All of them hold the same function object, so
what changes, for the time of a trace, is its code: to a call of the tracer. The function as it was goes along.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import CodeType, FunctionType
from typing import Any
from weakref import WeakSet

Arrival = Callable[[FunctionType, FunctionType, tuple[Any, ...], dict[str, Any]], Any]

_OPAQUE = 0x20 | 0x80 | 0x100 | 0x200  # generators and coroutines: their frames outlive the call
_arrivals: dict[int, Callable[..., Any]] = {}
_copies: WeakSet[FunctionType] = WeakSet()


@contextmanager
def intercepted(functions: Iterable[FunctionType], arrival: Arrival) -> Iterator[None]:
    """Makes each call of the functions, in this thread, ``arrival(function, as it was, args, kwargs)``."""
    before = {function: function.__code__ for function in functions}
    thread = threading.get_ident()
    try:
        for function in before:
            _arrivals[id(function)] = _arrive(function, copy_of_function(function), arrival, thread)
            function.__code__ = _code_of(id(function))
        yield
    finally:
        for function, code in before.items():
            function.__code__ = code
            _arrivals.pop(id(function), None)


def _arrive(function: FunctionType, original: FunctionType, arrival: Arrival, thread: int) -> Callable[..., Any]:
    def arrive(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if threading.get_ident() != thread:
            return original(*args, **kwargs)
        return arrival(function, original, args, kwargs)

    return arrive


def entered(key: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What the code of an intercepted function calls."""
    return _arrivals[key](args, kwargs)


def _template(*args: Any, **kwargs: Any) -> Any:
    from pipecompile.capture.intercept import entered  # by name: the globals are those of the function

    return entered("key", args, kwargs)  # type: ignore[arg-type]


def _code_of(key: int) -> CodeType:
    constants = _template.__code__.co_consts
    return _template.__code__.replace(co_consts=tuple(key if constant == "key" else constant for constant in constants))


def key_of(code: CodeType) -> int | None:
    """The identity of the intercepted function that a frame with this code runs."""
    if code.co_name != _template.__name__ or code.co_filename != __file__:
        return None
    return next((constant for constant in code.co_consts if constant in _arrivals), None)


def copy_of_function(function: FunctionType) -> FunctionType:
    """A function that does what another one does now, whatever becomes of that one's code."""
    copy = FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__)
    _copies.add(copy)
    copy.__kwdefaults__ = function.__kwdefaults__
    copy.__module__, copy.__qualname__ = function.__module__, function.__qualname__
    return copy


def function_of(code: CodeType) -> FunctionType | None:
    """The one function that has this code; None for what cannot be intercepted.

    That is a function made anew on each run (inside another one), one that reads variables of an outer one, and one
    that yields.
    """
    if code.co_freevars or "<" in code.co_qualname or code.co_flags & _OPAQUE:
        return None
    holders = [
        holder for holder in gc.get_referrers(code) if isinstance(holder, FunctionType) and holder not in _copies
    ]
    return holders[0] if len(holders) == 1 else None
