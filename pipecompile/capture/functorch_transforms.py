"""Records function transforms (``torch.vmap``, ``torch.func.grad``), inside which the tracer cannot see functions.

Inside a transform the model's function runs on wrapped tensors, which a graph cannot hold. The plain tensors below them
get aten operations, with batching and differentiation already applied. During the transform these are recorded instead
of functions: they give the same values, and autograd can differentiate them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from pipecompile.ops.torch_internals import TorchDispatchMode, apis, eager_transforms

# Entry points of transforms: attributes of torch's own modules.
TRANSFORMS = (
    (apis, "vmap_impl"),
    (eager_transforms, "grad_impl"),
    (eager_transforms, "grad_and_value_impl"),
    (eager_transforms, "_vjp_with_argnums"),
    (eager_transforms, "_jvp_with_argnums"),
)


class Below(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Passes each aten operation to ``record(func, args, kwargs, run)``, which runs it."""

    def __init__(self, record: Callable[..., Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.record = record

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.record(func, args, kwargs or {}, func)


@contextmanager
def transforms_seen(below: Callable[[], Any]) -> Iterator[None]:
    """Runs each transform in the context ``below()``."""
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
