"""What Python reads out of tensors during a trace: computed for real where it depends on inputs alone, and guarded.

``if mask.all():`` asks for a value that a fake tensor does not have. Where the value comes from the model's inputs and
buffers only, the recorded nodes that lead to it are run on the real sample inputs, the trace takes that branch, and the
read becomes a guard that is checked at the start of each step. Where it comes from parameters or activations there is
no answer before the step runs: the module around it must be kept whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from pipecompile.capture.evaluate import Evaluator
from pipecompile.capture.purity import is_random
from pipecompile.errors import DependsOnData

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
        inputs: real tensors of the whole batch, by placeholder name.
        attribute: gives the real tensor for a ``get_attr`` name.
        is_parameter: whether such a name is a parameter, which changes as training goes on.
    """

    def __init__(
        self,
        inputs: Mapping[str, Tensor],
        attribute: Callable[[str], Tensor],
        is_parameter: Callable[[str], bool],
    ) -> None:
        self.evaluator = Evaluator(inputs, attribute, self._no_module, self._check)
        self.is_parameter = is_parameter
        self.reads: list[tuple[fx.Node, Any]] = []

    def read(self, node: fx.Node) -> Any:
        """The real value of a read, which becomes a guard.

        Raises:
            DependsOnData: the value depends on parameters or activations, or is random.
        """
        value = self.evaluator.value(node)
        self.reads.append((node, value))
        return value

    def _check(self, node: fx.Node) -> None:
        if node.op == "get_attr" and self.is_parameter(str(node.target)):
            raise DependsOnData(
                f"the model's Python reads a value that depends on the parameter {node.target!r}, which changes as "
                f"training goes on"
            )
        if is_random(node):
            raise DependsOnData(f"the model's Python reads a random value ({node.name})")

    def _no_module(self, path: str) -> Callable[..., Any]:
        raise DependsOnData(f"the model's Python reads what module {path!r}, which is kept whole, has computed")
