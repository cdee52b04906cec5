"""Calls of torch functions on objects that are no tensors but say what to call instead, by ``__torch_function__``.

A package's tensor with a scale, or with a mask, is such an object. Its own Python is part of forward: what it calls in
turn is recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor


def others_than_tensors(types: Iterable[type]) -> list[type]:
    """Returns the types that override torch functions and are no tensors."""
    return [kind for kind in types if not issubclass(kind, Tensor)]


def as_they_say(
    others: Iterable[type],
    func: Callable[..., Any],
    types: tuple[type, ...],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Returns what the first of these types answers.

    Raises:
        TypeError: Each of them returned ``NotImplemented``, as in torch.
    """
    for kind in others:
        out = kind.__torch_function__(func, types, args, kwargs)  # type: ignore[attr-defined]
        if out is not NotImplemented:
            return out
    raise TypeError(f"no implementation found for {func} on types {[kind.__name__ for kind in types]}")
