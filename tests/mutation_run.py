"""Breaks the package in places drawn at random, one at a time, and says for each which test finds it.

    python tests/mutation_run.py --count 40 --seed 1            the tests of the file's folder, then all others
    python tests/mutation_run.py --args "--deselect ..."        options for pytest, to compare two choices of tests
    python tests/mutation_run.py --only 3,17                    some of the places, by number

A mutant is the package with one expression or statement changed: a comparison turned round, ``and`` for ``or``, a sum
for a difference, a number one larger, a condition negated, a result dropped, a call left out. Runs in a copy of the
repository. Mutants that no test finds are listed at the end; some of them do the same as the package.
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TURNED = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.FloorDiv: ast.Mult, ast.Div: ast.Mult,
}  # fmt: skip
LONGEST = 1800  # seconds of one run of the tests


@dataclass(frozen=True)
class Place:
    """One change to one file.

    Attributes:
        path: The file, relative to the repository.
        start, end: Characters of the file that are replaced.
        new: What replaces them.
    """

    path: Path
    line: int
    start: int
    end: int
    old: str
    new: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {_short(self.old)} -> {_short(self.new)}"

    def mutated(self, source: str) -> str:
        return source[: self.start] + self.new + source[self.end :]


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
            yield Place(path, node.lineno, start, end, source[start:end], new)


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


def found_by(place: Place, copy: Path, options: list[str]) -> tuple[str, float]:
    """The first test that finds a mutant, and the seconds that it took; empty if none does."""
    start = time.perf_counter()
    path = copy / place.path
    source = path.read_text()
    path.write_text(place.mutated(source))
    here = {**os.environ, "PYTHONPATH": str(copy)}  # not the package that is installed
    try:
        folder = Path("tests", *place.path.parent.parts[1:2])
        for tests in [folder] * (folder != Path("tests") and (copy / folder).is_dir()) + [Path("tests")]:
            command = [
                sys.executable,
                "-m",
                "pytest",
                "-q",
                "-x",
                "-n",
                "2",
                "--dist",
                "loadfile",
                *options,
                str(tests),
            ]
            try:
                ran = subprocess.run(
                    command, cwd=copy, env=here, capture_output=True, text=True, timeout=LONGEST, check=False
                )
            except subprocess.TimeoutExpired:
                return "the time limit", time.perf_counter() - start
            if ran.returncode:
                failed = re.search(r"^(?:FAILED|ERROR) (\S+)", ran.stdout, re.MULTILINE)
                return failed[1] if failed else "an error at import", time.perf_counter() - start
        return "", time.perf_counter() - start
    finally:
        path.write_text(source)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=40, help="mutants")
    parser.add_argument("--seed", type=int, default=0, help="draws the places")
    parser.add_argument("--only", default="", help="numbers of the places to run: 3,17")
    parser.add_argument("--args", default="", help="options for pytest")
    given = parser.parse_args()
    chosen = dict(enumerate(drawn(given.count, given.seed), 1))
    wanted = list(map(int, given.only.split(","))) if given.only else [*chosen]
    left = []
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name, "copy")
        ignored = shutil.ignore_patterns(".git", ".venv*", "out", "__pycache__", ".*_cache")
        shutil.copytree(ROOT, copy, ignore=ignored)
        for number in wanted:
            test, seconds = found_by(chosen[number], copy, shlex.split(given.args))
            print(f"{number:3} {chosen[number]}\n    {test or 'NOT FOUND'} ({seconds:.0f} s)", flush=True)
            if not test:
                left.append(number)
    print(f"{len(wanted) - len(left)} of {len(wanted)} found; not found: {', '.join(map(str, left)) or 'none'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
