"""The bubble and the memory of every schedule, for times and memory from a file.

    python benchmarks/schedules.py --costs FILE.csv [--json]
    python benchmarks/schedules.py --costs benchmarks/schedule_rows.csv --against benchmarks/schedule_figures.csv
    python benchmarks/schedules.py --ranks 1000

The second compares with figures of others, and fails if one of ours is worse. The third measures the simulator. In the
file of costs, each row is a case; its columns are

    name                  of the case
    p, n                  ranks and microbatches
    f, b, w, c            times of a stage, in any unit: Forward, gradient of inputs, gradient of weights, one transfer.
                          Schedules with v stages per rank (V shapes: 2) divide f, b and w by v
    mem_f, mem_b, mem_w   what F adds to a rank's memory, B and W free: negative, or as amounts, but for a B that adds
    cap                   the memory of a rank, in the same unit; empty or inf: no limit

Empty cells: c is 0; mem_f 1; mem_b 0; mem_w frees what is left. For unequal ranks, a cell of times or memory has p
numbers with spaces between them, one for each rank. Lines that begin with ``#`` are comments.

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
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
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
from pipecompile.schedule.catalog import RECIPES, best, made, searches
from pipecompile.schedule.order import Order
from pipecompile.schedule.replay import replay
from pipecompile.schedule.shape import Shape, chain, v_shape
from pipecompile.schedule.stage_costs import StageCosts

COLUMNS = ("name", "p", "n", "f", "b", "w", "c", "mem_f", "mem_b", "mem_w", "cap")
TIMES, MEMORY = ("f", "b", "w"), ("mem_f", "mem_b", "mem_w")
EXTRA = {"c": 0.0, "cap": math.inf}
MOST = 10_000_000  # microbatches of all ranks, whose orders a machine can hold


@dataclass(frozen=True)
class Rank:
    times: tuple[float, ...]  # of F, B and W
    memory: tuple[float, ...]  # what they add


@dataclass(frozen=True)
class Case:
    name: str
    p: int
    n: int
    ranks: tuple[Rank, ...]
    c: float
    cap: float

    def costs(self, shape: Shape) -> StageCosts:
        """What each stage costs: its part of its rank."""
        parts = [(self.ranks[rank], len(shape.stages_of[rank])) for rank in shape.rank_of]
        f, b, w = (tuple(rank.times[kind] / count for rank, count in parts) for kind in range(3))
        mem_f, mem_b, mem_w = (tuple(rank.memory[kind] / count for rank, count in parts) for kind in range(3))
        return StageCosts(f, b, w, (self.c,) * len(shape.edges), mem_f, mem_b, mem_w, queued=0.0)


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
        lines = (row for row in rows if not "".join(row).lstrip().startswith("#"))
        header = [name.strip() for name in next(lines, [])]
        if missing := [name for name in COLUMNS if name not in header]:
            raise InputError(
                f"{path} has no column {', '.join(missing)}; its first line must be {','.join(COLUMNS)}, with commas"
            )
        if len(set(header)) < len(header):
            raise InputError(f"{path} has a column twice: {','.join(header)}")
        if odd := [name for name in header if name not in COLUMNS]:
            print(f"{path}: not used: {', '.join(map(repr, odd))}", file=sys.stderr)
        cases = []
        for row in lines:
            cells = [cell.strip() for cell in row]
            if any(cells):
                if len(cells) > len(header):
                    raise InputError(f"{path}, line {rows.line_num}: {len(cells)} cells for {len(header)} columns")
                fields = dict(zip(header, cells + [""] * len(header), strict=False))
                cases.append(_case(fields, f"{path}, line {rows.line_num}"))
    return cases


def _case(cells: dict[str, str], where: str) -> Case:
    if missing := [name for name in ("p", "n", "f", "b", "w") if not cells[name]]:
        raise InputError(f"{where}: no value for {', '.join(missing)}")
    p, n = (_count(name, cells[name], where) for name in ("p", "n"))
    if p * n > MOST:
        raise InputError(f"{where}: {n} microbatches on {p} ranks are more than {MOST:,}; give fewer of them")
    c, cap = (_number(name, cells[name], where) if cells[name] else EXTRA[name] for name in ("c", "cap"))
    if cap < 0:
        raise InputError(f"{where}: cap must not be negative; got {cells['cap']}")
    by_rank = {name: _by_rank(name, cells[name], p, where) for name in (*TIMES, *MEMORY) if cells[name]}
    for name, times in {**{name: by_rank[name] for name in TIMES}, "c": (c,)}.items():
        if not all(0 <= seconds < math.inf for seconds in times):
            raise InputError(f"{where}: {name} must be a time, finite and not negative; got {cells[name]}")
    if not any(map(any, map(by_rank.get, TIMES))):
        raise InputError(f"{where}: f, b and w are all 0, so there is nothing to schedule")
    if not math.isfinite(2 * n * (p * c + sum(map(sum, map(by_rank.__getitem__, TIMES))))):
        raise InputError(f"{where}: the times of {n} microbatches add up to infinity; give them in a larger unit")
    each = [{name: numbers[rank] for name, numbers in by_rank.items()} for rank in range(p)]
    return Case(
        name=cells["name"] or where.rpartition(", ")[2],
        p=p,
        n=n,
        ranks=tuple(Rank(tuple(map(number.__getitem__, TIMES)), _memory(number, where)) for number in each),
        c=c,
        cap=cap,
    )


def _memory(number: dict[str, float], where: str) -> tuple[float, float, float]:
    """What F, B and W of a rank add; what they free is negative."""
    f, b, w = number.get("mem_f", 1.0), number.get("mem_b", 0.0), number.get("mem_w")
    if not all(map(math.isfinite, (f, b, w or 0.0))) or f < 0:
        raise InputError(
            f"{where}: mem_f, mem_b and mem_w must be finite, and mem_f not negative; got {f}, {b} and {w}"
        )
    near = 1e-3 * max(f, abs(b), abs(w or 0.0))
    if w is None:
        b = -b if "mem_b" in number and 0 < b <= f else b
    elif abs(f - b - w) <= near < abs(f + b + w):  # amounts
        b = -b
    elif abs(f + b + w) > near:
        raise InputError(
            f"{where}: F adds mem_f={f}, of which B and W must free all; mem_b={b} and mem_w={w} free {abs(b + w)}"
        )
    if f + b < -near:
        raise InputError(f"{where}: W adds mem_w={-f - b}; what W does must free memory, or leave it as it is")
    return f, max(b, -f), min(0.0, -f - b)


def _by_rank(name: str, cell: str, p: int, where: str) -> tuple[float, ...]:
    numbers = tuple(_number(name, text, where) for text in cell.split())
    if len(numbers) not in (1, p):
        raise InputError(f"{where}: {name} has {len(numbers)} numbers for {p} ranks; give one, or one for each rank")
    return numbers if len(numbers) == p else numbers * p


def _count(name: str, cell: str, where: str) -> int:
    number = _number(name, cell, where)
    if not (1 <= number < math.inf and number == int(number)):
        raise InputError(f"{where}: {name} must be an integer of 1 or more; got {cell}")
    return int(number)


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
    passes = max(120.0, 60_000 / size) if case.p <= 8 else max(60.0, 1_200_000 / size)
    part = 0.5  # of the effort, for orders that auto may take in any case
    orders: dict[str, Order] = {}
    for name, recipe in RECIPES.items():
        order = made(name, case.p, case.n, case.costs(recipe.shape(case.p)), case.cap, part * passes)
        if order is not None:
            orders[name] = order
    found = [*orders.values()]
    for shape in (chain(case.p), v_shape(case.p)):
        both = searches(shape, case.n, case.costs(shape), case.cap, {True: passes, False: part * passes})
        found += filter(None, both.values())
        if both[True] is not None and shape == chain(case.p):
            orders["zb"] = both[True]
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


@dataclass(frozen=True)
class Figure:
    """A bubble rate that others reach, or that follows from a formula."""

    name: str  # of the case
    schedule: str
    metric: str  # span or makespan
    figure: str  # as it is written, which says how exact it is
    source: str

    @property
    def rounding(self) -> float:
        return 0.5 / 10 ** len(self.figure.partition(".")[2])


def read_figures(path: Path) -> list[Figure]:
    """The figures of a file with a line for each.

    Raises:
        InputError: a column or a number is missing or wrong; the message names the line.
    """
    names = [field.name for field in fields(Figure)]
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = csv.reader(file)
        if next(rows, []) != names:
            raise InputError(f"{path}: the first line must be {','.join(names)}")
        figures = []
        for row in filter(None, rows):
            where = f"{path}, line {rows.line_num}"
            if len(row) != len(names):
                raise InputError(f"{where}: {len(row)} cells for {len(names)} columns")
            figure = Figure(*row)
            if figure.metric not in ("span", "makespan"):
                raise InputError(f"{where}: metric must be span or makespan; got {figure.metric!r}")
            if not 0 <= _number("figure", figure.figure, where) < 1:
                raise InputError(f"{where}: figure must be a bubble rate, from 0 to below 1; got {figure.figure}")
            figures.append(figure)
    return figures


def compare(found: Iterable[Result], figures: Iterable[Figure]) -> bool:
    """Prints each figure beside ours, and returns whether none of ours is worse."""
    ours = {(result.name, result.schedule): result for result in found}
    names, words = {name for name, _ in ours}, []
    print(f"{'':9}{'ours':>10}{'figure':>11}")
    for figure in figures:
        if figure.name not in names:
            continue
        result = ours.get((figure.name, figure.schedule))
        rate = math.inf if result is None else getattr(result, f"{figure.metric}_rate")
        less = rate - float(figure.figure)
        words.append("equal" if abs(less) <= figure.rounding else "better" if less < 0 else "worse")
        print(f"{words[-1]:9}{rate:10.6f}{figure.figure:>11}  {figure.name}: {figure.schedule} ({figure.source})")
    print(", ".join(f"{words.count(word)} {word}" for word in ("better", "equal", "worse")))
    return "worse" not in words


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--costs", type=Path, help="a file with one case a row")
    what.add_argument("--ranks", type=int, help="simulate so many ranks instead")
    parser.add_argument("--json", action="store_true", help="print a list of objects")
    parser.add_argument("--against", type=Path, help="a file of figures to compare with, in place of all rates")
    arguments = parser.parse_args()
    if arguments.against is not None and (arguments.costs is None or arguments.json):
        parser.error("--against compares what --costs prints, and not as --json")
    if arguments.costs is None:
        measure(arguments.ranks)
        return
    try:
        cases = read(arguments.costs)
        figures = read_figures(arguments.against) if arguments.against is not None else None
    except UnicodeDecodeError as error:
        sys.exit(f"error: {arguments.costs} is not text in UTF-8 ({error.reason}); save it as such")
    except (InputError, OSError, csv.Error) as error:
        sys.exit(f"error: {error}")
    if not cases:
        print(f"{arguments.costs} has no cases; write one a line below its first line", file=sys.stderr)
    printed = []
    for case in cases:
        start, used = time.perf_counter(), time.process_time()
        rows = list(results(case))
        seconds = f"{time.perf_counter() - start:.1f} s, {time.process_time() - used:.1f} s of the processor"
        if not rows:
            need = max(rank.memory[0] for rank in case.ranks)
            print(
                f"{case.name}: no schedule meets cap={case.cap:g}: one microbatch on a rank needs {need:g}",
                file=sys.stderr,
            )
        elif arguments.json or figures is not None:
            print(f"{case.name}: {seconds}", file=sys.stderr, flush=True)
        else:
            _print(case, rows, seconds)
        printed += rows
    if arguments.json:
        print(json.dumps([asdict(row) for row in printed], indent=1))
    if figures is not None and not compare(printed, figures):
        sys.exit(1)


def _print(case: Case, rows: Iterable[Result], seconds: str) -> None:
    print(f"{case.name}: {case.p} ranks, {case.n} microbatches, cap {case.cap:g} ({seconds})")
    print(f"  {'schedule':20}{'bubble by span':>16}{'by makespan':>14}{'peak':>14}")
    for row in rows:
        print(f"  {row.schedule:20}{row.span_rate:16.4f}{row.makespan_rate:14.4f}{row.peak:14.6g}")


if __name__ == "__main__":
    main()
