"""What a user asks of a plan beyond speed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipecompile.errors import InputError
from pipecompile.ir.json_io import Json


@dataclass(frozen=True)
class Wishes(Json):
    """Bounds on a plan, each honoured, or refused with the reason. A path names a module and all modules in it.

    Invariants, checked by ``validate``:
    1. stages are counted from 0, and at least one is allowed;
    2. a group of modules to keep together has two or more.
    """

    pins: Mapping[str, int] = field(default_factory=dict)  # path -> the stage that computes all of that module
    uncut: Sequence[str] = ()  # paths of modules that lie in one stage each, no matter in which
    together: Sequence[Sequence[str]] = ()  # groups of paths of modules that share a stage
    most_stages: int | None = None  # the plan may have fewer, where more would not be faster

    def __post_init__(self) -> None:
        object.__setattr__(self, "pins", dict(self.pins))
        object.__setattr__(self, "uncut", _paths("uncut", self.uncut))
        object.__setattr__(self, "together", tuple(_paths("a group of together", group) for group in self.together))
        self.validate()

    def validate(self) -> None:
        """Raises ``InputError`` at the first invariant that does not hold."""
        for path, stage in self.pins.items():
            if not isinstance(stage, int) or stage < 0:
                raise InputError(f"pins[{path!r}] = {stage!r}: stages are counted from 0")
        for group in self.together:
            if len(group) < 2:
                raise InputError(f"together has the group {group!r}; a group takes two or more modules")
        if self.most_stages is not None and (not isinstance(self.most_stages, int) or self.most_stages < 1):
            raise InputError(f"most_stages={self.most_stages!r}: a plan has at least one stage")

    def __str__(self) -> str:
        lines = [f"{path!r} in stage {stage}" for path, stage in self.pins.items()]
        lines += [f"{path!r} uncut" for path in self.uncut]
        lines += [f"{', '.join(map(repr, group))} together" for group in self.together]
        lines += [f"at most {self.most_stages} stages"] * (self.most_stages is not None)
        return "; ".join(lines) or "no wishes"


def _paths(name: str, paths: Sequence[Any]) -> tuple[str, ...]:
    if isinstance(paths, str) or not all(isinstance(path, str) for path in paths):
        raise InputError(f"{name} takes a list of module paths, not {paths!r}")
    return tuple(paths)


NO_WISHES = Wishes()
