"""Imports point down the list of layers, and what plans knows no torch."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import pipecompile

PACKAGE = Path(pipecompile.__file__).parent

# From the bottom up; a part imports parts of lower layers only. "with torch" begins at TORCH.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors", "serial", "accelerators", "turns"),
    ("graph", "cluster", "quality", "wishes", "plan", "program", "timeline", "versions", "verification"),
    ("microbatch",),
    ("partition", "schedule", "lower", "simulate", "memory", "calibrate"),
    ("render",),
    ("workload",),
    ("request",),
    ("fitting",),
    ("planning",),
    ("replicate",),
    ("operators",),
    ("row_draws",),
    ("lines", "regions", "functions", "custom", "names", "randomness", "retarget", "modules"),
    ("recompute",),
    ("capture",),
    ("batching",),
    ("profile", "split", "runtime"),
    ("variations",),
    ("devices", "options", "surroundings"),
    ("compiled",),
    ("captures", "report", "snapshot"),
    ("session",),
    ("steps",),
    ("rehearse", "comparison", "observed"),
    ("side_by_side",),
    ("blame", "rounding"),
    ("compile_call", "verify", "prove"),
    ("pipeline",),
    ("api",),
    ("huggingface",),
    ("models",),
    ("cli",),
    ("__main__", "__init__"),
)
NOUNS = LAYERS[:2]  # these import each other within a layer, in the order in which they stand
TORCH = 10
EXCEPTIONS = {
    ("runtime", "split"): "reads the noun Stage",
}
LAYER_OF = {part: layer for layer, parts in enumerate(LAYERS) for part in parts}
FILES = sorted(PACKAGE.rglob("*.py"))


def part_of(file: Path) -> str:
    """The first name below the package: ``capture`` for ``capture/trace.py``."""
    return file.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(source: str) -> Iterator[str]:
    """All modules that a source imports, anywhere in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def parts_imported(source: str) -> set[str]:
    return {name.split(".")[1] for name in imports(source) if name.startswith("pipecompile.")}


def may_import(part: str, other: str) -> bool:
    if part == other or (part, other) in EXCEPTIONS:
        return True
    below, above = LAYER_OF[other], LAYER_OF[part]
    if below == above:
        return LAYERS[above] in NOUNS and LAYERS[above].index(other) < LAYERS[above].index(part)
    return below < above


def names(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def test_every_file_has_a_layer() -> None:
    assert {part_of(file) for file in FILES} == set(LAYER_OF)


@pytest.mark.parametrize("file", FILES, ids=names)
def test_imports_point_down(file: Path) -> None:
    part = part_of(file)
    known = {name for name in parts_imported(file.read_text()) if part != "__init__" or name in LAYER_OF}
    assert [other for other in sorted(known) if not may_import(part, other)] == []


@pytest.mark.parametrize("file", [f for f in FILES if LAYER_OF[part_of(f)] < TORCH], ids=names)
def test_what_plans_knows_no_torch(file: Path) -> None:
    heavy = {"torch", "transformers", "torchvision", "numpy.random"}
    assert heavy.isdisjoint(name.split(".")[0] for name in imports(file.read_text()))


def test_only_the_partition_knows_networkx_and_only_the_command_line_typer() -> None:
    users = {"networkx": set(), "typer": set()}
    for file in FILES:
        for name in imports(file.read_text()):
            if name.split(".")[0] in users:
                users[name.split(".")[0]].add(part_of(file))
    assert users == {"networkx": {"partition"}, "typer": {"cli"}}


def test_transformers_is_imported_where_it_is_optional_alone() -> None:
    users = {part_of(file) for file in FILES for name in imports(file.read_text()) if name.startswith("transformers")}
    assert users == {"huggingface"}


def test_every_exception_is_in_use() -> None:
    used = {(part_of(file), other) for file in FILES for other in parts_imported(file.read_text())}
    assert used >= EXCEPTIONS.keys()


@pytest.mark.parametrize(
    ("part", "line"),
    [
        ("graph", "from pipecompile.plan import Plan"),
        ("lower", "from pipecompile.simulate import simulate"),
        ("simulate", "def late():\n    import pipecompile.partition"),
        ("split", "from pipecompile.profile import profile"),
        ("capture", "from pipecompile.compiled import Compiled"),
        ("errors", "from pipecompile import graph"),
    ],
)
def test_a_forbidden_import_would_show(part: str, line: str) -> None:
    assert [other for other in parts_imported(line) if not may_import(part, other)]


def test_the_public_names_are_ten_or_fewer_and_exist() -> None:
    assert 0 < len(pipecompile.__all__) <= 10
    assert sorted(pipecompile.__all__, key=str.lower) == sorted(set(pipecompile.__all__), key=str.lower)
    assert all(hasattr(pipecompile, name) for name in pipecompile.__all__)


def test_public_names_are_imported_from_their_own_files() -> None:
    homes = {name: getattr(pipecompile, name).__module__ for name in pipecompile.__all__}
    assert all(home.startswith("pipecompile.") for home in homes.values()), homes
