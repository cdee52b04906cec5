"""Translates the user's constraints into those of a problem, or says why they cannot be met.

    pins       -> things with a stage         no_split, colocate -> groups of things

To check that pins agree, all groups are contracted. In topological order, each part must not be pinned to an earlier
stage than any of its ancestors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property

from pipecompile.errors import InfeasibleError, InputError
from pipecompile.ir.graph import Node
from pipecompile.ir.plan_options import PlanOptions
from pipecompile.partition.solver.contraction import Contraction, contract
from pipecompile.partition.solver.problem import Seat
from pipecompile.partition.stage_nodes import Placed


@dataclass(frozen=True, slots=True)
class Pin:
    """A thing, the stage that it must be in, and the module path of the pin."""

    thing: int
    stage: int
    path: str


@dataclass(frozen=True)
class ModuleConstraints:
    """Constraints on cutting a graph into ``num_stages`` stages."""

    placed: Placed
    constraints: PlanOptions
    num_stages: int

    @cached_property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """Things that must share a stage."""
        whole = [self._things(f"no_split={path!r}", path) for path in self.constraints.no_split]
        colocated = [
            tuple(thing for path in group for thing in self._things(f"colocate={group!r}", path))
            for group in self.constraints.colocate
        ]
        return (*whole, *colocated)

    @cached_property
    def pins(self) -> tuple[Pin, ...]:
        pins: dict[int, Pin] = {}
        for path, stage in self.constraints.pins.items():
            if stage >= self.num_stages:
                raise InputError(f"pins[{path!r}] = {stage}, but stages must be between 0 and {self.num_stages - 1}")
            for thing in self._things(f"pins[{path!r}]", path):
                other = pins.setdefault(thing, Pin(thing, stage, path))
                if other.stage != stage:
                    raise InfeasibleError(
                        f"{self._named(thing)} is in module {other.path!r}, pinned to stage {other.stage}, and in "
                        f"{path!r}, pinned to stage {stage}; pin parts that do not overlap"
                    )
        return tuple(pins.values())

    @property
    def least_stages(self) -> int:
        """The number of stages that must not be empty: all, or with ``max_stages`` those up to the last pin."""
        return (
            self.num_stages
            if self.constraints.max_stages is None
            else 1 + max(self.constraints.pins.values(), default=0)
        )

    def check(self) -> None:
        """Checks that the constraints do not contradict the model or each other.

        Raises:
            InputError: a path or a stage does not exist.
            InfeasibleError: constraints cannot be met; the message names the modules.
        """
        contraction = self._contracted(self.groups)
        pin_of: dict[int, Pin] = {}
        for pin in self.pins:
            other = pin_of.setdefault(contraction.atom_of[pin.thing], pin)
            if other.stage != pin.stage:
                raise InfeasibleError(
                    f"{self._pinned(other)} and {self._pinned(pin)}, but {self._named(other.thing)} and "
                    f"{self._named(pin.thing)} must share a stage (because of the model, no_split= or colocate=); pin "
                    f"both to one stage"
                )
        self._check_order(contraction, pin_of)
        self._check_stages(contraction)

    def _check_order(self, contraction: Contraction, pin_of: dict[int, Pin]) -> None:
        above: list[Pin | None] = []
        for atom, sources in enumerate(contraction.problem.predecessors):
            pins = [pin for source in sources if (pin := above[source])]
            before = max(pins, key=lambda pin: pin.stage, default=None)
            here = pin_of.get(atom)
            if before and here and here.stage < before.stage:
                raise InfeasibleError(
                    f"{self._pinned(before)} and {self._pinned(here)}, but {self._named(here.thing)} reads values "
                    f"of {self._named(before.thing)}, and values flow to later stages only; pin {here.path!r} to "
                    f"stage {before.stage} or later, or {before.path!r} to stage {here.stage} or earlier"
                )
            above.append(here or before)

    def _check_stages(self, contraction: Contraction) -> None:
        parts = len(contraction.problem)
        if self.groups and parts < self.least_stages <= len(self._contracted(()).problem):
            raise InfeasibleError(
                f"the model cannot be cut into {self.num_stages} stages: with {self.constraints} it has at most "
                f"{parts}; use fewer stages, or shorten no_split= or colocate="
            )

    def _contracted(self, groups: tuple[tuple[int, ...], ...]) -> Contraction:
        nothing = [0.0] * len(self.placed.nodes)
        return contract(nothing, self.placed.arcs, [], [Seat()], together=[*self.placed.together, *groups])

    def _things(self, option: str, path: str) -> tuple[int, ...]:
        nodes = [index for index, node in enumerate(self.placed.graph.nodes) if _is_in(node, path)]
        things = tuple(self.placed.thing_of[index] for index in nodes if index in self.placed.thing_of)
        if things:
            return things
        if nodes:
            raise InputError(
                f"{option}: {path!r} is only cheap operations, which each stage that reads them computes for itself, "
                f"so it has no stage; leave it out"
            )
        known = dict.fromkeys(path for node in self.placed.graph.nodes for path in _prefixes(node.path))
        close = ", ".join(map(repr, get_close_matches(path, known, 3)))
        hint = f"did you mean {close}?" if close else "use a path of model.named_modules()"
        raise InputError(f"{option}: no module {path!r} computes anything; {hint}")

    def _pinned(self, pin: Pin) -> str:
        return f"module {pin.path!r} is pinned to stage {pin.stage}"

    def _named(self, thing: int) -> str:
        node = self.placed.graph.nodes[self.placed.nodes[thing]]
        return f"node {node.name} ({', '.join(part for part in (node.path, node.source) if part)})"


def _is_in(node: Node, path: str) -> bool:
    return not path or node.path == path or node.path.startswith(f"{path}.")


def _prefixes(path: str) -> Iterator[str]:
    parts = path.split(".")
    return (".".join(parts[:count]) for count in range(1, len(parts) + 1))
