"""Stand-ins for numbers that forward reads and sets (``self.calls += 1``), like symbols for sizes.

A stand-in computes like the number and remembers how, so that the update is known for every start value. Whatever
Python asks of it (a comparison, a truth value, an index) is answered from the start value and noted as a question. A
trace is valid for every start value that gives the same answers: ``if self.calls % 2`` needs two traces, not one per
call.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from pipecompile.capture.state.guards import State, Update
from pipecompile.ops.symbols import resolve

_ARITHMETIC = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift")
_COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")
_UNARY = ("neg", "pos", "abs", "invert")
_CONVERSIONS: dict[str, Callable[[Any], Any]] = {
    "bool": bool, "int": int, "float": float, "index": operator.index, "hash": hash, "str": str, "repr": repr,
    "round": round, "trunc": math.trunc, "floor": math.floor, "ceil": math.ceil,
}  # fmt: skip


class Number:
    """A number that remembers how it was computed.

    Args:
        value: Its value in this trace; may be symbolic, if computed from a symbolic size.
        of: Computes it from the state before a call.
        questions: Receives each question with its answer.
    """

    def __init__(self, value: Any, of: Update, questions: list[tuple[Update, Any]]) -> None:
        self.value = value
        self.of = of
        self.questions = questions

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # for isinstance(number, int)
        return int if type(self.value) is int else float

    def ask(self, function: Callable[..., Any], *operands: Any) -> Any:
        """Returns the answer to a question, on which the trace then depends.

        Raises:
            TypeError: The answer depends on the size of a microbatch.
        """
        derived = self.apply(function, *operands)
        if type(derived.value) in (torch.SymInt, torch.SymFloat, torch.SymBool):
            raise TypeError("the value of a number that depends on the number of rows is needed")
        self.questions.append((derived.of, derived.value))
        return derived.value

    def apply(self, function: Callable[..., Any], *operands: Any) -> Number:
        """Returns a number computed from this one and others."""
        values = [operand.value if is_number(operand) else operand for operand in operands]
        parts = [self.of, *map(_update, operands)]
        return Number(
            function(self.value, *values), lambda state: function(*(part(state) for part in parts)), self.questions
        )

    def argument(self) -> Any:
        """Returns the number as an argument for arithmetic with tensors; the trace does not depend on its value."""
        if isinstance(self.value, torch.SymInt | torch.SymFloat):
            return self.concrete()
        made: Any = (WholeArgument if type(self.value) is int else Argument)(self.value)
        made.number = self
        return made

    def concrete(self) -> Any:
        """Returns the plain value; the trace is then valid only for this value."""
        return self.ask(lambda value: value)


class Argument(float):
    """A number passed to a torch function; the graph reads it from an input instead of this value."""

    number: Number


class WholeArgument(int):
    """Like ``Argument``, for an integer."""

    number: Number


def is_number(value: Any) -> bool:
    return type(value) is Number


def concrete(value: Any) -> Any:
    """Returns a value; a stand-in is replaced by its plain value."""
    return value.concrete() if is_number(value) else value


def _update(operand: Any) -> Update:
    if is_number(operand):
        return operand.of  # type: ignore[no-any-return]
    if isinstance(operand, torch.SymInt | torch.SymFloat):
        return lambda state: resolve(operand, dict(state.sizes))
    return lambda state: operand


def _is_operand(value: Any) -> bool:
    return isinstance(value, int | float | torch.SymInt | torch.SymFloat)  # true for a stand-in too


def _binary(function: Callable[..., Any], reflected: bool, comparison: bool) -> Callable[..., Any]:
    def run(self: Number, other: Any) -> Any:
        def compute(a: Any, b: Any) -> Any:
            return function(b, a) if reflected else function(a, b)

        if _is_operand(other):
            return self.ask(compute, other) if comparison else self.apply(compute, other)
        if isinstance(other, Tensor):
            return compute(self.argument(), other)
        if comparison:
            return compute(self.concrete(), other)
        return NotImplemented

    return run


def _unary(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self: self.apply(function)


def _converting(convert: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, *rest: self.ask(lambda value: convert(value, *rest))


for _name in _ARITHMETIC:
    _function = getattr(operator, f"__{_name}__")
    setattr(Number, f"__{_name}__", _binary(_function, reflected=False, comparison=False))
    setattr(Number, f"__r{_name}__", _binary(_function, reflected=True, comparison=False))
for _name in _COMPARISONS:
    setattr(Number, f"__{_name}__", _binary(getattr(operator, _name), reflected=False, comparison=True))
for _name in _UNARY:
    setattr(Number, f"__{_name}__", _unary(getattr(operator, _name)))
for _name, _convert in _CONVERSIONS.items():
    setattr(Number, f"__{_name}__", _converting(_convert))


@contextmanager
def seen_in_place() -> Iterator[None]:
    """A context in which ``x *= number`` writes to ``x``; for a stand-in, Python would fall back to ``x * number``."""
    names = [f"__i{name}__" for name in _ARITHMETIC if hasattr(Tensor, f"__i{name}__")]
    before = {name: Tensor.__dict__.get(name) for name in names}
    for name in names:
        setattr(Tensor, name, _in_place(getattr(Tensor, name)))
    try:
        yield
    finally:
        for name, held in before.items():
            delattr(Tensor, name) if held is None else setattr(Tensor, name, held)


def _in_place(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def run(self: Tensor, other: Any) -> Any:
        return method(self, other.argument() if is_number(other) else other)

    return run


def start(value: float, key: tuple[int, str], questions: list[tuple[Update, Any]]) -> Number:
    """Returns the stand-in for a number in an attribute; ``key`` finds its value in the state before a call."""

    def of(state: State) -> float:
        return state.numbers[key]

    return Number(value, of, questions)
