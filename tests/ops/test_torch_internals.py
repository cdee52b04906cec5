"""What is taken from torch beyond its public interface stands in one file, and this torch has all of it."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import pipecompile
from pipecompile.ops import torch_internals

PACKAGE = Path(pipecompile.__file__).parent
HOME = Path(torch_internals.__file__)
EXPERIMENTAL = "torch.fx.experimental"
ATTRIBUTES = [  # what is patched, overridden or called on objects of torch's
    (torch.utils.checkpoint, "_checkpoint_without_reentrant_generator"),
    (torch_internals.ShapeEnv, "_set_replacement"),
    (nn.Module, "_call_impl"),
    (torch.Tensor, "_version"),
    (torch.autograd.Variable._execution_engine, "queue_callback"),
]


def private_imports(source: str) -> Iterator[tuple[str, str]]:
    """Modules and names that a source imports from behind torch's public interface."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "torch":
            for alias in node.names:
                parts = [*node.module.split("."), alias.name]
                if node.module.startswith(EXPERIMENTAL) or any(part.startswith("_") for part in parts):
                    yield node.module, alias.name
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith(("torch._", EXPERIMENTAL)) or "._" in alias.name:
                    yield alias.name, ""


TAKEN = sorted(set(private_imports(HOME.read_text())))


def test_there_are_some() -> None:
    assert len(TAKEN) > 30


@pytest.mark.parametrize(("module", "name"), TAKEN, ids=[".".join(filter(None, pair)) for pair in TAKEN])
def test_this_torch_has(module: str, name: str) -> None:
    found = importlib.import_module(module)
    assert not name or hasattr(found, name), f"torch {torch.__version__} has no {module}.{name}"


@pytest.mark.parametrize(("owner", "name"), ATTRIBUTES, ids=[name for _, name in ATTRIBUTES])
def test_this_torch_has_the_attribute(owner: object, name: str) -> None:
    assert hasattr(owner, name), f"torch {torch.__version__} has no {owner}.{name}"


def test_no_other_file_goes_behind_torchs_interface() -> None:
    files = [file for file in PACKAGE.rglob("*.py") if file != HOME]
    wrong = {str(file.relative_to(PACKAGE)): [*private_imports(file.read_text())] for file in files}
    assert {file: names for file, names in wrong.items() if names} == {}


@pytest.mark.parametrize(
    "line",
    [
        "from torch._C import x",
        "from torch.fx import _graph",
        "import torch._dynamo",
        "import torch.utils._pytree as p",
    ],
)
def test_such_an_import_would_show(line: str) -> None:
    assert list(private_imports(line))
    assert not list(private_imports("from torch.utils import checkpoint"))
