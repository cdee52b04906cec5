"""Which function of torch a call is: told by the object that is called, as JAX tells primitives, never by a bare name.

A model may bring functions called as torch's are: a custom operator ``mylib::normalize``, a ``def cross_entropy`` that
is kept whole. Whatever is known of torch's functions (how they treat a batch, whether they draw random numbers, whether
they are heavy) is therefore kept in tables by object. ``named`` writes such tables: it finds, once, all objects that a
name denotes, and raises where there is none. ``function_of`` gives the object by which a call is looked up.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from pipecompile.ops.torch_internals import OpOverload, OpOverloadPacket

# Where functions are looked for, with what stands before their names there. torch._C._nn is none of them: its losses
# have the names of torch.nn.functional's, and take other arguments.
_SPACES: tuple[tuple[str, Any], ...] = (
    ("", torch),
    ("", torch.Tensor),
    ("", F),
    ("special_", torch.special),
    ("linalg_", torch.linalg),
    ("fft_", torch.fft),
)
# Functions that Python's operators call: __add__, __iadd__ and, as a name of its own, __radd__ (radd).
_OPERATORS = frozenset(
    {
        "add", "sub", "mul", "div", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor", "lshift",
        "rshift", "eq", "ne", "lt", "le", "gt", "ge", "neg", "pos", "abs", "invert", "getitem", "setitem",
    }
)  # fmt: skip
_REFLECTED = frozenset(f"r{name}" for name in _OPERATORS) - {"rand"}  # torch.rand; 1 & x is named "__rand__"


def named(names: str, aten: bool = True) -> dict[Hashable, str]:
    """The functions of torch of some names, in-place forms and aten operations among them, each with its name.

    Args:
        names: separated by spaces, without the underscores of in-place forms: ``add`` is ``torch.add``,
            ``Tensor.add_``, ``Tensor.__iadd__``, ``operator.add``, ``aten::add``; ``radd`` is ``Tensor.__radd__``;
            ``linalg_norm`` is ``torch.linalg.norm``.
        aten: whether the aten operations of these names take the same arguments.

    Raises:
        NameError: torch has no function of a name.
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
    """The object under which tables hold what a graph calls: for an aten operation that of all its overloads."""
    return target.overloadpacket if isinstance(target, OpOverload) else target


def is_opaque(target: Any) -> bool:
    """Whether what a graph calls is none of torch's functions: a module or function kept whole, a custom operator, a
    custom function of autograd, a hook. Its name says nothing about it."""
    target = function_of(target)
    if isinstance(target, OpOverloadPacket):
        return target._qualified_op_name.partition("::")[0] not in ("aten", "prims")
    root = (getattr(target, "__module__", None) or "torch").partition(".")[0]
    return isinstance(getattr(target, "__self__", None), type) or root not in (
        "torch",
        "operator",
        "_operator",
        "builtins",
    )
