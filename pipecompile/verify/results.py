"""The results of comparing a split model with the unsplit model, as a table.

Each tensor that both models computed is a ``Difference``: *equal* bit for bit, *rounding* if its dtype and another
order of additions explain the difference, else *different*.
"""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from pipecompile.errors import ExactnessError
from pipecompile.ir.units import names_text
from pipecompile.render.fitted import Fitted

Kind = Literal["output", "gradient", "input gradient", "buffer", "parameter", "attribute"]
WIDTH = 118  # columns of the printed table
MOST_NOTES = 6  # lines per topic
ROUNDING_ITSELF = 0.1  # of a tensor's largest value: if rounding explains more, the tensor is nothing but rounding


@dataclass(frozen=True, slots=True)
class Difference:
    """One tensor or Python value of both models.

    ``largest`` is infinite if the two cannot be subtracted: one is missing, has another shape, or is not a number.
    """

    kind: Kind
    name: str
    largest: float  # the largest absolute difference of two elements
    scale: float  # the largest magnitude in the unsplit model's tensor
    allowed: float  # the tolerance: the largest difference that rounding explains
    seen: str = ""  # a description of both, if they cannot be subtracted

    @property
    def verdict(self) -> Literal["equal", "rounding", "different"]:
        """Whether the two are equal, differ by rounding, or are different."""
        if self.largest == 0:
            return "equal"
        return "rounding" if self.largest <= self.allowed else "different"

    @property
    def relative(self) -> float:
        """The largest difference over the largest magnitude of the unsplit model's tensor."""
        return self.largest / self.scale if self.scale else math.copysign(math.inf, self.largest) * (self.largest > 0)

    @property
    def amount(self) -> str:
        """The difference, in words."""
        return self.seen or f"by {self.largest:.3g} where values go up to {self.scale:.3g}"

    def __str__(self) -> str:
        return f"{self.kind} {self.name!r} {'is' if self.seen else 'differs'} {self.amount}"


@dataclass(frozen=True, slots=True)
class Check:
    """One step of both models on the same inputs."""

    mode: Literal["train", "eval"]
    inputs: str  # "fresh: x [8, 64]"
    microbatches: int  # 0 if the split model was not run
    against: str  # what the unsplit model ran on: "the whole batch"
    differences: tuple[Difference, ...] = ()
    failure: str = ""  # what the split model raised, but the unsplit model did not
    left_out: str = ""  # why the inputs could not be compared

    @property
    def differing(self) -> tuple[Difference, ...]:
        """The differences larger than rounding."""
        return tuple(it for it in self.differences if it.verdict == "different")

    @property
    def verdict(self) -> str:
        """The verdict as printed in the table."""
        if self.left_out:
            return "left out"
        if self.failure:
            return "FAILED"
        if self.differing:
            return "DIFFERENT"
        return "bit-equal" if all(it.verdict == "equal" for it in self.differences) else "rounding"


@dataclass(frozen=True, slots=True)
class Proof:
    """The comparison of a capture's first call, before it trains.

    Attributes:
        rows: number of rows that were run, in microbatches of ``counts`` rows.
        of: number of rows of the whole batch.
        note: what could not be compared, or was compared in another way.
    """

    rows: int
    counts: tuple[int, ...]
    differences: tuple[Difference, ...] = ()
    of: int = 0
    seconds: float = 0.0
    note: str = ""

    def __str__(self) -> str:
        kinds = Counter(it.kind for it in self.differences)
        what = ", ".join(f"{count} {kind}{'s' * (count > 1)}" for kind, count in kinds.items())
        nothing = [it for it in self.differences if it.verdict == "rounding" and it.relative > ROUNDING_ITSELF]
        told = (it.relative for it in self.differences if math.isfinite(it.relative) and it not in nothing)
        worst = max(told, default=0.0)
        how = "bit for bit" if worst == 0 else f"within {worst:.1e} of their largest value"
        if nothing:
            how += f", but for {names_text([it.name for it in nothing])}, zero up to rounding in both models"
        cut = f" in microbatches of {', '.join(map(str, self.counts))}" if len(self.counts) > 1 else ""
        compared = f"{self.rows} of {self.of} rows{cut}: {what} equal {how}" if what else ""
        return f"{'; '.join(filter(None, [compared, self.note]))}; took {self.seconds:.2f} s"


@dataclass(frozen=True, slots=True)
class Row:
    """The worst gradient of a group of parameters over all checks."""

    group: str
    parameters: int
    worst: Difference
    check: int  # number of the check, from 1

    @property
    def verdict(self) -> str:
        """The verdict as printed in the table."""
        return {"equal": "bit-equal", "rounding": "rounding", "different": "DIFFERENT"}[self.worst.verdict]


@dataclass(frozen=True)
class Verification:
    """All checks, and notes on the captures that were run, by topic."""

    checks: tuple[Check, ...]
    notes: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def exact(self) -> bool:
        """Whether at least one check compared values, and no value differs by more than rounding."""
        return any(it.differences for it in self.checks) and not any(it.failure or it.differing for it in self.checks)

    @property
    def bit_equal(self) -> bool:
        """Whether all values are equal bit for bit."""
        return self.exact and all(it.verdict in ("bit-equal", "left out") for it in self.checks)

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """One row per group of parameters, in the model's order."""
        groups: dict[str, dict[str, list[tuple[int, Difference]]]] = {}
        for number, check in enumerate(self.checks, 1):
            for it in check.differences:
                if it.kind == "gradient":
                    groups.setdefault(group_of(it.name), {}).setdefault(it.name, []).append((number, it))
        return tuple(_row(group, parameters) for group, parameters in groups.items())

    def raise_if_different(self) -> None:
        """Raises ``ExactnessError`` with every difference, unless the split model is exact."""
        if self.exact:
            return
        lines = [line for number, check in enumerate(self.checks, 1) for line in _faults(number, check)]
        raise ExactnessError("\n".join(lines) or "nothing could be compared:\n" + "\n".join(self._left_out()))

    def _left_out(self) -> list[str]:
        return [f"check {n} left out: {it.left_out}" for n, it in enumerate(self.checks, 1) if it.left_out]

    def __rich__(self) -> RenderableType:
        faults = [line for number, check in enumerate(self.checks, 1) for line in _faults(number, check)]
        notes = [f"{topic}: {line}" for topic, lines in self.notes.items() for line in _limited(lines)]
        verdict = "exact: " + ("bit for bit" if self.bit_equal else "nothing differs by more than rounding")
        end = Text(verdict, "bold green") if self.exact else Text("NOT exact", "bold red")
        tables = [Fitted(_checks(self.checks)), *([Fitted(_groups(self.rows))] if self.rows else [])]
        lines = [Text(line, "red") for line in faults] + [Text(line) for line in [*self._left_out(), *notes]]
        return Group(*tables, *lines, end)

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=WIDTH, no_color=True)
        console.print(self)
        return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())  # type: ignore[attr-defined]


def group_of(parameter: str) -> str:
    """The module that a parameter is listed under: up to the first number, as in ``h.0``, else its own module."""
    parts = parameter.split(".")
    for index, part in enumerate(parts[:-1]):
        if part.isdigit():
            return ".".join(parts[: index + 1])
    return ".".join(parts[:-1]) or parameter


def _limited(lines: Sequence[str]) -> Sequence[str]:
    return lines if len(lines) <= MOST_NOTES else [*lines[:MOST_NOTES], f"and {len(lines) - MOST_NOTES} more"]


def _row(group: str, parameters: Mapping[str, Sequence[tuple[int, Difference]]]) -> Row:
    found = [it for each in parameters.values() for it in each]
    number, worst = max(found, key=lambda it: (it[1].verdict == "different", it[1].relative))
    return Row(group, len(parameters), worst, number)


def _faults(number: int, check: Check) -> Iterator[str]:
    if check.failure:
        yield f"check {number}: the unsplit model runs, but the split model raises {check.failure}"
    for it in check.differing:
        yield f"check {number}: {it}"


def _table(*headings: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for heading in headings:
        right = heading in ("#", "params", "parts", "outputs", "gradients", "buffers", "largest", "of", "check")
        table.add_column(heading, justify="right" if right else "left", overflow="fold", no_wrap=right)
    return table


def _checks(checks: Sequence[Check]) -> Table:
    table = _table("#", "mode", "inputs", "parts", "unsplit model on", "outputs", "gradients", "buffers", "verdict")
    for number, it in enumerate(checks, 1):
        cells = (_largest(it, "output"), _largest(it, "gradient", "input gradient"), _largest(it, "buffer"))
        table.add_row(str(number), it.mode, it.inputs, str(it.microbatches), it.against, *cells, it.verdict)
    return table


def _largest(check: Check, *kinds: Kind) -> str:
    found = [it for it in check.differences if it.kind in kinds]
    if not found:
        return "-"
    worst = max(found, key=lambda it: it.relative)
    return "equal" if worst.largest == 0 else f"{worst.relative:.1e}"


def _groups(rows: Sequence[Row]) -> Table:
    table = _table("parameters", "params", "largest", "of", "worst", "check", "verdict")
    for it in rows:
        if it.worst.largest == 0:
            table.add_row(it.group, str(it.parameters), "0", "", "", "", it.verdict)
            continue
        numbers = (f"{it.worst.largest:.1e}", f"{it.worst.scale:.1e}")
        worst = it.worst.name.removeprefix(f"{it.group}.")
        table.add_row(it.group, str(it.parameters), *numbers, worst, str(it.check), it.verdict)
    return table
