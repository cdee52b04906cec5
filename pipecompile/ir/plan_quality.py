"""How close a plan is known to be to the best one."""

from __future__ import annotations

from dataclasses import dataclass, field

from pipecompile.ir.units import seconds_text

SLACK = 1e-9  # relative; rounding when the same numbers are added in another order


@dataclass(frozen=True, slots=True)
class Quality:
    """The bottleneck of a plan, a lower bound on that of any plan, and the time of the search."""

    bottleneck: float  # seconds per microbatch of the busiest rank, communication included
    lower_bound: float  # seconds; no plan has a smaller bottleneck
    seconds: float = field(compare=False)  # CPU seconds of the search

    @property
    def gap(self) -> float:
        """How far the bottleneck is above the bound, relative to the bound."""
        return self.bottleneck / self.lower_bound - 1 if self.lower_bound else self.bottleneck

    @property
    def proven(self) -> bool:
        """Whether the plan is known to be optimal."""
        return self.gap <= SLACK

    def __str__(self) -> str:
        known = "optimal" if self.proven else f"at most {100 * self.gap:.2g}% above optimal"
        return (
            f"bottleneck {seconds_text(self.bottleneck)} per microbatch ({known}); "
            f"search took {seconds_text(self.seconds)} of CPU time"
        )


def known(quality: Quality | None) -> str:
    """The quality in words, also if it is not known."""
    if quality:
        return str(quality)
    return "gap to the optimum unknown: only some stages recompute activations, or the plan was rehearsed"
