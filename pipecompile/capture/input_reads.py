"""What Python reads out of tensors during a trace: computed for real where it depends on inputs alone, and guarded.

``if mask.all():`` asks for a value that a fake tensor does not have. Where the value comes from the model's inputs and
buffers only, the recorded nodes that lead to it are run on the real sample microbatches, the trace takes that branch,
and the read becomes a guard that is checked at the start of each step. Where it comes from parameters or activations
there is no answer before the step runs: the module around it must be kept whole.
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
    """The one value of a read that every microbatch goes by.

    It is theirs where they agree. Where they do not, the unsplit model has gone by the whole batch's: so do they for a
    yes or no, and for the largest or smallest of all. Another number (a count) is a microbatch's own.

    Raises:
        DependsOnData: there is no such value.
    """
    if all(same(part, parts[0]) for part in parts[1:]):
        return parts[0]
    if extreme or all(isinstance(part, bool) for part in parts):
        return whole()
    other = next(part for part in parts if not same(part, parts[0]))
    raise DependsOnData(f"the model's Python reads {parts[0]} from one microbatch and {other} from another")


def _is_extreme(read: fx.Node) -> bool:
    """Whether a read is a function of the largest or smallest entry of a tensor alone."""
    node = read
    while len(node.all_input_nodes) == 1:
        (node,) = node.all_input_nodes
        value = node.meta.get("val")
        if function_of(node.target) in _EXTREMES and isinstance(value, Tensor) and value.ndim == 0:
            return True
    return False


class Read(NamedTuple):
    """A value that Python has read, and whether it is that of the largest or smallest entry of all."""

    node: fx.Node
    value: Any
    extreme: bool


class Values:
    """Answers reads during one trace.

    Args:
        whole: real tensors of the whole batch, by placeholder name.
        parts: those of each microbatch.
        attribute: gives the real tensor for a ``get_attr`` name.
        is_parameter: whether such a name is a parameter, which changes as training goes on.
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
        """The real value of a read, which becomes a guard.

        Raises:
            DependsOnData: the value depends on parameters or activations, is random, or differs between microbatches.
        """
        extreme = _is_extreme(node)
        value = settled([part.value(node) for part in self.parts], lambda: self.whole.value(node), extreme)
        self.reads.append(Read(node, value, extreme))
        return value

    def _check(self, node: fx.Node) -> None:
        if node.op == "get_attr" and self.is_parameter(str(node.target)):
            raise DependsOnData(
                f"the model's Python reads a value that depends on the parameter {node.target!r}, which changes as "
                f"training goes on"
            )
        if is_random(node) or node.target is number:
            raise DependsOnData(f"the model's Python reads a random value ({node.name})")

    def _no_module(self, path: str) -> Callable[..., Any]:
        raise DependsOnData(f"the model's Python reads what module {path!r}, which is kept whole, has computed")
