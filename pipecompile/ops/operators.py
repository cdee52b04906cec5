"""Identifies torch functions by the object that is called, as JAX identifies primitives, never by a bare name.

A model may define functions with the same names as torch's: a custom operator ``mylib::normalize``, a
``def cross_entropy`` that is kept whole. So facts about torch functions (how they treat a batch, whether they draw
random numbers, whether they are costly) are stored in tables by object. ``named`` builds such tables: it finds all
objects that a name denotes, and raises an error if torch has none. ``function_of`` returns the object by which a call
is looked up.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from pipecompile.ops.torch_internals import OpOverload, OpOverloadPacket

# Namespaces in which functions are looked up, with the prefix of their names. torch._C._nn is not included: its losses
# have the same names as those of torch.nn.functional, but take other arguments.
_SPACES: tuple[tuple[str, Any], ...] = (
    ("", torch),
    ("", torch.Tensor),
    ("", F),
    ("special_", torch.special),
    ("linalg_", torch.linalg),
    ("fft_", torch.fft),
)
# Names of Python's operators: __add__ and __iadd__; __radd__ has a name of its own (radd).
_OPERATORS = frozenset(
    {
        "add", "sub", "mul", "div", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor", "lshift",
        "rshift", "eq", "ne", "lt", "le", "gt", "ge", "neg", "pos", "abs", "invert", "getitem", "setitem",
    }
)  # fmt: skip
_REFLECTED = frozenset(f"r{name}" for name in _OPERATORS) - {"rand"}  # torch.rand; 1 & x is named "__rand__"


def named(names: str, aten: bool = True) -> dict[Hashable, str]:
    """Returns the torch functions with the given names, including in-place forms and aten operations -> their names.

    Args:
        names: Names separated by spaces, without the underscores of in-place forms: ``add`` is ``torch.add``,
            ``Tensor.add_``, ``Tensor.__iadd__``, ``operator.add``, ``aten::add``; ``radd`` is ``Tensor.__radd__``;
            ``linalg_norm`` is ``torch.linalg.norm``.
        aten: Whether the aten operations with these names take the same arguments, and are included.

    Raises:
        NameError: torch has no function with one of the names.
    """
    found: dict[Hashable, str] = {}
    for name in names.split():
        functions = dict.fromkeys(_denoted(name, aten), name)
        if not functions:
            raise NameError(f"torch has no function called {name!r}")
        found |= functions
    return found


def _denoted(name: str, aten: bool) -> Iterator[Hashable]:
    for form in _forms(name):
        for prefix, space in _SPACES:
            if form.startswith(prefix) and _is_function(function := getattr(space, form[len(prefix) :], None)):
                yield function
        if name in _OPERATORS and _is_function(function := getattr(operator, form, None)):
            yield function
        if aten and not form.startswith("__") and (packet := getattr(torch.ops.aten, form, None)) is not None:
            yield packet


def _forms(name: str) -> Iterator[str]:
    if name not in _REFLECTED:
        yield from (name,) if name.startswith("__") else (name, f"{name}_")
    if name in _OPERATORS | _REFLECTED:
        yield f"__{name}__"
    if name in _OPERATORS:
        yield f"__i{name}__"


def _is_function(found: object) -> bool:
    return callable(found) and not isinstance(found, type)


def function_of(target: Any) -> Any:
    """Returns the object by which tables look up what a graph calls; an aten overload becomes its packet."""
    return target.overloadpacket if isinstance(target, OpOverload) else target


def is_opaque(target: Any) -> bool:
    """Whether what a graph calls is neither a torch function nor Python's arithmetic, so that its name says nothing.

    That is: a module or function kept whole, a custom operator, a custom autograd function, a hook.
    """
    target = function_of(target)
    if isinstance(target, OpOverloadPacket):
        return target._qualified_op_name.partition("::")[0] not in ("aten", "prims")
    root = (getattr(target, "__module__", None) or "torch").partition(".")[0]
    return isinstance(getattr(target, "__self__", None), type) or root not in (
        "torch",
        "operator",
        "_operator",
        "builtins",
        "math",
    )


def taking_tensor(function: Any, position: int) -> Any:
    """Returns the overload of an aten operation that takes a tensor where this one takes a number.

    Functions that are not overloads, and take either, are returned as they are: ``div.Scalar`` becomes ``div.Tensor``.
    """
    if not isinstance(function, OpOverload):
        return function
    names = [argument.name for argument in function._schema.arguments]
    for name in function.overloadpacket.overloads():
        other = getattr(function.overloadpacket, name)
        arguments = other._schema.arguments
        if [a.name for a in arguments][: position + 1] != names[: position + 1] or len(arguments) < len(names):
            continue
        if str(arguments[position].type) == "Tensor" and not any(a.is_out for a in arguments):
            return other
    return function
