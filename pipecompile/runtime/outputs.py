"""The outputs of a program over several processes: each joins those of its stages, and takes those of others."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from pipecompile.runtime.lane import Values


@dataclass(frozen=True)
class Outputs:
    """The outputs of the stages in one call.

    Attributes:
        join: joins outputs that this process makes from those of the microbatches, by name.
        makers: the rank that makes each output.
        wanted: the outputs whose values all processes need; of the others they get a tensor on the meta device.
        found: those that this process has so far.
    """

    join: Callable[[Sequence[str]], Mapping[str, Tensor]]
    makers: Mapping[str, int]
    wanted: Container[str]
    found: dict[str, Tensor] = field(default_factory=dict)

    def made(self, rank: int) -> Values:
        """The outputs that a rank of this process makes, as the others get them."""
        names = self._of(rank)
        self.found.update(made := self.join(names))
        return tuple(made[name] if name in self.wanted else _described(made[name]) for name in names)

    def take(self, rank: int, values: Values) -> None:
        """Takes the outputs that another rank makes."""
        pairs = zip(self._of(rank), values, strict=True)
        self.found.update({name: value for name, value in pairs if value is not None})

    def _of(self, rank: int) -> list[str]:
        return [name for name, maker in self.makers.items() if maker == rank]


def _described(value: Tensor) -> Tensor:
    return value.detach().to("meta").requires_grad_(value.requires_grad)
