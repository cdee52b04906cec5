"""Takes each synchronization out of the package, one at a time, and says which machine and scene show it.

    python tests/devices/sync_mutants.py [--only 3,7] [--write]

A synchronization is a statement that makes a stream or the host wait, or that records the use of memory on a stream.
Each is removed in a copy of the package, and the scenes run on the virtual devices until one gives other figures than
the CPU. ``--write`` puts the table into docs/devices.md.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CALLS = {"wait_event", "wait_stream", "synchronize", "used_here", "record_stream"}
# Scenes that show most of them.
FIRST = "evaluated or view or stream or outside or pipedream or from_cpu or cpu_too or tail_on or freed"
PAGE = ROOT / "docs" / "devices.md"
START, END = "<!-- synchronizations -->", "<!-- end of synchronizations -->"


@dataclass(frozen=True)
class Place:
    path: Path
    line: int
    text: str
    comment: str  # where it stands: class, function and branch

    @property
    def name(self) -> str:
        return f"`{self.text}` in {self.comment}"


def places() -> Iterator[Place]:
    for path in sorted((ROOT / "pipecompile").rglob("*.py")):
        tree = ast.parse(path.read_text())
        for scope, node in _statements(tree, ""):
            call = node.value
            if isinstance(call, ast.Call):
                called = call.func
                name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
                if name in CALLS:
                    yield Place(path.relative_to(ROOT), node.lineno, ast.unparse(node), scope)


def _statements(node: ast.AST, scope: str) -> Iterator[tuple[str, ast.Expr]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Expr):
            yield scope, child
        inner = isinstance(child, ast.FunctionDef | ast.ClassDef)
        yield from _statements(child, f"{scope}.{child.name}".lstrip(".") if inner else scope)


def shown_by(place: Place, copy: Path) -> str:
    """The first test that fails without a synchronization; empty if none does."""
    path = copy / place.path
    source = path.read_text()
    rows = source.splitlines(keepends=True)
    row = rows[place.line - 1]
    rows[place.line - 1] = row.replace(place.text, "pass") if place.text in row else re.sub(r"\S.*", "pass", row)
    path.write_text("".join(rows))
    try:
        return _first_failure(copy, "tests/devices/test_scenes.py", "-k", FIRST) or _first_failure(
            copy, "tests/devices"
        )
    except subprocess.TimeoutExpired:
        return "a run that hangs"
    finally:
        path.write_text(source)


def _first_failure(copy: Path, *tests: str) -> str:
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider", *tests]
    here = {**os.environ, "PYTHONPATH": str(copy), "LONG": "1"}  # the package of the copy; scenes on all machines
    run = subprocess.run(command, cwd=copy, capture_output=True, text=True, timeout=900, env=here, check=False)
    found = re.search(r"^(?:FAILED|ERROR) \S*/(\S+)\.py::(\S+)", run.stdout, re.MULTILINE)
    if found is None:
        return "" if run.returncode == 0 else f"exit status {run.returncode}"
    return f"{found[1]}: {found[2]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="numbers of places, separated by commas")
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    chosen = list(enumerate(places()))
    if given.only:
        numbers = set(map(int, given.only.split(",")))
        chosen = [(number, place) for number, place in chosen if number in numbers]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "out", "__pycache__"))
        for number, place in chosen:
            shown = shown_by(place, copy)
            rows.append((place, shown))
            print(f"{number:3} {place.path}:{place.line} {place.text}: {shown or 'NOT SHOWN'}", flush=True)
    print(f"{sum(bool(shown) for _, shown in rows)} of {len(rows)} shown")
    if given.write:
        _write(rows)
    sys.exit(not all(shown for _, shown in rows))


def _write(rows: list[tuple[Place, str]]) -> None:
    lines = ["| without | in | shows in |", "|---|---|---|"]
    lines += [
        f"| `{place.text}` | `{place.path.name}`, {place.comment} | {shown or 'nothing'} |" for place, shown in rows
    ]
    text = PAGE.read_text()
    start, end = text.index(START) + len(START), text.index(END)
    PAGE.write_text(text[:start] + "\n" + "\n".join(lines) + "\n" + text[end:])


if __name__ == "__main__":
    main()
