"""The seconds of a stage whose backward is split in two: gradients of inputs, and those of weights."""

from __future__ import annotations

from dataclasses import dataclass, field

from pipecompile.ir.graph import Cost


@dataclass(frozen=True, slots=True)
class Halves:
    """The seconds of a stage per microbatch if its backward is split, on a device of speed 1.

    Attributes:
        forward, backward, weights: of F, of B and of W.
        fixed: the part of F, and of B and W, that does not depend on the sizes of tensors.
    """

    forward: float
    backward: float
    weights: float
    fixed: Cost = field(default_factory=Cost)

    @staticmethod
    def of(cost: Cost, weight_part: float) -> Halves:
        """A backward of which W takes a part, and nothing else changes."""
        return Halves(cost.forward, (1 - weight_part) * cost.backward, weight_part * cost.backward)

    @property
    def cost(self) -> Cost:
        """The seconds of F, and of B and W together."""
        return Cost(self.forward, self.backward + self.weights)

    def over(self, speed: float) -> Halves:
        """The same on a device of some speed."""
        fixed = Cost(self.fixed.forward / speed, self.fixed.backward / speed)
        return Halves(self.forward / speed, self.backward / speed, self.weights / speed, fixed)
