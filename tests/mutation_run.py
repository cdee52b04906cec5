"""Breaks the package in places drawn at random, one at a time, and says for each which test finds it.

    python tests/mutation_run.py --count 40 --seed 1            against the tests of `make test`
    python tests/mutation_run.py --recorded FILE                keeps what the first run shows, or uses it again
    python tests/mutation_run.py --only 3,17                    some of the places, by number
    python tests/mutation_run.py --tests tests/ir               some of the tests
    python tests/mutation_run.py --most 300                     a mutant counts as not found after so many tests
    python tests/mutation_run.py --long                         against the tests of `make long`
    python tests/mutation_run.py --processes 1                  slower, but leaves a core to others

A mutant is the package with one expression or statement changed: a comparison turned round, ``and`` for ``or``, a sum
for a difference, a number one larger, a condition negated, a result dropped, a call left out. Runs in a copy of the
repository.

A test can find a mutant only if it reaches the place that is changed. So all tests run once, with a note at each place
(``reached.py``), and then each mutant runs against the tests that reach it, cheapest first, and against the other tests
of their files, which may use what those have made. All tests are candidates where a place is reached at import, or in a
function whose results are cached. A run ends at the first test that fails, or at a limit of time, which counts as
found. Mutants that no test finds are listed at the end; some of them do the same as the package.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, groupby, zip_longest
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TURNED = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.FloorDiv: ast.Mult, ast.Div: ast.Mult,
}  # fmt: skip
START = 120.0  # seconds that a run may take beyond five times those of its tests
FEW = 40  # tests that run in one process
FOLDERS = ("tests", "tests/devices")


@dataclass(frozen=True)
class Place:
    """One change to one file.

    Attributes:
        path: The file, relative to the repository.
        start, end: Characters of the file that are replaced.
        new: What replaces them.
        is_statement: Whether this is a statement, not an expression.
    """

    path: Path
    line: int
    start: int
    end: int
    old: str
    new: str
    is_statement: bool

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {_short(self.old)} -> {_short(self.new)}"

    def mutated(self, source: str) -> str:
        return source[: self.start] + self.new + source[self.end :]

    def edits(self, number: int) -> Iterator[tuple[int, bool, int, str]]:
        """What a note of the place inserts: position, whether at the start, rank at the same position, text."""
        note = f"__import__('pipecompile.reached').reached.note({number})"
        yield self.start, True, -self.end, f"{note}; " if self.is_statement else f"({note}, "
        if not self.is_statement:
            yield self.end, False, -self.start, ")[1]"

    def is_cached(self, source: str) -> bool:
        """Whether the place is in a function that keeps its results: later tests use them without reaching it."""
        functions = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef))
        around = [f for f in functions if f.lineno <= self.line <= (f.end_lineno or 0)]
        return any("cache" in ast.unparse(decorator) for f in around for decorator in f.decorator_list)


def is_python(source: str) -> bool:
    try:
        compile(source, "", "exec")
    except SyntaxError:
        return False
    return True


def _short(text: str) -> str:
    return re.sub(r"\s+", " ", text)[:60] or "nothing"


def places(path: Path) -> Iterator[Place]:
    """All changes that could be made to a file."""
    source = (ROOT / path).read_text()
    tree = ast.parse(source)
    starts = [0]
    for row in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(row.encode()))
    encoded = source.encode()

    def at(row: int, column: int) -> int:
        return len(encoded[: starts[row - 1] + column].decode())

    skipped = {id(inner) for node in ast.walk(tree) for part in _not_run(node) for inner in ast.walk(part)}
    for node in ast.walk(tree):
        new = None if id(node) in skipped else _changed(node)
        if new is not None and isinstance(node, ast.expr | ast.stmt):
            start, end = at(node.lineno, node.col_offset), at(node.end_lineno or 0, node.end_col_offset or 0)
            yield Place(path, node.lineno, start, end, source[start:end], new, isinstance(node, ast.stmt))


def _not_run(node: ast.AST) -> Iterator[ast.AST]:
    """Parts of a node that are not run, or whose change is a change of words: annotations, messages, docstrings."""
    for name in ("annotation", "returns"):
        part = getattr(node, name, None)
        if isinstance(part, ast.AST):
            yield part
    if isinstance(node, ast.Raise | ast.JoinedStr | ast.Import | ast.ImportFrom):
        yield node
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        yield node


def _changed(node: ast.AST) -> str | None:
    """The source of the changed node; None if it is of no kind that is changed."""
    match node:
        case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in TURNED:
            return f"({ast.unparse(ast.Compare(left, [TURNED[type(op)]()], [right]))})"
        case ast.BoolOp(op=op, values=values):
            return f"({ast.unparse(ast.BoolOp(TURNED[type(op)](), values))})"
        case ast.BinOp(left=left, op=op, right=right) if type(op) in TURNED:
            return f"({ast.unparse(ast.BinOp(left, TURNED[type(op)](), right))})"
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return f"bool({ast.unparse(operand)})"
        case ast.Constant(value=bool(value)):
            return repr(not value)
        case ast.Constant(value=int(value)):
            return repr(value + 1)
        case ast.IfExp(test=test, body=body, orelse=orelse):
            return f"({ast.unparse(ast.IfExp(test, orelse, body))})"
        case ast.Return(value=ast.AST() as value) if not isinstance(value, ast.Constant):
            return "return None"
        case ast.Expr(value=ast.Call()) | ast.AugAssign():
            return "pass"
    return None


def drawn(count: int, seed: int) -> list[Place]:
    """Places drawn from all of the package."""
    files = sorted(path.relative_to(ROOT) for path in (ROOT / "pipecompile").rglob("*.py"))
    return random.Random(seed).sample([place for path in files for place in places(path)], count)


def with_notes(source: str, inside: dict[int, Place]) -> str:
    """The source of a file with a note at each place, also where one is a part of another."""
    edits = [edit for number, place in inside.items() for edit in place.edits(number)]
    for position, _, _, text in sorted(edits, reverse=True):
        source = source[:position] + text + source[position:]
    return source


@dataclass
class Tests:
    """What a run of all tests has shown.

    Attributes:
        seconds: The seconds of each test.
        reaching: The tests that reach each place, by number.
        everywhere: The places that may change any test.
        unnoted: The tests that pass on the package alone, but not with notes: they may reach any place.
    """

    seconds: dict[str, float]
    reaching: dict[int, set[str]]
    everywhere: set[int]
    unnoted: set[str]

    def candidates(self, number: int, place: Place, most: int) -> Iterator[list[str]]:
        """The tests that may find a mutant, in several lists: what is cheap and likely to find it comes first.

        Args:
            number, place: The mutant.
            most: How many tests at most.
        """
        cheapest = sorted(self.seconds, key=self.seconds.__getitem__)
        reaching = [test for test in cheapest if test in self.reaching.get(number, ())]
        files = {file_of(test) for test in reaching}
        others = [test for test in cheapest if file_of(test) in files or test in self.unnoted]
        mirror = Path("tests", *place.path.parent.parts[1:])
        near = [test for test in cheapest if Path(test).is_relative_to(mirror)] if number in self.everywhere else []
        tried: set[str] = set()
        for tests in (reaching[:FEW], spread(reaching), near, others, cheapest if number in self.everywhere else []):
            left = [test for test in tests if test not in tried][: most - len(tried)]
            tried.update(left)
            yield from (some for some in apart(left) if some)


def spread(tests: Sequence[str]) -> list[str]:
    """One test of each file, then another one of each."""
    files = [list(some) for _, some in groupby(sorted(tests, key=file_of), file_of)]
    return [test for test in chain.from_iterable(zip_longest(*files)) if test]


def file_of(test: str) -> str:
    return test.partition("::")[0]


def apart(tests: Sequence[str]) -> list[list[str]]:
    """The tests in two lists: one process cannot run those of devices and others."""
    return [[test for test in tests if test.startswith("tests/devices") is devices] for devices in (False, True)]


def recorded(chosen: dict[int, Place], copy: Path, run: Run, wanted: Sequence[str]) -> Tests:
    """Runs tests once on the package with a note at each place."""
    everywhere: set[int] = set()
    sources = {place.path: (copy / place.path).read_text() for place in chosen.values()}
    for path, source in sources.items():
        inside = {number: place for number, place in chosen.items() if place.path == path}
        unnoted = {number for number in inside if not is_python(with_notes(source, {number: inside[number]}))}
        everywhere |= unnoted | {number for number, place in inside.items() if place.is_cached(source)}
        noted = with_notes(source, {number: place for number, place in inside.items() if number not in unnoted})
        (copy / path).write_text(noted)
    recorder = copy / "pipecompile" / "reached.py"
    shutil.copy(copy / "tests" / "reached.py", recorder)
    logs = copy / "reached"
    shutil.rmtree(logs, ignore_errors=True)
    logs.mkdir()
    try:
        for tests in filter(None, apart(wanted)):
            run(copy, tests, None, "-p", "pipecompile.reached")
    finally:
        recorder.unlink()
        for path, source in sources.items():
            (copy / path).write_text(source)
    tests, failed = read(logs, everywhere)
    for test in sorted(failed):
        if not run(copy, [test], None).found:
            tests.unnoted.add(test)
        else:  # on the package itself: it tells nothing about mutants
            print(f"fails on the package: {test}", flush=True)
            del tests.seconds[test]
    return tests


def read(logs: Path, everywhere: set[int]) -> tuple[Tests, set[str]]:
    """What the logs of all processes say, and the tests that failed."""
    tests = Tests({}, {}, everywhere, set())
    failed = set()
    for log in logs.iterdir():
        test = ""
        for line in log.read_text().splitlines():
            word, _, rest = line.partition(" ")
            if word == "begin":
                test = rest
            elif word == "end":
                tests.seconds[test] = float(rest)
                test = ""
            elif word == "failed":
                failed.add(rest)
            elif test:
                tests.reaching.setdefault(int(rest), set()).add(test)
            else:
                tests.everywhere.add(int(rest))
    assert tests.seconds, "no test has run"
    return tests, failed


def save(tests: Tests, chosen: dict[int, Place], file: Path) -> None:
    reaching = {str(number): sorted(some) for number, some in tests.reaching.items()}
    fields = {
        "places": {str(number): str(place) for number, place in chosen.items()},
        "seconds": tests.seconds,
        "reaching": reaching,
        "everywhere": sorted(tests.everywhere),
        "unnoted": sorted(tests.unnoted),
    }
    file.write_text(json.dumps(fields, indent=1))


def load(chosen: dict[int, Place], file: Path) -> Tests:
    fields = json.loads(file.read_text())
    other = [number for number, place in chosen.items() if fields["places"].get(str(number)) != str(place)]
    if other:
        raise SystemExit(f"{file} was recorded with other places: {other}")
    reaching = {int(number): set(some) for number, some in fields["reaching"].items()}
    return Tests(fields["seconds"], reaching, set(fields["everywhere"]), set(fields["unnoted"]))


@dataclass(frozen=True)
class Ran:
    """A run of tests: what found a fault, empty if nothing did."""

    found: str


@dataclass(frozen=True)
class Run:
    """Runs pytest in a copy of the repository, on the copy's package."""

    processes: int
    settings: dict[str, str]

    def __call__(self, copy: Path, tests: list[str], limit: float | None, *options: str) -> Ran:
        """Runs tests, for at most so many seconds.

        Raises:
            SystemExit: pytest did not run these tests.
        """
        listed = copy / "reached.txt"
        listed.write_text("\n".join(tests))
        one = len(tests) <= FEW and "::" in tests[0]
        numbers = [] if one else ["-n", str(self.processes), "--dist", "loadfile"]
        status, output = self._python(copy, ["-m", "pytest", *numbers, *options, f"@{listed}"], limit)
        failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", output, re.MULTILINE)
        if status is None:
            return Ran(f"the limit of {limit:.0f} s")
        if status < 0:
            return Ran(f"signal {-status}")
        if status == pytest.ExitCode.OK:
            return Ran("")
        if failed and status in (pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.INTERRUPTED):
            return Ran(failed[1])
        if status == pytest.ExitCode.TESTS_FAILED and "Timeout (" in output:
            return Ran("a test that hangs")
        if status == pytest.ExitCode.USAGE_ERROR and not self._collects(copy, tests):
            return Ran("an error at import")
        raise SystemExit(f"pytest ended with {status}:\n{output[-4000:]}")

    def _collects(self, copy: Path, tests: list[str]) -> bool:
        """Whether the files of tests are still collected; asked where pytest does not find a test by its name."""
        files = sorted(set(map(file_of, tests)))
        status, output = self._python(copy, ["-m", "pytest", "--collect-only", *files], None)
        return status != pytest.ExitCode.INTERRUPTED and "while loading conftest" not in output

    def _python(self, copy: Path, arguments: list[str], limit: float | None) -> tuple[int | None, str]:
        """The exit status and the output; None if it did not end in time."""
        here = {
            **os.environ,
            **self.settings,
            "PYTHONPATH": str(copy),  # not the package that is installed
            "REACHED": str(copy / "reached"),
        }
        command = [sys.executable, *arguments]
        with subprocess.Popen(
            command, cwd=copy, env=here, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        ) as process:  # fmt: skip
            try:
                output, _ = process.communicate(timeout=limit)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                return None, ""
            return process.returncode, output


def found_by(place: Place, copy: Path, candidates: Iterator[list[str]], tests: Tests, run: Run) -> tuple[str, int]:
    """The first test that finds a mutant, empty if none does, and the number of tests that were started."""
    path = copy / place.path
    source = path.read_text()
    path.write_text(place.mutated(source))
    tried = 0
    try:
        for some in candidates:
            tried += len(some)
            limit = START + 5 * sum(tests.seconds[test] for test in some)
            if found := run(copy, some, limit, "-x").found:
                return found, tried
        return "", tried
    finally:
        path.write_text(source)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=40, help="mutants")
    parser.add_argument("--seed", type=int, default=0, help="draws the places")
    parser.add_argument("--only", default="", help="numbers of the places to run: 3,17")
    parser.add_argument("--tests", nargs="+", default=FOLDERS, help="files and folders of tests, relative to the root")
    parser.add_argument("--long", action="store_true", help="the tests of make long")
    parser.add_argument("--most", type=int, default=10**6, help="tests that are tried on a mutant")
    parser.add_argument("--processes", type=int, default=2, help="processes that run tests")
    parser.add_argument("--recorded", type=Path, help="a file for what the first run shows; read if it is there")
    given = parser.parse_args()
    chosen = dict(enumerate(drawn(given.count, given.seed), 1))
    wanted = list(map(int, given.only.split(","))) if given.only else [*chosen]
    left = []
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name, "copy")
        ignored = shutil.ignore_patterns(".git", ".venv*", "out", "__pycache__", ".*_cache")
        shutil.copytree(ROOT, copy, ignore=ignored)
        run = Run(given.processes, {"LONG": "1", "IDIOMS": "all"} if given.long else {})
        if given.recorded and given.recorded.exists():
            tests = load(chosen, given.recorded)
        else:
            start = time.perf_counter()
            tests = recorded(chosen, copy, run, given.tests)
            print(f"{len(tests.seconds)} tests, recorded in {time.perf_counter() - start:.0f} s", flush=True)
            if given.recorded:
                save(tests, chosen, given.recorded)
        for number in wanted:
            start = time.perf_counter()
            candidates = tests.candidates(number, chosen[number], given.most)
            test, tried = found_by(chosen[number], copy, candidates, tests, run)
            spent = time.perf_counter() - start
            reached = len(tests.reaching.get(number, ()))
            says = f"{test or 'NOT FOUND'} ({tried} tests started, {reached} reach it, {spent:.0f} s)"
            print(f"{number:3} {chosen[number]}\n    {says}", flush=True)
            if not test:
                left.append(number)
    print(f"{len(wanted) - len(left)} of {len(wanted)} found; not found: {', '.join(map(str, left)) or 'none'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
