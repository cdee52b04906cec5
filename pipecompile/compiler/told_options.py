"""The options of ``compile`` as texts that are the same in every process that was given the same ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

from pipecompile.compiler.options import Options

OF_THE_FIRST = {"costs", "cluster"}  # which the first process alone reads
LONGEST = 200  # characters


def told_options(options: Options) -> dict[str, str]:
    """What each option is, by the name of the argument. Functions are told by their names."""
    return dict(_told(options))


def _told(options: Any) -> Iterator[tuple[str, str]]:
    for field in fields(options):
        value = getattr(options, field.name)
        if field.name in ("batching", "plan"):
            yield from _told(value)
        elif field.name not in OF_THE_FIRST:
            yield field.name, _text(value)[:LONGEST]


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key!r}: {_text(value[key])}' for key in sorted(value, key=str))}}}"
    if isinstance(value, list | tuple):
        return f"({', '.join(map(_text, value))})"
    if isinstance(value, partial):
        return f"partial({', '.join(map(_text, (value.func, value.args, value.keywords)))})"
    if is_dataclass(value) and not isinstance(value, type):
        parts = (f"{field.name}={_text(getattr(value, field.name))}" for field in fields(value))
        return f"{type(value).__name__}({', '.join(parts)})"
    if callable(value):
        named = value if hasattr(value, "__qualname__") else type(value)
        return f"{named.__module__}.{named.__qualname__}"
    text = repr(value)
    return type(value).__qualname__ if " at 0x" in text else text
