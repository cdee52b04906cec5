"""Custom functions of autograd in a graph: one call each, with the backward that the user has written."""

from __future__ import annotations

from types import FunctionType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

APPLY: FunctionType = torch.autograd.Function.__dict__["apply"].__func__  # that of all subclasses, as a plain function


class Applied:
    """``function.apply`` as what a graph calls; ``draws`` says that its forward draws random numbers.

    Equal for one function, so that two traces have the same calls.
    """

    def __init__(self, function: type[torch.autograd.Function], draws: bool = False) -> None:
        self.function = function
        self.draws = draws
        self.__name__ = f"{function.__name__}_apply"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return APPLY(self.function, *args, **kwargs)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Applied) and other.function is self.function

    def __hash__(self) -> int:
        return hash(self.function)


class Draws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees whether random numbers are drawn in it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen |= torch.Tag.nondeterministic_seeded in func.tags
        return func(*args, **(kwargs or {}))
