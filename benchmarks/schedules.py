"""The bubble and the memory of every schedule, for times and memory from a file.

    python benchmarks/schedules.py --costs FILE.csv [--json]
    python benchmarks/schedules.py --ranks 1000

The second measures the simulator. In the file, each row is a case; its columns are

    name                  of the case
    p, n                  ranks and microbatches
    f, b, w, c            times of a stage, in any unit: Forward, gradient of inputs, gradient of weights, one transfer.
                          Schedules with v stages per rank (V shapes: 2) divide f, b and w by v
    mem_f, mem_b, mem_w   what F adds to a rank's memory, B and W free: negative, or as amounts, but for a B that adds
    cap                   the memory of a rank, in the same unit; empty or inf: no limit

Empty cells: c is 0; mem_f 1; mem_b 0; mem_w frees what is left.

A transfer makes its reader wait, and no other transfer, as in the papers. Printed for each schedule within the cap, and
for ``auto``, the best that is found: the bubble rate by span (the longest time from a rank's first start to its last
end) and by makespan, which are different metrics, and the peak of memory. ``zb`` is the search on a chain,
``auto-makespan`` the best by makespan where ``auto`` is the best by span.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType


def _without_torch() -> None:
    """Schedules need no torch, which ``import pipecompile`` loads for longer than most cases take."""
    spec = importlib.util.find_spec("pipecompile")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    for name in ("pipecompile", "pipecompile.schedule"):
        package = ModuleType(name)
        package.__path__ = [str(Path(next(iter(spec.submodule_search_locations)), *name.split(".")[1:]))]
        sys.modules[name] = package


if __name__ == "__main__":
    _without_torch()

from pipecompile.errors import InputError
from pipecompile.schedule.catalog import RECIPES, best, made, searched
from pipecompile.schedule.order import Order
from pipecompile.schedule.replay import replay
from pipecompile.schedule.shape import Shape, chain, v_shape
from pipecompile.schedule.stage_costs import StageCosts

COLUMNS = ("name", "p", "n", "f", "b", "w", "c", "mem_f", "mem_b", "mem_w", "cap")
EXTRA = {"c": 0.0, "mem_f": 1.0, "mem_b": 0.0, "mem_w": None, "cap": math.inf}


@dataclass(frozen=True)
class Case:
    name: str
    p: int
    n: int
    times: tuple[float, float, float]
    c: float
    memory: tuple[float, float, float]
    cap: float

    def costs(self, shape: Shape) -> StageCosts:
        return StageCosts.uniform(shape, *self.times, self.c, self.memory, queued=0.0)


@dataclass(frozen=True)
class Result:
    name: str
    schedule: str
    span_rate: float
    makespan_rate: float
    peak: float


def read(path: Path) -> list[Case]:
    """The cases of a file.

    Raises:
        InputError: a column or a number is missing or wrong; the message names the line.
    """
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = csv.reader(file, skipinitialspace=True)
        header = [name.strip() for name in next(rows, [])]
        if missing := [name for name in COLUMNS if name not in header]:
            raise InputError(f"{path} has no column {', '.join(missing)}; its first line must be {','.join(COLUMNS)}")
        if len(set(header)) < len(header):
            raise InputError(f"{path} has a column twice: {','.join(header)}")
        if odd := [name for name in header if name not in COLUMNS]:
            print(f"{path}: not used: {', '.join(map(repr, odd))}", file=sys.stderr)
        cases = []
        for row in rows:
            cells = [cell.strip() for cell in row]
            if any(cells):
                if len(cells) > len(header):
                    raise InputError(f"{path}, line {rows.line_num}: {len(cells)} cells for {len(header)} columns")
                fields = dict(zip(header, cells + [""] * len(header), strict=False))
                cases.append(_case(fields, f"{path}, line {rows.line_num}"))
    return cases


def _case(cells: dict[str, str], where: str) -> Case:
    number = {name: _number(name, cells[name], where) for name in COLUMNS[1:] if cells[name]}
    if missing := [name for name in ("p", "n", "f", "b", "w") if name not in number]:
        raise InputError(f"{where}: no value for {', '.join(missing)}")
    for name in ("p", "n"):
        if number[name] != (number[name] if math.isinf(number[name]) else int(number[name])) or not (
            1 <= number[name] < math.inf
        ):
            raise InputError(f"{where}: {name} must be an integer of 1 or more; got {cells[name]}")
    for name in ("f", "b", "w", "c"):
        if not 0 <= number.get(name, 0) < math.inf:
            raise InputError(f"{where}: {name} must be a time, finite and not negative; got {cells[name]}")
    times = number["f"], number["b"], number["w"]
    if not sum(times):
        raise InputError(f"{where}: f, b and w are all 0, so there is nothing to schedule")
    if number.get("cap", 1.0) < 0:
        raise InputError(f"{where}: cap must not be negative; got {cells['cap']}")
    return Case(
        name=cells["name"] or where.rpartition(", ")[2],
        p=int(number["p"]),
        n=int(number["n"]),
        times=times,
        c=number.get("c", 0.0),
        memory=_memory(number, where),
        cap=number.get("cap", math.inf),
    )


def _memory(number: dict[str, float], where: str) -> tuple[float, float, float]:
    """What F, B and W add; what they free is negative."""
    f, b, w = number.get("mem_f", 1.0), number.get("mem_b", 0.0), number.get("mem_w")
    if not all(map(math.isfinite, (f, b, w or 0.0))) or f < 0:
        raise InputError(
            f"{where}: mem_f, mem_b and mem_w must be finite, and mem_f not negative; got {f}, {b} and {w}"
        )
    if w is None:
        b = -b if "mem_b" in number and 0 < b <= f else b
        return f, b, -f - b
    near = 1e-3 * max(f, abs(b), abs(w))
    if abs(f + b + w) <= near:
        return f, b, -f - b
    if abs(f - b - w) <= near:
        return f, -b, b - f
    raise InputError(
        f"{where}: F adds mem_f={f}, of which B and W must free all; mem_b={b} and mem_w={w} free {abs(b + w)}"
    )


def _number(name: str, text: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise InputError(f"{where}: {name} is {text!r}, which is not a number") from None
    if math.isnan(value):
        raise InputError(f"{where}: {name} is nan; give a number, or leave the cell empty for its default")
    return value


def results(case: Case) -> Iterator[Result]:
    """Every schedule that meets the cap, then the best."""
    size = case.p * case.n
    passes = max(120.0, 60_000 / size) if case.p <= 8 else max(60.0, 2_400_000 / size)
    part = 0.5 if case.p <= 8 else 0.25  # of the effort, for orders that auto may take in any case
    orders: dict[str, Order] = {}
    for name, recipe in RECIPES.items():
        order = made(name, case.p, case.n, case.costs(recipe.shape(case.p)), case.cap, part * passes)
        if order is not None:
            orders[name] = order
    found = [*orders.values()]
    for by_span in (True, False):
        for shape in (chain(case.p), v_shape(case.p)):
            order = searched(shape, case.n, case.costs(shape), case.cap, passes if by_span else part * passes, by_span)
            if order is not None:
                found.append(order)
                if by_span and shape == chain(case.p):
                    orders["zb"] = order
    if found:
        orders["auto"] = best(found, lambda order: case.costs(order.shape))
        orders["auto-makespan"] = best(found, lambda order: case.costs(order.shape), by_span=False)
    for name, order in orders.items():
        run = replay(order, case.costs(order.shape))
        peak = min(case.cap, float(f"{run.peak:.12g}"))  # without the rounding of sums
        yield Result(name=case.name, schedule=name, span_rate=run.span_rate, makespan_rate=run.makespan_rate, peak=peak)


def measure(ranks: int) -> None:
    """Prints how long orders of many ranks take to make and to simulate."""
    print(f"{ranks} ranks, {ranks // 4} microbatches, without a search")
    for name in ("1f1b", "interleaved-1f1b", "zb-h1", "zb-v"):
        start = time.perf_counter()
        order = RECIPES[name].order(ranks, max(1, ranks // 4))
        made_at = time.perf_counter()
        run = replay(order, StageCosts.uniform(order.shape, 1.0, 1.0, 1.0, 0.1))
        end = time.perf_counter()
        count = sum(map(len, order.rows))
        print(
            f"  {name:20}{count:10,} computations  made in {made_at - start:6.2f} s  simulated in "
            f"{end - made_at:6.2f} s ({(end - made_at) / count * 1e6:.2f} us each), peak {run.peak:g}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--costs", type=Path, help="a file with one case a row")
    what.add_argument("--ranks", type=int, help="simulate so many ranks instead")
    parser.add_argument("--json", action="store_true", help="print a list of objects")
    arguments = parser.parse_args()
    if arguments.costs is None:
        measure(arguments.ranks)
        return
    try:
        cases = read(arguments.costs)
    except (InputError, OSError, UnicodeDecodeError, csv.Error) as error:
        sys.exit(f"error: {error}")
    printed = []
    for case in cases:
        start = time.perf_counter()
        rows = list(results(case))
        seconds = time.perf_counter() - start
        if not rows:
            print(
                f"{case.name}: no schedule meets cap={case.cap:g}: one microbatch on a rank needs {case.memory[0]:g}",
                file=sys.stderr,
            )
        printed += rows
        if not arguments.json and rows:
            print(f"{case.name}: {case.p} ranks, {case.n} microbatches, cap {case.cap:g} ({seconds:.1f} s)")
            print(f"  {'schedule':20}{'bubble by span':>16}{'by makespan':>14}{'peak':>14}")
            for row in rows:
                print(f"  {row.schedule:20}{row.span_rate:16.4f}{row.makespan_rate:14.4f}{row.peak:14.6g}")
    if arguments.json:
        print(json.dumps([asdict(row) for row in printed], indent=1))


if __name__ == "__main__":
    main()
