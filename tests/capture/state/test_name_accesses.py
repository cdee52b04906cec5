"""The names that code reads are found whatever instructions the running version of Python has for it."""

from __future__ import annotations

from typing import Any

from pipecompile.capture.state.name_accesses import Accesses


class Base:
    scale = 2.0

    def forward(self, x: Any) -> Any:
        return x


class Reads(Base):
    def forward(self, x: Any) -> Any:
        return super().forward(x) * super().scale  # one instruction each, since Python 3.12

    def of_a_file(self, x: Any, y: Any) -> Any:
        import math
        import os.path as paths

        z = y * math.pi  # two local variables are loaded by one instruction, since Python 3.13
        return [paths.sep for each in (x, z)]


def test_attributes_that_are_read_by_super() -> None:
    assert {"forward", "scale"} <= Accesses.of(Reads.forward.__code__).attributes


def test_attributes_of_files_that_a_function_imports() -> None:
    found = Accesses.of(Reads.of_a_file.__code__)
    assert ("math", "pi") in found.of_imports
    assert ("os.path", "path") in found.of_imports
    assert {"pi", "sep"} <= found.attributes


def test_variables_of_an_outer_function() -> None:
    kept: list[Any] = []

    def inner(x: Any, y: Any) -> Any:
        kept.append(x)
        return lambda: (kept, y)

    assert ("kept", "append") in Accesses.of(inner.__code__).of_outer
    assert ("y",) not in Accesses.of(inner.__code__).of_outer, "its own"
