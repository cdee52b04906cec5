"""Where NaN comes from, in torch's anomaly mode: ``torch.autograd.detect_anomaly``, or ``set_detect_anomaly(True)``.

As in an unsplit model, a backward function that returns NaN is an error. torch names the function, and warns with the
stack of its forward, which in a stage is generated code. So the functions of a stage are watched here, and the error
names the module and the line. If the forward has made NaN before, or received it, the error says so too, and what makes
the first NaN of a stage warns at once, since it may be in another process than the backward that raises.

The mode is one of the process, so the threads of ranks need not enter it.
"""

from __future__ import annotations

import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode

from pipecompile.capture.origin import Origin
from pipecompile.errors import ExecutionError
from pipecompile.ops.torch_internals import tree_leaves
from pipecompile.runtime.split import Stage

NOTE = "pipecompile: NaN in the forward"  # in the metadata of a result's backward function
FRAME = re.compile(r'File "[^"]*eval_with_key[^"]*", line \d+, in \w+\n\s*(\w+)\s*(?::[^=]*)?=')


def looks_for_nan() -> bool:
    """Whether the mode is on, and looks for NaN."""
    return torch.is_anomaly_enabled() and torch.is_anomaly_check_nan_enabled()


def watch_backward(results: Iterable[Tensor], origins: Mapping[str, Origin]) -> None:
    """In the mode, makes the first function that returns NaN in the backward of some results say where it is from.

    Args:
        origins: of the nodes of the generated code that has computed the results.
    """
    if not looks_for_nan():
        return
    seen, left = set[Any](), list[Any](result.grad_fn for result in results if result.grad_fn is not None)
    notes = [note for function in left if (note := function.metadata.get(NOTE))]
    while left:
        function = left.pop()
        if function is None or function in seen:
            continue
        seen.add(function)
        left += [further for further, _ in function.next_functions]
        if not hasattr(function, "variable"):  # of a leaf, which accumulates what it gets
            function.register_hook(_refusing(function, origins, notes))


def refuse_nan(gradients: Sequence[Tensor], name_of: Callable[[int], str]) -> None:
    """In the mode, raises ``ExecutionError`` if a gradient that a call has computed before its backward is NaN.

    Args:
        name_of: names what has the gradient, by its position.
    """
    if not looks_for_nan():
        return
    place = next((place for place, gradient in enumerate(gradients) if _has_nan(gradient)), None)
    if place is not None:
        raise ExecutionError(
            f"the gradient of {name_of(place)!r} is NaN, but no function of a stage was seen to return NaN: a call "
            f"with a loss runs its backwards at once, before loss.backward(); make the call, too, under "
            f"torch.autograd.detect_anomaly()"
        )


@contextmanager
def watched_forward(stage: Stage, arguments: Sequence[Any]) -> Iterator[list[Tensor]]:
    """Warns of the first function of a stage's forward that makes NaN, and notes it for the backward.

    Yields:
        A list for the results, to be filled.
    """
    results: list[Tensor] = []
    received = _any_nan(arguments)
    with nullcontext() if stage.backend else _FirstNaN(stage.origins) as found:  # a mode would compile it again
        yield results
    if received:
        note = "its stage had received NaN, of which a warning of another stage says where it was made"
    elif _any_nan(results):
        where = f"{found.function} in {found.where}" if found and found.where else stage.modules
        note = f"the forward had made NaN before, by {where}"
        warnings.warn(f"stage {stage.index}: the forward makes NaN, by {where}", stacklevel=2)
    else:
        return
    functions: list[Any] = [result.grad_fn for result in results if result.grad_fn is not None]
    for function in functions:
        function.metadata[NOTE] = note


class _FirstNaN(TorchFunctionMode):
    """Notes the first function that returns NaN and has got none."""

    def __init__(self, origins: Mapping[str, Origin]) -> None:
        super().__init__()
        self.origins = origins
        self.function = self.where = ""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if not self.where and _any_nan(result) and not _any_nan((args, kwargs)):
            self.function = getattr(function, "__name__", str(function))
            self.where = str(self._origin() or "the stage")
        return result

    def _origin(self) -> Origin | None:
        """Of the node whose code runs."""
        frame = sys._getframe(2)
        while frame is not None:
            if "eval_with_key" in frame.f_code.co_filename:
                return _origin_in("".join(traceback.format_stack(frame, limit=1)), self.origins)
            frame = frame.f_back  # type: ignore[assignment]
        return None


def _refusing(function: Any, origins: Mapping[str, Origin], notes: Sequence[str]) -> Callable[[Any, Any], None]:
    """A hook that raises if a backward function has returned NaN, as torch does next."""

    def hook(returned: Sequence[Tensor | None], _: object) -> None:
        for number, gradient in enumerate(returned):
            if gradient is not None and _has_nan(gradient):
                where = _origin_in("".join(function.metadata.get("traceback_", ())), origins)
                said = f"Function {function.name()!r} returned nan values in its {number}th output"
                of = f"it is the backward of {where}" if where else ""
                raise RuntimeError("; ".join(filter(None, (said, of, *dict.fromkeys(notes)))))

    return hook


def _origin_in(stack: str, origins: Mapping[str, Origin]) -> Origin | None:
    """Of the innermost node in a formatted stack that is known."""
    nodes = [match[1] for match in FRAME.finditer(stack)]
    return next((origins[node] for node in reversed(nodes) if node in origins), None)


def _any_nan(values: object) -> bool:
    return any(isinstance(value, Tensor) and _has_nan(value) for value in tree_leaves(values))


def _has_nan(tensor: Tensor) -> bool:
    if tensor.is_meta or not (tensor.is_floating_point() or tensor.is_complex()):
        return False
    if isinstance(tensor, DTensor):
        tensor = tensor.to_local()  # to look at all of it would wait for other processes
    with torch.no_grad():
        return bool((tensor.coalesce().values() if tensor.is_sparse else tensor).isnan().any())
