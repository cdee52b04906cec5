"""One call of a torch function: the tensors in its arguments, what it writes to, and its printable name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipecompile.ops.torch_internals import FakeTensor, is_functorch_wrapped_tensor, pytree

# Functions that write to arguments without increasing their version counters: positions and names of those arguments.
SILENT_WRITES: dict[Callable[..., Any], tuple[tuple[int, str], ...]] = {
    F.batch_norm: ((1, "running_mean"), (2, "running_var")),
    torch.batch_norm: ((3, "running_mean"), (4, "running_var")),
}


def tensors_in(value: Any) -> Iterator[Tensor]:
    match value:
        case Tensor():
            yield value
        case dict():
            for item in value.values():
                yield from tensors_in(item)
        case list() | tuple():
            for item in value:
                yield from tensors_in(item)
        case slice():
            yield from tensors_in((value.start, value.stop, value.step))
        case None | bool() | int() | float() | str():
            return
        case _:
            yield from (leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor))


def is_real(tensor: Tensor) -> bool:
    return not isinstance(tensor, FakeTensor) and not is_functorch_wrapped_tensor(tensor)


def printable(func: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function whose name generated code can use: for ``x ** 2``, the tracer gets an unnamed wrapper."""
    name, module = getattr(func, "__name__", ""), getattr(func, "__module__", None)
    if module == "torch._tensor" and not hasattr(torch._tensor, name) and hasattr(torch.Tensor, name):
        return getattr(torch.Tensor, name)  # type: ignore[no-any-return]
    return func


def version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def silently_written(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    positions = SILENT_WRITES.get(func, ())
    if not positions:
        return []
    training = kwargs.get("training", args[5] if len(args) > 5 else False)
    found = [kwargs.get(name, args[i] if len(args) > i else None) for i, name in positions]
    return [tensor for tensor in found if tensor is not None] if training else []
