"""Stages with their costs, read from what ``plan --json`` printed, or from a table (CSV) that people write.

    stage,forward,backward,parameter_bytes,saved_bytes,bytes_out
    0,0.0012,0.0024,270532608,114294784,786432
    1,0.0011,0.0022,113246208,113246208,0

Seconds and bytes are of one microbatch. ``forward`` and ``backward`` are needed; other columns are 0 if they are
absent. ``bytes_out`` goes to the next stage, and as many bytes of gradients come back.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from pipecompile.errors import InputError, PlanError
from pipecompile.ir.between_stages import Channel, Tied
from pipecompile.ir.cluster import Cluster
from pipecompile.ir.graph import Cost
from pipecompile.ir.halves import Halves
from pipecompile.ir.json_io import converter
from pipecompile.ir.plan import Plan

SECONDS = ("forward", "backward")
BYTES = ("parameter_bytes", "saved_bytes", "bytes_out")
OF_A_PLAN = "use what `pipecompile plan --json` printed, of this version"


@dataclass(frozen=True)
class StageFigures:
    """Stages, what they cost per microbatch, and what is sent between them.

    Args:
        plan: the stages; its nodes are not known.
        costs: of each stage.
        halves: the seconds of each stage where its backward is split; None if they are not known.
        cluster: the devices and links, if they are known.
        schedule, microbatches: those of the plan that was read; empty and 0 if it was a table.
    """

    plan: Plan
    costs: tuple[Cost, ...]
    halves: tuple[Halves, ...] | None = None
    cluster: Cluster | None = None
    schedule: str = ""
    microbatches: int = 0


def read_stages(path: Path) -> StageFigures:
    """Reads a file that ends in .json or .csv.

    Raises:
        InputError: the file cannot be read, or its figures are not those of stages.
    """
    if path.suffix not in (".json", ".csv"):
        raise InputError(
            f"{path} is neither .json nor .csv; it must be what `pipecompile plan --json` printed, or a table with the "
            f"columns stage,{','.join((*SECONDS, *BYTES))}"
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}; give a file with a row per stage") from error
    return _of_plan(path, text) if path.suffix == ".json" else _of_table(path, text)


def _of_plan(path: Path, text: str) -> StageFigures:
    try:
        facts = json.loads(text)
        stages = facts["stages"]
        plan = Plan(
            stage_of=(),
            rank_of=tuple(stage["rank"] for stage in stages),
            channels=tuple(Channel(it["source"], it["target"], (), it["bytes"]) for it in facts["channels"]),
            tied=tuple(Tied(it["parameter"], tuple(it["stages"]), it["bytes"]) for it in facts["tied"]),
            replica_of=tuple(stage["replica_of"] for stage in stages),
        )
        costs = tuple(
            Cost(stage["forward"], stage["backward"], stage["saved_bytes"], stage["parameter_bytes"])
            for stage in stages
        )
        for number, cost in enumerate(costs):
            cost.check(f"of stage {number}")
        split = [stage["split"] for stage in stages]
        halves = tuple(Halves(it["forward"], it["backward"], it["weights"]) for it in split)
        for number, it in enumerate(halves):
            for half in (Cost(it.forward, it.backward), Cost(0.0, it.weights)):
                half.check(f"of stage {number}, split,")
        return StageFigures(
            plan=plan,
            costs=costs,
            halves=halves,
            cluster=converter.structure(facts["cluster"], Cluster),
            schedule=str(facts["schedule"]),
            microbatches=int(facts["microbatches"]),
        )
    except KeyError as error:
        raise InputError(f"{path} has no {error}; {OF_A_PLAN}") from error
    except (ValueError, TypeError, IndexError, PlanError) as error:
        raise InputError(f"{path} is not a plan: {error}; {OF_A_PLAN}") from error
    except Exception as error:  # of cattrs, which groups them
        raise InputError(f"{path} is not a plan: {error}; {OF_A_PLAN}") from error


def _of_table(path: Path, text: str) -> StageFigures:
    rows = list(csv.DictReader(text.splitlines(), skipinitialspace=True))
    columns = set(rows[0]) if rows else set()
    if not rows or not columns.issuperset(SECONDS):
        raise InputError(
            f"{path} needs a first line with the columns {','.join(SECONDS)} and a row per stage; it has "
            f"{len(rows)} rows and the columns {', '.join(map(str, columns)) or 'none'}"
        )
    if others := columns - {"stage", *SECONDS, *BYTES}:
        raise InputError(
            f"{path} has columns that are not known: {', '.join(map(str, others))}; the columns must be among stage, "
            f"{', '.join((*SECONDS, *BYTES))}"
        )
    found = [_figures(path, number, row) for number, row in enumerate(rows)]
    costs = tuple(
        Cost(it["forward"], it["backward"], int(it["saved_bytes"]), int(it["parameter_bytes"])) for it in found
    )
    if found[-1]["bytes_out"]:
        raise InputError(f"{path}: the last stage has bytes_out, but no stage follows it; it must be 0")
    channels = tuple(Channel(stage, stage + 1, (), int(it["bytes_out"])) for stage, it in enumerate(found[:-1]))
    return StageFigures(plan=Plan((), tuple(range(len(found))), channels), costs=costs)


def _figures(path: Path, number: int, row: Mapping[Any, Any]) -> dict[str, float]:
    if None in row:
        raise InputError(f"{path}: row {number} has more cells than columns; each row must have one per column")
    if (named := (row.get("stage") or str(number)).strip()) != str(number):
        raise InputError(f"{path}: row {number} is for stage {named}; rows must be in the order of stages, from 0")
    return {name: _number(path, number, name, (row.get(name) or "0").strip()) for name in (*SECONDS, *BYTES)}


def _number(path: Path, stage: int, name: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if not (isfinite(number) and number >= 0):
        raise InputError(f"{path}: {name} of stage {stage} is {text!r}; it must be a finite number of 0 or more")
    return number
