"""Records the draws of forward from Python's and numpy's random generators, so that calls draw as the unsplit model.

A trace records each draw: the generator, the method, and the arguments. Before each later call the draws are repeated
in order, so that a seed gives the same numbers as in the unsplit model. A single number gets a stand-in
(``counters.py``): used in arithmetic with tensors it is an input of the graph, and a decision of Python on it
(``if random.random() < p``) is guarded. Any other value (an order, a choice) is guarded by value.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from copy import copy
from types import BuiltinMethodType, MethodType
from typing import Any

import numpy as np
import torch

from pipecompile.capture.state.container_proxies import without_stand_ins
from pipecompile.capture.state.counters import Number, concrete
from pipecompile.capture.state.fingerprints import same
from pipecompile.capture.state.python_random import Draw, Draws
from pipecompile.errors import CaptureError
from pipecompile.ops.randomness import set_state, state_of

_OF_PYTHON: Any = random.random.__self__  # type: ignore[attr-defined]
_OF_NUMPY: Any = vars(np.random)["rand"].__self__
SINGLE = (int, float, np.float64)  # types of numbers that get stand-ins
_OF_NUMPYS_FILE = (np.random.seed, np.random.ranf, np.random.sample)  # these are not methods
_NO_DRAWS = frozenset({"getstate", "get_state", "bit_generator", "spawn"})


class Drawing:
    """Records the draws of one trace.

    Args:
        generators: Generators that the model holds.
        questions: Receives questions about the draws with their answers.
        follow: Whether single numbers get stand-ins; if not, their values are guarded.
        is_leaf: Whether a part kept whole is running, which makes its own draws in each call.
    """

    def __init__(
        self,
        generators: Iterable[Any],
        questions: list[tuple[Callable[[Any], Any], Any]],
        follow: bool,
        is_leaf: Callable[[], bool],
    ) -> None:
        held = [g for g in generators if not isinstance(g, torch.Generator)]
        self.generators = tuple({id(g): g for g in (_OF_PYTHON, _OF_NUMPY, *held)}.values())
        self.before = [state_of(generator) for generator in self.generators]
        self.questions = questions
        self.follow = follow
        self.is_leaf = is_leaf
        self.made: list[Draw] = []
        self.in_leaf = False
        self.stood_in = False
        self.stand_ins: dict[int, Any] = {}  # by the identity of a generator or a method
        self.thread = threading.get_ident()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """A context for forward, in which the functions of ``random`` and ``numpy.random`` are patched."""
        with ExitStack() as stack:
            for module in (random, np.random):
                for name, value in list(vars(module).items()):
                    if _is_draw(value):
                        setattr(module, name, self.stand_in(value))
                        stack.callback(setattr, module, name, value)
            yield

    def stand_in(self, value: Any) -> Any:
        """Returns the stand-in for a generator or a method of one; other values unchanged."""
        if id(value) in self.stand_ins:
            return self.stand_ins[id(value)]
        made = value
        if _is_draw(value):
            made = self._watched(value)
        elif isinstance(value, random.Random | np.random.Generator | np.random.RandomState):
            made = _Watched(value, self)
        self.stand_ins[id(value)] = made
        return made

    def _watched(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def draw(*args: Any, **kwargs: Any) -> Any:
            return self.draw(function, args, kwargs)

        draw.__name__ = getattr(function, "__name__", "draw")
        return draw

    def draw(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Makes a draw and records it."""
        if threading.get_ident() != self.thread:
            return function(*args, **kwargs)
        if self.is_leaf():
            self.in_leaf = True
            return function(*args, **kwargs)
        if function.__name__ == "shuffle":
            return self._shuffle(function, *args, **kwargs)
        return self._record(Draw(function, tuple(map(_plain, args)), {n: _plain(arg) for n, arg in kwargs.items()}))

    def _record(self, draw: Draw) -> Any:
        value, number = draw(), len(self.made)
        self.made.append(draw)
        if self.follow and type(value) in SINGLE:
            self.stood_in = True
            return Number(value, lambda state: state.draws[number], self.questions)
        self.questions.append((lambda state: state.draws[number], _copied(value)))
        return value

    def _shuffle(self, function: Callable[..., Any], items: Any) -> None:
        """Records a shuffle as the draw of a permutation, because the draws do not depend on the items."""
        order = self._record(Draw(_Order(function, len(items)), (), {}))
        items[:] = [items[i] for i in order] if isinstance(items, list) else items[np.array(order)]

    def draws(self) -> Draws:
        """Returns the draws of the trace.

        Raises:
            CaptureError: Some draws were not recorded.
        """
        after = [state_of(generator) for generator in self.generators]
        for generator, state in zip(self.generators, self.before, strict=True):
            set_state(generator, state)
        for draw in self.made:
            draw()
        replayed = [state_of(generator) for generator in self.generators]
        for generator, a, b in zip(self.generators, after, replayed, strict=True):
            if not self.in_leaf and not _same_state(a, b):
                raise CaptureError(
                    f"forward draws random numbers from a {type(generator).__module__}.{type(generator).__name__} in a "
                    f"way that cannot be recorded, so every step would reuse those of the capture; draw them with the "
                    f"functions of random or numpy.random, or pass them to the model as an argument"
                )
        used = [
            generator
            for generator, a, b in zip(self.generators, self.before, after, strict=True)
            if self.made and not _same_state(a, b)
        ]
        return Draws(tuple(self.made), tuple(used))


class _Order:
    """Draws a permutation of ``count`` items, as a shuffle does."""

    def __init__(self, shuffle: Callable[..., Any], count: int) -> None:
        self.shuffle = shuffle
        self.count = count

    def __call__(self) -> list[int]:
        order = [*range(self.count)]
        self.shuffle(order)
        return order


class _Watched:
    """A generator whose draws are recorded."""

    def __init__(self, generator: Any, drawing: Drawing) -> None:
        self.__dict__["_of"] = (generator, drawing)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self.__dict__["_of"][0])

    def __getattr__(self, name: str) -> Any:
        generator, drawing = self.__dict__["_of"]
        value = getattr(generator, name)
        if name in _NO_DRAWS or not callable(value):
            return value
        return lambda *args, **kwargs: drawing.draw(value, args, kwargs)


def _is_draw(value: Any) -> bool:
    """Whether a value is a method of one of the two global generators, or a function that calls one."""
    if any(value is function for function in _OF_NUMPYS_FILE):
        return True
    if not isinstance(value, BuiltinMethodType | MethodType):  # other objects may compute __self__
        return False
    of = value.__self__
    return callable(value) and (of is _OF_PYTHON or of is _OF_NUMPY) and value.__name__ not in _NO_DRAWS


def _plain(value: Any) -> Any:
    """Returns a copy of an argument's present value; stand-ins become plain numbers, which are guarded."""
    value = _copied(without_stand_ins(concrete(value)))
    return int(value) if isinstance(value, torch.SymInt) else value


def _copied(value: Any) -> Any:
    return copy(value) if isinstance(value, list | dict | set | np.ndarray) else value


def _same_state(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return all(_same_state(a[key], b[key]) for key in a)
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(_same_state, a, b))
    return same(a, b)
