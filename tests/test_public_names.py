"""Every public name has a docstring that says what a caller must know, and its examples run."""

from __future__ import annotations

import dataclasses
import doctest
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from collections import ChainMap
from collections.abc import Iterator
from typing import Any

import pytest

import pipecompile
from pipecompile.schedule import SCHEDULES

UNITS = re.compile(r"second|byte|fraction|part|ratio|times|number|count", re.IGNORECASE)
FUNCTIONS = sorted(name for name in pipecompile.__all__ if inspect.isfunction(getattr(pipecompile, name)))
CLASSES = sorted(name for name in pipecompile.__all__ if inspect.isclass(getattr(pipecompile, name)))
NOUNS = [name for name in CLASSES if dataclasses.is_dataclass(getattr(pipecompile, name))]

PAPERS = {  # names whose method is one of papers, and what says which
    "Batching": ["GPipe"],
    "Pipeline.versions": ["PipeDream"],
    "Plan": ["PipeDream"],
    "PlanOptions": ["PipeDream", "GPipe", "Device Placement of DNN"],
    "Program": ["Zero Bubble", "PipeDream"],
    "compile": [
        "GPipe", "Memory-Efficient", "PipeDream", "Megatron", "Zero Bubble", "Controllable Memory", "DeepSeek", "ZeRO"
    ],
}  # fmt: skip
OF_NOBODY = {"sequential"}  # schedules that no paper is about


def described(documented: Any) -> str:
    return inspect.getdoc(documented) or ""


def members() -> Iterator[tuple[str, Any]]:
    """Methods and properties that the package itself defines on public classes and their bases, by name."""
    for name in CLASSES:
        bases = [base for base in getattr(pipecompile, name).__mro__ if base.__module__.startswith("pipecompile.")]
        for member, value in ChainMap(*map(vars, bases)).items():
            inner = getattr(value, "__func__", None) or getattr(value, "fget", None) or getattr(value, "func", value)
            if not member.startswith("_") and inspect.isfunction(inner):
                yield f"{name}.{member}", inner


MEMBERS = dict(members())


def parameters(function: Any) -> list[str]:
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    found = inspect.signature(function).parameters.values()
    return [each.name for each in found if each.name not in ("self", "cls") and each.kind not in kinds]


def args_of(text: str) -> dict[str, str]:
    """The entries of ``Args`` or ``Attributes``: a name, a colon, and a description that may go on."""
    section = re.search(r"^(?:Args|Attributes):\n((?:(?:    .*)?\n?)*)", text, re.MULTILINE)
    entries = re.split(r"^    (?=\w+: )", section[1] if section else "", flags=re.MULTILINE)
    return dict(entry.split(": ", 1) for entry in entries if re.match(r"\w+: ", entry))


def test_there_are_names() -> None:
    assert len(FUNCTIONS) >= 6
    assert len(NOUNS) >= 8
    assert len(MEMBERS) > 40


@pytest.mark.parametrize("name", sorted({*FUNCTIONS, *CLASSES, *MEMBERS}))
def test_a_docstring_begins_with_a_sentence(name: str) -> None:
    text = described(MEMBERS[name] if name in MEMBERS else getattr(pipecompile, name))
    assert re.match(r"[`A-Z].*[.;:]", text.partition("\n\n")[0], re.DOTALL), text


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_describes_each_argument_its_result_and_its_errors(name: str) -> None:
    function = getattr(pipecompile, name)
    text = described(function)
    assert list(args_of(text)) == parameters(function)
    assert "Raises:\n" in text or name == "latest"  # passes over what is not a checkpoint
    assert "Returns:\n" in text or "returns" in text.lower() or function.__annotations__["return"] == "None" or (
        text.startswith("The ")
    )  # fmt: skip


@pytest.mark.parametrize("name", sorted(MEMBERS))
def test_a_method_names_each_of_its_arguments(name: str) -> None:
    text = described(MEMBERS[name])
    assert [each for each in parameters(MEMBERS[name]) if not re.search(rf"\b{each}\b", text)] == []


@pytest.mark.parametrize("name", NOUNS)
def test_the_docstring_of_a_noun_describes_its_fields(name: str) -> None:
    fields = [each.name for each in dataclasses.fields(getattr(pipecompile, name)) if not each.name.startswith("_")]
    assert list(args_of(described(getattr(pipecompile, name)))) == fields


@pytest.mark.parametrize("name", [*NOUNS, *FUNCTIONS])
def test_a_number_has_a_unit(name: str) -> None:
    documented = getattr(pipecompile, name)
    said = args_of(described(documented))
    numbers = [
        each for each, kind in inspect.get_annotations(documented).items() if re.match(r"(int|float)\b", str(kind))
    ]
    assert [each for each in numbers if each in said and not UNITS.search(f"{each} {said[each]}")] == []


def without_lines(name: str) -> str:
    return " ".join(described(MEMBERS[name] if name in MEMBERS else getattr(pipecompile, name)).split())


@pytest.mark.parametrize("name", PAPERS)
def test_a_method_of_a_paper_names_it_and_what_is_meant_of_it(name: str) -> None:
    text = without_lines(name)
    place = r"\d{4}[^;]*?, (sections? \d|its \w)"
    assert [each for each in PAPERS[name] if not re.search(rf"{each}[^;]*?{place}", text)] == []


@pytest.mark.parametrize("name", sorted({*FUNCTIONS, *CLASSES, *MEMBERS}))
def test_who_names_a_paper_is_held_to_it(name: str) -> None:
    assert name in PAPERS or not re.search(r"et al\.|\(\w+ (19|20)\d\d\)", without_lines(name))


def test_each_schedule_names_its_paper() -> None:
    sources = without_lines("compile").partition("Sources of the schedules: ")[2]
    named = {re.sub(r"-[34]$", "", name) for name in SCHEDULES} - OF_NOBODY
    assert len(named) > 10
    assert [name for name in sorted(named) if f'"{name}"' not in sources] == []


@pytest.mark.parametrize("name", [name for name in CLASSES if issubclass(getattr(pipecompile, name), Exception)])
def test_an_error_is_one_of_the_package(name: str) -> None:
    assert issubclass(getattr(pipecompile, name), pipecompile.PipecompileError)


def modules_with_examples() -> list[str]:
    found = (each.name for each in pkgutil.walk_packages(pipecompile.__path__, "pipecompile."))
    names = [name for name in found if not name.endswith("__main__")]
    return [name for name in names if ">>>" in (inspect.getsource(importlib.import_module(name)))]


def test_examples_in_docstrings_run() -> None:
    names = modules_with_examples()
    assert len(names) >= 4
    results = {name: doctest.testmod(importlib.import_module(name)) for name in names}
    assert sum(result.attempted for result in results.values()) >= 10
    assert {name: result for name, result in results.items() if result.failed} == {}


def test_the_first_use_of_a_name_draws_no_random_numbers() -> None:
    """``random.seed(0)`` before ``pipecompile.compile`` gives the numbers of the unsplit run."""
    script = (
        "import random, pipecompile\n"
        "random.seed(0)\n"
        "pipecompile.compile\n"
        "found = random.random()\n"
        "random.seed(0)\n"
        "assert found == random.random()\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
