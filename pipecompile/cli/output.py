"""Where commands print: results on stdout, everything else on stderr."""

from __future__ import annotations

import json
import sys
from contextlib import AbstractContextManager
from math import isfinite
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from pipecompile.errors import InputError


def print_json(facts: Any) -> None:
    """Prints an object as JSON on stdout. Numbers that JSON does not have (infinity) are null."""
    sys.stdout.write(json.dumps(_finite(facts), indent=1, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    match value:
        case float():
            return value if isfinite(value) else None
        case dict():
            return {key: _finite(each) for key, each in value.items()}
        case list() | tuple():
            return [_finite(each) for each in value]
    return value


def write(text: str, path: Path | None) -> None:
    """Writes a text to a file, and says so on stderr; without a file, writes it to stdout.

    Raises:
        InputError: the file cannot be written.
    """
    if path is None:
        sys.stdout.write(text if text.endswith("\n") else f"{text}\n")
        return
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}; choose another path") from error
    say(Text(f"wrote {path}", "dim"))


def say(text: Text) -> None:
    """Prints a line on stderr."""
    Console(stderr=True).print(text, soft_wrap=True)


def working(on: str) -> AbstractContextManager[Any]:
    """A context during which stderr shows what a command works on, if it is a terminal."""
    return Console(stderr=True).status(f"{on} …")
