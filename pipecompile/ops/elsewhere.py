"""Outputs that another process has: tensors on the meta device, which say so where their values are asked for.

    loss = F.mse_loss(pipe(x), y)   # where the output is elsewhere, y counts as its shape, and so is the loss elsewhere
    loss.backward()                 # runs the backwards of this process
    loss.item()                     # InputError

A function of an output is computed on the meta device, as all functions there, so the script is the same everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pipecompile.errors import InputError, PipecompileError
from pipecompile.ops.torch_internals import DisableTorchFunctionSubclass, pytree

_READERS = {
    getattr(Tensor, name)
    for name in (
        *("item", "tolist", "numpy", "cpu", "cuda", "__bool__", "__int__", "__float__", "__complex__", "__index__"),
        *("__array__", "__contains__", "__reduce_ex__", "equal", "allclose", "is_nonzero"),
    )
} | {torch.equal, torch.allclose, torch.is_nonzero}
_IN_PLACE = {name for name in dir(Tensor) if name.startswith("__i") and f"__{name[3:]}" in dir(Tensor)}
_BACKWARDS = {Tensor.backward, torch.autograd.backward, torch.autograd.grad}


class Elsewhere(Tensor):
    """An output that another process has, or what was computed from it."""

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if function in _READERS:
            raise _error(_name(function))
        runs_backward = function in _BACKWARDS  # whose errors are those of stages
        with DisableTorchFunctionSubclass():
            if _writes(function, args, kwargs or {}):
                raise _error(f"{_name(function)} to a tensor")
            if torch.is_grad_enabled() and not runs_backward:
                pytree.tree_map(_refuse_gradient, (tuple(args), dict(kwargs or {})))
            args, kwargs = pytree.tree_map(_on_meta, (tuple(args), dict(kwargs or {})))
        try:
            return super().__torch_function__(function, types, args, kwargs)  # type: ignore[no-untyped-call]
        except (NotImplementedError, RuntimeError, TypeError) as error:
            if isinstance(error, PipecompileError) or not _is_of_values(function, error):
                raise  # as where the values are
            raise _error(f"{_name(function)} ({error})") from error

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if not self.is_leaf:
            return super().__deepcopy__(memo)  # type: ignore[no-any-return, no-untyped-call]  # torch's error
        copy: Tensor = self.detach().clone().requires_grad_(self.requires_grad)
        memo[id(self)] = copy
        return copy


def elsewhere(tensor: Tensor) -> Tensor:
    """A tensor on the meta device that says where its values are not; keeps its history."""
    return tensor.as_subclass(Elsewhere)


def _error(what: str) -> InputError:
    return InputError(
        f"{what} needs the values of an output that another process has made, and this one does not have them; pass "
        "outputs='all' to compile(), which brings them to all processes, or read it where it is: not tensor.is_meta"
    )


def _on_meta(value: Any) -> Any:
    kept = not isinstance(value, Tensor) or value.is_meta or (value.requires_grad and torch.is_grad_enabled())
    return value if kept else value.to("meta")


def _is_of_values(function: Callable[..., Any], error: Exception) -> bool:
    """Whether an error says that a function, or a backward of the caller's own, has no values to compute with."""
    return isinstance(error, NotImplementedError) or "meta" in str(error) or function is Tensor.__format__


def _refuse_gradient(value: Any) -> None:
    if isinstance(value, Tensor) and value.requires_grad and not value.is_meta:
        raise InputError(
            "an output that another process has made is computed with a tensor that requires a gradient, which would "
            "have no value here; pass outputs='all' to compile(), which brings outputs to all processes"
        )


def _writes(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a function writes to a tensor that has values."""
    name = _name(function)
    written = name == "__setitem__" or name in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))
    targets = [*args[:1]] * written + [kwargs.get("out")]
    return any(isinstance(target, Tensor) and not target.is_meta for target in targets)


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", str(function))
