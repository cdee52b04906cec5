"""Repeats, for each call, the draws that forward makes from Python's and numpy's random generators."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pipecompile.ops.randomness import set_state, state_of


@dataclass(frozen=True)
class Draw:
    """One draw; ``function`` is a method of a generator."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def __call__(self) -> Any:
        return self.function(*self.args, **self.kwargs)


@dataclass(frozen=True)
class Draws:
    """All draws of one call, in order, and the generators that they are made from."""

    made: tuple[Draw, ...] = ()
    generators: tuple[Any, ...] = ()

    def ahead(self) -> Ahead:
        """Returns what the next call draws; the states of the generators do not change."""
        before = [state_of(generator) for generator in self.generators]
        try:
            values = tuple(draw() for draw in self.made)
            return Ahead(values, self.generators, tuple(map(state_of, self.generators)))
        finally:
            for generator, state in zip(self.generators, before, strict=True):
                set_state(generator, state)


@dataclass(frozen=True)
class Ahead:
    """Values drawn for a call, and the states of the generators after the draws."""

    values: tuple[Any, ...] = ()
    generators: tuple[Any, ...] = ()
    states: tuple[Any, ...] = ()

    def take(self) -> None:
        """Sets the generators to their states after the draws."""
        for generator, state in zip(self.generators, self.states, strict=True):
            set_state(generator, state)
