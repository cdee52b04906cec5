"""Numbers of microbatches, compared by their predicted steps."""

from __future__ import annotations

from dataclasses import dataclass

from pipecompile.ir.units import seconds_text

PER_RANK = (1, 2, 4, 8)  # microbatches per rank that are tried, beside one in all


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


def numbers(batch: int, ranks: int, usual: int, most: int) -> list[int]:
    """The numbers of microbatches to compare, ascending, the usual one among them.

    Args:
        batch: rows of the batch. Only numbers that divide it are tried, so that microbatches are alike.
        ranks: of the plan.
        usual: the number without a comparison.
        most: no larger numbers are tried.
    """
    wanted = {1, *(each * ranks for each in PER_RANK)}
    return sorted({usual, *(n for n in wanted if n <= min(batch, most) and batch % n == 0)})
