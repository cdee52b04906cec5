"""What Python reads out of tensors during a trace: computed for real where it depends on inputs alone, and guarded.

``if mask.all():`` asks for a value that a fake tensor does not have. Where the value comes from the model's inputs and
buffers only, the recorded nodes that lead to it are run on the real sample inputs, the trace takes that branch, and the
read becomes a guard that is checked at the start of each step. Where it comes from parameters or activations there is
no answer before the step runs: the caller hears so.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from pipecompile.capture.purity import is_random
from pipecompile.errors import CaptureError

READS: frozenset[Callable[..., Any]] = frozenset(
    {
        Tensor.item, Tensor.tolist, Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__,
        Tensor.__contains__, Tensor.__format__, Tensor.numpy, Tensor.__array__, Tensor.is_nonzero,
        Tensor.equal, Tensor.allclose, torch.equal, torch.allclose, torch.is_nonzero,
    }
)  # fmt: skip


class Values:
    """Answers reads during one trace.

    Args:
        inputs: real tensors by placeholder name.
        attributes: gives the real tensor for a ``get_attr`` name.
        is_parameter: whether such a name is a parameter, which changes as training goes on.
    """

    def __init__(
        self,
        inputs: Mapping[str, Any],
        attributes: Callable[[str], Tensor],
        is_parameter: Callable[[str], bool],
    ) -> None:
        self.inputs = inputs
        self.attributes = attributes
        self.is_parameter = is_parameter
        self.known: dict[fx.Node, Any] = {}
        self.reads: list[tuple[fx.Node, Any]] = []

    def read(self, node: fx.Node) -> Any:
        """The real value of a read, which becomes a guard.

        Raises:
            CaptureError: the value depends on parameters or activations, or is random.
        """
        with torch._C.DisableTorchFunction(), torch.utils._python_dispatch._disable_current_modes(), torch.no_grad():
            value = self._value(node)
        self.reads.append((node, value))
        return value

    def _value(self, node: fx.Node) -> Any:
        if node not in self.known:
            self.known[node] = self._compute(node)
        return self.known[node]

    def _compute(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return self.inputs[node.name]
        if node.op == "get_attr":
            if self.is_parameter(str(node.target)):
                raise CaptureError(
                    f"the model's Python reads a value that depends on the parameter {node.target!r}, which changes as "
                    f"training goes on; keep the module whole with leaf_modules="
                )
            return self.attributes(str(node.target)).clone()
        if is_random(node):
            raise CaptureError(f"the model's Python reads a random value ({node.name}); keep the module whole")
        args: Any = fx.map_arg(node.args, self._value)
        kwargs: Any = fx.map_arg(node.kwargs, self._value)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert callable(node.target)
        if node.target is operator.getitem:
            return args[0][args[1]]
        return node.target(*args, **kwargs)
