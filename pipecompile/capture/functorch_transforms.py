"""Records what functions of functions do (``torch.vmap``, ``torch.func.grad``), where the tracer cannot see functions.

Inside such a transform the model's function runs on wrapped tensors, which no graph can hold. What reaches the plain
tensors underneath are aten operations, with batching and differentiation done. These are recorded, for the time of the
transform, in place of the functions: they give the same values, and autograd differentiates them as it does functions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from pipecompile.ops.torch_internals import TorchDispatchMode, apis, eager_transforms

# Where transforms begin: attributes of torch's own modules that hold what runs one.
TRANSFORMS = (
    (apis, "vmap_impl"),
    (eager_transforms, "grad_impl"),
    (eager_transforms, "grad_and_value_impl"),
    (eager_transforms, "_vjp_with_argnums"),
    (eager_transforms, "_jvp_with_argnums"),
)


class Below(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Hands each aten operation to ``record(func, args, kwargs, run)``, which runs it."""

    def __init__(self, record: Callable[..., Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.record = record

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.record(func, args, kwargs or {}, func)


@contextmanager
def transforms_seen(below: Callable[[], Any]) -> Iterator[None]:
    """Runs each transform that begins within in the context ``below()``."""
    originals = [(module, name, getattr(module, name)) for module, name in TRANSFORMS if hasattr(module, name)]
    for module, name, original in originals:
        setattr(module, name, _within(below, original))
    try:
        yield
    finally:
        for module, name, original in originals:
            setattr(module, name, original)


def _within(below: Callable[[], Any], original: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with below():
            return original(*args, **kwargs)

    return run
