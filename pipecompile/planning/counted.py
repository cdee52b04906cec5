"""Numbers of microbatches, compared by their predicted steps."""

from __future__ import annotations

from dataclasses import dataclass

from pipecompile.ir.units import seconds_text


@dataclass(frozen=True)
class Count:
    """A number of microbatches and its predicted step, in seconds."""

    microbatches: int
    step: float

    def __str__(self) -> str:
        return f"{self.microbatches} take {seconds_text(self.step)}"


@dataclass(frozen=True)
class Counted:
    """The numbers that were compared.

    Attributes:
        chosen: the number of microbatches to use.
        tried: the predicted steps, by ascending number.
        one_device: predicted seconds of a step of the whole batch at once on one of the devices.
    """

    chosen: int
    tried: tuple[Count, ...]
    one_device: float

    @property
    def step(self) -> float:
        """The predicted step of the chosen number."""
        return next(it.step for it in self.tried if it.microbatches == self.chosen)

    @property
    def loses(self) -> bool:
        """Whether one device alone is predicted to be faster."""
        return self.step > self.one_device

    def __str__(self) -> str:
        others = "; ".join(str(it) for it in self.tried if it.microbatches != self.chosen)
        return (
            f"{self.chosen}, predicted to take {seconds_text(self.step)} a step ({others}); the batch at once on one "
            f"device takes {seconds_text(self.one_device)}"
        )
