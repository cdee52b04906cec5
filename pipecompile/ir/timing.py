"""The seconds of a first call, by phase."""

from __future__ import annotations

from dataclasses import dataclass, fields

from pipecompile.ir.json_io import Json
from pipecompile.ir.units import seconds_text


@dataclass(frozen=True, slots=True)
class Timing(Json):
    """The seconds that a pipeline spent until its first call returned, ``compile(example_inputs=)`` included.

    The phases do not overlap: a plan that is made during a rehearsal counts as ``plan``.

    Attributes:
        capture: the traces of the model.
        divide: what runs on microbatches and what on the whole batch, experiments included.
        profile: seconds and bytes of each operation, and the links.
        plan: searches for a plan.
        split: the stages of a plan, parameters moved to their devices.
        rehearse: steps that time the stages of a plan.
        verify: the comparison with the unsplit model.
        step: the step itself.
        other: everything else, such as values of a model that had none.
    """

    capture: float = 0.0
    divide: float = 0.0
    profile: float = 0.0
    plan: float = 0.0
    split: float = 0.0
    rehearse: float = 0.0
    verify: float = 0.0
    step: float = 0.0
    other: float = 0.0

    @property
    def total(self) -> float:
        return sum(self.by_phase().values())

    def by_phase(self) -> dict[str, float]:
        """The seconds by the name of the phase, in order."""
        return {name: getattr(self, name) for name in PHASES}

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {seconds_text(seconds)}" for name, seconds in self.by_phase().items() if seconds)
        return f"{seconds_text(self.total)} ({parts})" if parts else ""


PHASES = tuple(field.name for field in fields(Timing))
