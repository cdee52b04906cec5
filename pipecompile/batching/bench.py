"""A trace with inputs of some rows, on which a part of it is run by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from pipecompile.capture import Captured
from pipecompile.capture.evaluate import Evaluator
from pipecompile.randomness import undropped


class Bench:
    """Runs parts of a trace on so many rows of the sample, which is repeated where it has fewer."""

    def __init__(self, captured: Captured, rows: int) -> None:
        self.captured = captured
        self.rows = rows
        batch = captured.call.batch or 1
        picked = torch.arange(rows) % batch
        batched = captured.call.batched
        tensors = {name: tensor.detach() for name, tensor in captured.call.tensors.items()}
        self.inputs = {
            name: tensor[picked.to(tensor.device)] if name in batched else tensor for name, tensor in tensors.items()
        }
        self.evaluator = self._evaluator()

    def value(self, node: fx.Node) -> Any:
        """The value of a node for the sample."""
        return self.evaluator.value(node)

    def run(self, outputs: Sequence[fx.Node], values: Mapping[fx.Node, Any], seed: int = 0) -> dict[fx.Node, Any]:
        """The values of nodes, from those of others; random numbers are drawn from the seed.

        Without dropout, which drops entries of each sample whatever the others are, and would hide what else happens.
        """
        evaluator = self._evaluator()
        evaluator.known.update({n: v.clone() if isinstance(v, Tensor) else v for n, v in values.items()})
        state = torch.get_rng_state()
        torch.manual_seed(seed)
        try:
            return {n: evaluator.value(n) for n in outputs}
        finally:
            torch.set_rng_state(state)

    def _evaluator(self) -> Evaluator:
        tensors = self.captured.tensors
        return Evaluator(
            self.inputs, tensors.__getitem__, lambda target: self.captured.leaf(target, tensors), call=undropped
        )
