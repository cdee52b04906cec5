"""How good a plan is known to be."""

from __future__ import annotations

from dataclasses import dataclass, field

SLACK = 1e-9  # relative; the same numbers, added in another order


@dataclass(frozen=True, slots=True)
class Quality:
    """The predicted pace of a plan, the pace that no plan can beat, and what it took to know this."""

    bottleneck: float  # seconds of the busiest stage for one microbatch, communication included
    lower_bound: float  # seconds that no plan can beat
    seconds: float = field(compare=False)  # CPU seconds that the search took

    @property
    def gap(self) -> float:
        """How much longer the busiest stage takes than the bound, relative to the bound."""
        return self.bottleneck / self.lower_bound - 1 if self.lower_bound else self.bottleneck

    @property
    def proven(self) -> bool:
        """Whether no plan is better."""
        return self.gap <= SLACK

    def __str__(self) -> str:
        known = "no plan is better" if self.proven else f"at most {100 * self.gap:.2g}% above the best plan"
        return f"busiest stage {self.bottleneck:.4g} s a microbatch; {known}; searched {self.seconds:.2g} s"


def known(quality: Quality | None) -> str:
    """What to say of a plan that was searched for, or was not."""
    return str(quality) if quality else "its gap to the best is not known: some stages compute again, or were rehearsed"
