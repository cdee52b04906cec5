"""How near to the optimum plans are, and how long they take, on published layer graphs and on drawn ones.

    python benchmarks/partition.py --instances DIR --stages 2,4,6,8 --optima benchmarks/optima.csv --json out.json
    python benchmarks/partition.py --branchy
    python benchmarks/partition.py --sizes 500,2000,10000,50000 --stages 8 --budget 5

Every ``*.json`` below DIR is an instance; it is solved under its own memory limit, and its load is scored again from
the file. The load has the unit of the file. ``ratio`` is to the optimum of the CSV (columns instance, stages,
optimum), else to the lower bound. Seconds are CPU seconds of this process, reading excluded.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import chain
from math import inf
from pathlib import Path
from time import process_time

import branchy
from instances import Instance
from rich.console import Console
from rich.table import Table

from pipecompile.errors import InfeasibleError, PlanError
from pipecompile.partition import Problem
from pipecompile.partition.solver.solver import solve

Optima = dict[tuple[str, int], float]
console = Console(width=120)


@dataclass(frozen=True)
class Row:
    """One instance at one number of stages; no load and no plan if it cannot be done."""

    instance: str
    stages: int
    load: float | None
    lower_bound: float | None
    proven: bool
    seconds: float
    stage_of: dict[int, int] | None  # original node id -> stage
    note: str = ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instances", type=Path, metavar="DIR", help="where the instances are")
    parser.add_argument("--branchy", action="store_true", help="also solve the drawn problems of branchy.py")
    parser.add_argument("--sizes", type=_numbers, default=[], help="also solve drawn problems of so many nodes")
    parser.add_argument(
        "--budget", type=float, metavar="SECONDS", help="CPU seconds for each search; without, no limit"
    )
    parser.add_argument("--stages", type=_numbers, default=[2, 4, 6, 8], help="numbers of stages, with commas")
    parser.add_argument("--optima", type=Path, metavar="FILE.csv", help="known optima to compare with")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the rows here")
    arguments = parser.parse_args()
    try:
        optima = _optima(arguments.optima)
        rows = list(_rows(arguments, optima))
    except (ValueError, OSError) as error:
        sys.exit(f"benchmarks/partition.py: {error}")
    console.print(_table(rows, optima))
    console.print(_summary(rows, optima))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))


def _rows(arguments: argparse.Namespace, optima: Optima) -> Iterator[Row]:
    if not arguments.instances and not arguments.branchy and not arguments.sizes:
        raise ValueError("give --instances DIR, --branchy or --sizes")
    for instance in _instances(arguments.instances) if arguments.instances else ():
        for num_stages in arguments.stages:
            yield _reported(_solved(instance, num_stages, arguments.budget), optima)
    drawn = branchy.problems(arguments.stages) if arguments.branchy else iter(())
    for name, problem in chain(drawn, branchy.large(arguments.sizes, arguments.stages)):
        yield _reported(_drawn(name, problem, arguments.budget), optima)


def _instances(folder: Path) -> Iterator[Instance]:
    paths = sorted(folder.rglob("*.json"))
    if not paths:
        raise ValueError(f"there is no *.json below {folder}")
    for path in paths:
        yield Instance.read(path, path.relative_to(folder).with_suffix("").as_posix())


def _solved(instance: Instance, num_stages: int, budget: float | None) -> Row:
    begin = process_time()
    if max(instance.seconds) == inf:
        return Row(instance.name, num_stages, None, None, True, 0.0, None, "a node runs on no accelerator")
    contraction = instance.problem(num_stages)
    try:
        solution = solve(contraction.problem, budget)
    except PlanError as error:
        proven = isinstance(error, InfeasibleError)
        return Row(instance.name, num_stages, None, None, proven, process_time() - begin, None, str(error))
    seconds = process_time() - begin
    stage_of = contraction.expand(solution.stage_of)
    load = instance.load(stage_of)
    quality = solution.quality
    assert abs(load - quality.bottleneck) <= 1e-9 * load, f"{instance.name} scores {load}, not {quality.bottleneck}"
    plan = dict(zip(instance.ids, stage_of, strict=True))
    return Row(instance.name, num_stages, load, quality.lower_bound, quality.proven, seconds, plan)


def _drawn(name: str, problem: Problem, budget: float | None) -> Row:
    solution = solve(problem, budget)
    plan, quality = dict(enumerate(solution.stage_of)), solution.quality
    return Row(name, problem.num_stages, quality.bottleneck, quality.lower_bound, quality.proven, quality.seconds, plan)


def _optima(path: Path | None) -> Optima:
    """The known optima, under the name of the file without its folder."""
    if path is None:
        return {}
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows or not {"instance", "stages", "optimum"} <= set(rows[0]):
        raise ValueError(f"{path} needs the columns instance, stages, optimum")
    return {(_short(row["instance"]), int(row["stages"])): _number(row["optimum"]) for row in rows}


def _number(text: str) -> float:
    """The number; infinite where there is none, for what cannot be done."""
    try:
        return float(text)
    except ValueError:
        return inf


def _short(name: str) -> str:
    return name.rsplit("/", 1)[-1].removesuffix(".json")


def _ratio(row: Row, optima: Optima) -> float | None:
    known = optima.get((_short(row.instance), row.stages), row.lower_bound)
    if row.load is None:
        return 1.0 if known in (None, inf) else inf
    return row.load / known if known else None


def _reported(row: Row, optima: Optima) -> Row:
    """The row, shown as soon as it is there where somebody looks on."""
    if sys.stderr.isatty():
        print(f"{row.instance} {row.stages}: {row.load} in {row.seconds:.2f} s", file=sys.stderr)
    return row


def _table(rows: list[Row], optima: Optima) -> Table:
    table = Table("instance", box=None)
    for heading in ("stages", "load", "lower bound", "proof", "CPU s", "ratio"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        load = "infeasible" if row.load is None else f"{row.load:.4f}"
        bound = "" if row.lower_bound is None else f"{row.lower_bound:.4f}"
        ratio = _ratio(row, optima)
        proof = "yes" if row.proven else "no"
        cells = (str(row.stages), load, bound, proof, f"{row.seconds:.2f}", "" if ratio is None else f"{ratio:.6f}")
        table.add_row(row.instance, *cells)
    return table


def _summary(rows: list[Row], optima: Optima) -> str:
    ratios = [ratio for row in rows if (ratio := _ratio(row, optima)) is not None]
    proven, slowest = sum(row.proven for row in rows), max(row.seconds for row in rows)
    return f"{len(rows)} rows, {proven} proven; worst ratio {max(ratios):.6f}, slowest {slowest:.2f} CPU s"


def _numbers(text: str) -> list[int]:
    numbers = [int(part) for part in text.split(",")]
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"{text}: a number of stages is one or more")
    return numbers


if __name__ == "__main__":
    main()
