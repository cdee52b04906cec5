"""The package's folders are its layers: imports point down the list, no file imports itself in the end."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import networkx as nx
import pytest

import pipecompile
from pipecompile.capture.state import executed_code
from pipecompile.ops import source_lines

PACKAGE = Path(pipecompile.__file__).parent

# From the bottom up. A folder imports itself and folders above it in this list only; errors belong to all.
LAYERS = (
    "ir",
    "ops",
    "partition/solver",
    "partition",
    "schedule",
    "planning",
    "render",
    "capture/state",
    "capture",
    "batching/rules",
    "batching",
    "profile",
    "runtime",
    "distributed",
    "materialize",
    "compiler",
    "verify",
    "pipeline_view",
    "pipeline",
    "checkpoint",
    "forwards",
    "facade",
    "api",
    "cli",
    "__main__",
    "__init__",
)
WITHOUT_TORCH = ("ir", "partition/solver", "partition", "schedule", "planning", "render")
ROOT = (
    "errors",
    "pipeline_view",
    "pipeline",
    "forwards",
    "facade",
    "api",
    "__main__",
    "__init__",
)  # the only files that are in no folder
FILES = sorted(PACKAGE.rglob("*.py"))


def module_of(file: Path) -> str:
    """``pipecompile.capture.trace``; a package's is its ``__init__``."""
    return ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts)


MODULES = {module_of(file): file for file in FILES}


def layer_of(module: str) -> str:
    """The folder of a module, or its own name where it is in none."""
    inner = module.split(".")[1:]
    return "/".join(inner[:-1]) or inner[0]


@cache
def imports(source: str) -> tuple[str, ...]:
    """All modules and names that a source imports, anywhere in it."""
    found: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found += (f"{node.module}.{alias.name}" for alias in node.names)
    return tuple(found)


def modules_imported(source: str) -> set[str]:
    """The package's modules that a source imports."""
    found = set()
    for name in imports(source):
        if name.split(".")[0] == "pipecompile":
            tried = (name, name.rpartition(".")[0], f"{name}.__init__", f"{name.rpartition('.')[0]}.__init__")
            found.add(next(module for module in tried if module in MODULES))
    return found


def forbidden(layer: str, imported: Iterable[str]) -> list[str]:
    """Layers that one may not import."""
    below = {"errors", *LAYERS[: LAYERS.index(layer) + 1]} if layer != "errors" else {"errors"}
    return sorted({layer_of(module) for module in imported} - below)


def libraries(file: Path) -> set[str]:
    """The top names of all that a file imports."""
    return {each.split(".")[0] for each in imports(file.read_text())}


def issubclass_of_error(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, Exception)


def name(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def test_every_folder_is_a_layer_and_the_root_holds_next_to_nothing() -> None:
    found = {layer_of(module) for module in MODULES}
    assert found == {"errors", *LAYERS}
    assert {layer for layer in found if (PACKAGE / f"{layer}.py").exists()} == set(ROOT)
    assert sum((PACKAGE / layer).is_dir() for layer in found) <= 19


def test_every_folder_says_what_it_is_for() -> None:
    folders = [PACKAGE / layer / "__init__.py" for layer in LAYERS if (PACKAGE / layer).is_dir()]
    assert [name(file) for file in folders if not ast.get_docstring(ast.parse(file.read_text()))] == []


def test_imports_point_down() -> None:
    wrong = {name(f): forbidden(layer_of(m), modules_imported(f.read_text())) for m, f in MODULES.items()}
    assert {file: layers for file, layers in wrong.items() if layers} == {}


def test_no_file_imports_itself_in_the_end() -> None:
    pairs = ((m, other) for m, f in MODULES.items() for other in modules_imported(f.read_text()))
    graph = nx.DiGraph(pair for pair in pairs if pair[0] != pair[1])
    inner = graph.subgraph(module for module in graph if not module.endswith("__init__"))
    assert len(inner) > 100
    assert list(nx.simple_cycles(inner)) == []


def test_what_plans_knows_no_torch() -> None:
    heavy = {"torch", "transformers", "torchvision"}
    light = {"errors", *WITHOUT_TORCH}
    for module, file in MODULES.items():
        if layer_of(module) in light:
            assert heavy.isdisjoint(libraries(file)), name(file)
            assert {layer_of(other) for other in modules_imported(file.read_text())} <= light, name(file)


@pytest.mark.parametrize(
    ("library", "layers"),
    [
        ("networkx", {"partition/solver"}),
        ("typer", {"cli"}),
        ("bokeh", {"render"}),
        ("transformers", {"cli"}),
    ],
)
def test_a_library_is_known_in_its_place_alone(library: str, layers: set[str]) -> None:
    assert {layer_of(module) for module, file in MODULES.items() if library in libraries(file)} == layers


def test_transformers_is_imported_by_one_file() -> None:
    assert [name(file) for file in FILES if "transformers" in libraries(file)] == ["cli/huggingface.py"]


@pytest.mark.parametrize(
    ("layer", "line"),
    [
        ("ir", "from pipecompile.planning.plan_search import make_plan"),
        ("schedule", "def late():\n    import pipecompile.planning.memory_fit"),
        ("runtime", "from pipecompile.compiler.options import Options"),
        ("capture", "from pipecompile.runtime.compiled import Compiled"),
        ("capture/state", "from pipecompile.capture import Captured"),
        ("errors", "from pipecompile.ir import graph"),
    ],
)
def test_a_forbidden_import_would_show(layer: str, line: str) -> None:
    assert forbidden(layer, modules_imported(line))


def test_the_public_names_are_sixteen_or_fewer_beside_errors_and_exist() -> None:
    errors = {each for each in pipecompile.__all__ if issubclass_of_error(getattr(pipecompile, each))}
    assert errors >= {"CaptureError", "ExactnessError", "ExecutionError", "InputError", "PipecompileError", "PlanError"}
    assert 0 < len(set(pipecompile.__all__) - errors) <= 16
    assert sorted(pipecompile.__all__, key=str.lower) == sorted(set(pipecompile.__all__), key=str.lower)
    assert all(hasattr(pipecompile, each) for each in pipecompile.__all__)


def test_public_names_are_imported_from_their_own_files() -> None:
    homes = {each: getattr(pipecompile, each).__module__ for each in pipecompile.__all__}
    assert all(home.startswith("pipecompile.") for home in homes.values()), homes


def test_the_packages_own_folder_is_known_to_what_tells_a_users_code_from_ours() -> None:
    assert Path(source_lines.PACKAGE) == PACKAGE
    assert all(source_lines.is_library(str(file)) for file in FILES)
    codes = [compile("def f(): pass", str(file), "exec").co_consts[0] for file in FILES]
    assert all(executed_code.is_ignored(code, {"__name__": "users"}) for code in codes)


def test_large_nouns_are_built_by_keyword() -> None:
    """A reader need not count arguments; tables of figures are rows by meaning."""
    sources = {path: ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}
    nouns = {
        node.name
        for tree in sources.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        and any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list)
        and sum(isinstance(field, ast.AnnAssign) for field in node.body) > 4
    }
    assert "Stage" in nouns
    odd = [
        f"{path.relative_to(PACKAGE)}:{node.lineno} {ast.unparse(node.func)}"
        for path, tree in sources.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in nouns - {"Accelerator"} and len(node.args) > 4
    ]
    assert not odd
