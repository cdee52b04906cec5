"""Intercepts every call of a function during a trace, wherever the caller looked the function up.

A caller may find a function in a module, a class, a table or a closure. All of them hold the same function object, so
the trace replaces the code of that object with a call of the tracer, which gets a copy of the original function.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import count
from types import CodeType, FunctionType
from typing import Any
from weakref import WeakSet, WeakValueDictionary

Arrival = Callable[[FunctionType, FunctionType, tuple[Any, ...], dict[str, Any]], Any]

_OPAQUE = 0x20 | 0x80 | 0x100 | 0x200  # generators and coroutines: their frames outlive the call
_keys = count(1)  # 0 is another constant of the code below
_arrivals: dict[int, Callable[..., Any]] = {}  # by key, for the time of a trace
_functions: WeakValueDictionary[int, FunctionType] = WeakValueDictionary()  # by key
_copies: WeakSet[FunctionType] = WeakSet()


@contextmanager
def intercepted(functions: Iterable[FunctionType], arrival: Arrival) -> Iterator[None]:
    """Replaces each call of the functions in this thread with ``arrival(function, original, args, kwargs)``."""
    before = {function: (next(_keys), function.__code__) for function in functions}
    thread = threading.get_ident()
    try:
        for function, (key, code) in before.items():
            _arrivals[key] = _arrive(function, copy_of_function(function), arrival, thread)
            _functions[key] = function
            function.__code__ = _code_of(key, code)
        yield
    finally:
        for function, (key, code) in before.items():
            function.__code__ = code
            _arrivals.pop(key, None)


def _arrive(function: FunctionType, original: FunctionType, arrival: Arrival, thread: int) -> Callable[..., Any]:
    def arrive(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if threading.get_ident() != thread:
            return original(*args, **kwargs)
        return arrival(function, original, args, kwargs)

    return arrive


def entered(key: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Called by the code of an intercepted function."""
    arrive = _arrivals.get(key)
    if arrive is None:  # another thread entered just before the trace ended
        return _functions[key](*args, **kwargs)
    return arrive(args, kwargs)


def _template(*args: Any, **kwargs: Any) -> Any:
    from pipecompile.capture.function_patching import entered  # by name: the globals are those of the function

    return entered("key", args, kwargs)  # type: ignore[arg-type]


def _code_of(key: int, code: CodeType) -> CodeType:
    """Returns the replacement code. It has the free variables of the original, as a function's code must."""
    template = _with_variables(code.co_freevars)
    return template.replace(co_consts=tuple(key if constant == "key" else constant for constant in template.co_consts))


@cache
def _with_variables(names: tuple[str, ...]) -> CodeType:
    """Returns the template's code, compiled with free variables.

    If the code only declared them, its frames would have no cells, and Python would crash on reading ``f_locals``.
    """
    if not names:
        return _template.__code__
    lines = [
        "def outer():",
        *(f"    {name} = None" for name in names),
        f"    def {_template.__name__}(*args, **kwargs):",
        f"        from {__name__} import entered",
        "        return entered('key', args, kwargs)",
        *(f"        {name}" for name in names),  # never run
        f"    return {_template.__name__}",
    ]
    made: dict[str, Any] = {}
    exec(compile("\n".join(lines), __file__, "exec"), made)
    return made["outer"]().__code__  # type: ignore[no-any-return]


def intercepted_by(code: CodeType) -> FunctionType | None:
    """Returns the intercepted function that a frame with this code runs, or None."""
    if code.co_name != _template.__name__ or code.co_filename != __file__:
        return None
    return next((_functions[constant] for constant in code.co_consts if constant in _functions), None)


def copy_of_function(function: FunctionType) -> FunctionType:
    """Returns a copy that keeps the present code of a function when the function's own code is replaced."""
    copy = FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    _copies.add(copy)
    copy.__kwdefaults__ = function.__kwdefaults__
    copy.__module__, copy.__qualname__ = function.__module__, function.__qualname__
    return copy


def function_of(code: CodeType) -> FunctionType | None:
    """Returns the one function that has this code, or None if it cannot be intercepted.

    Functions defined inside another one, functions with free variables, generators and coroutines cannot be.
    """
    if code.co_freevars or "<" in code.co_qualname or code.co_flags & _OPAQUE:
        return None
    holders = [
        holder for holder in gc.get_referrers(code) if isinstance(holder, FunctionType) and holder not in _copies
    ]
    return holders[0] if len(holders) == 1 else None
