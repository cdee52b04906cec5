"""Values that Python reads from tensors during a trace: computed if they depend only on inputs, and guarded.

``if mask.all():`` needs a value that a fake tensor does not have. If the value comes only from the model's inputs and
buffers, the recorded nodes that lead to it are run on the real sample microbatches, the trace takes that branch, and
the read becomes a guard that is checked at the start of each step. If it comes from parameters or activations, it is
not known before the step runs, and the module around it must be kept whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.fx as fx
from torch import Tensor

from pipecompile.capture.evaluate import Evaluator
from pipecompile.capture.purity import is_random
from pipecompile.capture.state.fingerprints import same
from pipecompile.errors import DependsOnData
from pipecompile.ops.functional import number
from pipecompile.ops.operators import function_of, named

_EXTREMES = named("max amax min amin")

READS: frozenset[Callable[..., Any]] = frozenset(
    {
        Tensor.item, Tensor.tolist, Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__,
        Tensor.__contains__, Tensor.__format__, Tensor.numpy, Tensor.__array__, Tensor.is_nonzero,
        Tensor.equal, Tensor.allclose, torch.equal, torch.allclose, torch.is_nonzero,
    }
)  # fmt: skip


def settled(parts: Sequence[Any], whole: Callable[[], Any], extreme: bool) -> Any:
    """Returns the one value of a read that is valid for every microbatch.

    It is the value of the microbatches if they agree. If they do not, booleans and extremes take the value of the whole
    batch, which the unsplit model uses. Any other number (a count) belongs to one microbatch.

    Args:
        parts: The value in each microbatch.
        whole: Computes the value in the whole batch.
        extreme: Whether the value is the largest or smallest entry of a tensor.

    Raises:
        DependsOnData: No value is valid for every microbatch.
    """
    if all(same(part, parts[0]) for part in parts[1:]):
        return parts[0]
    if extreme or all(isinstance(part, bool) for part in parts):
        return whole()
    other = next(part for part in parts if not same(part, parts[0]))
    raise DependsOnData(f"the model's Python reads {parts[0]} from one microbatch and {other} from another")


def _is_extreme(read: fx.Node) -> bool:
    """Whether a read depends only on the largest or smallest entry of a tensor."""
    node = read
    while len(node.all_input_nodes) == 1:
        (node,) = node.all_input_nodes
        value = node.meta.get("val")
        if function_of(node.target) in _EXTREMES and isinstance(value, Tensor) and value.ndim == 0:
            return True
    return False


class Read(NamedTuple):
    """A value that Python read, and whether it is that of the largest or smallest entry of a tensor."""

    node: fx.Node
    value: Any
    extreme: bool


class Values:
    """Answers reads during one trace.

    Args:
        whole: Real tensors of the whole batch, by placeholder name.
        parts: Real tensors of each microbatch, by placeholder name.
        attribute: Returns the real tensor for a ``get_attr`` name.
        is_parameter: Whether a ``get_attr`` name is a parameter, which training changes.
    """

    def __init__(
        self,
        whole: Mapping[str, Tensor],
        parts: Sequence[Mapping[str, Tensor]],
        attribute: Callable[[str], Tensor],
        is_parameter: Callable[[str], bool],
    ) -> None:
        make = partial(Evaluator, attribute=attribute, module=self._no_module, check=self._check)
        self.whole, self.parts = make(whole), [make(part) for part in parts]
        self.is_parameter = is_parameter
        self.reads: list[Read] = []

    def read(self, node: fx.Node) -> Any:
        """Returns the real value of a read, which becomes a guard.

        Raises:
            DependsOnData: The value depends on parameters or activations, is random, or differs between microbatches.
        """
        extreme = _is_extreme(node)
        value = settled([part.value(node) for part in self.parts], lambda: self.whole.value(node), extreme)
        self.reads.append(Read(node, value, extreme))
        return value

    def _check(self, node: fx.Node) -> None:
        if node.op == "get_attr" and self.is_parameter(str(node.target)):
            raise DependsOnData(
                f"the model's Python reads a value that depends on the parameter {node.target!r}, which training "
                f"changes"
            )
        if is_random(node) or node.target is number:
            raise DependsOnData(f"the model's Python reads a random value ({node.name})")

    def _no_module(self, path: str) -> Callable[..., Any]:
        raise DependsOnData(f"the model's Python reads a value computed by module {path!r}, which is kept whole")
