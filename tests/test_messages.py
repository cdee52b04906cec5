"""Every message of an error, read from the source in one place, so that all speak in one voice.

A message says what was seen, why it cannot be, and what to do: ``'gpu' is not a device; use 'cpu'``. To read them all:
 ``python tests/test_messages.py``.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import pipecompile
from pipecompile import errors

PACKAGE = Path(pipecompile.__file__).parent
OURS = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, Exception)}
REMEDY = re.compile(r"; |\. Use |pip install|\bmust\b|\bdid you mean\b")
OF_DATA = {"PlanError", "ProgramError", "DeadlockError"}  # a plan or program of somebody's making is not valid
INNER = {"DependsOnData"}  # a reason to keep a part of the model whole, which takes another trace
NOT_ENGLISH = re.compile(
    r"\b(is|are|was|names?) no(ne)? (?!longer)|\bso many\b|\bnobody\b|\blest\b|\bthat is known here\b|\bso: |"
    r"\bcomputed? again\b|\ba microbatch takes\b|\bmake least\b|\bfor ever\b|\bhas no place for\b|\bwishe?s?\b"
)


@dataclass(frozen=True)
class Message:
    """``text`` has ``{expression}`` where a value is put in; ``place`` is ``folder/file.py:line``."""

    place: str
    error: str
    text: str


def messages() -> Iterator[Message]:
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Call(func=ast.Name(id=name), args=[first, *_]) if name in OURS:
                    text = _text(first)
                    if re.search(r"[a-z]", without_values(text)):  # a message that is passed on is written elsewhere
                        yield Message(f"{path.relative_to(PACKAGE)}:{node.lineno}", name, text)


def _text(node: ast.expr) -> str:
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(_text(part) for part in parts)
        case ast.FormattedValue(value=value):
            return f"{{{ast.unparse(value)}}}"
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _text(left) + _text(right)
    return f"{{{ast.unparse(node)}}}"


def without_values(text: str) -> str:
    return re.sub(r"\{.*?\}", "X", text)


MESSAGES = list(messages())


def test_there_are_messages_of_every_kind() -> None:
    """The reader itself: were it blind, the other tests would pass."""
    assert len(MESSAGES) > 150
    assert {"InputError", "CaptureError", "PlanError", "InfeasibleError", "ExecutionError"} <= {
        m.error for m in MESSAGES
    }


@pytest.mark.parametrize("kind", sorted({m.error for m in MESSAGES} - OF_DATA - INNER))
def test_messages_say_what_to_do(kind: str) -> None:
    silent = [f"{m.place}: {m.text}" for m in MESSAGES if m.error == kind and not REMEDY.search(without_values(m.text))]
    assert not silent, "\n".join(silent)


def test_messages_are_written_alike() -> None:
    """They begin in lower case, since a place or the name of the error stands before, and end without a full stop."""
    odd = [m for m in MESSAGES if re.match(r"[A-Z][a-z]+ ", m.text) or m.text.rstrip().endswith((".", ";", ","))]
    assert not odd, "\n".join(f"{m.place}: {m.text}" for m in odd)


def test_messages_are_plain_english() -> None:
    odd = [m for m in MESSAGES if NOT_ENGLISH.search(without_values(m.text))]
    assert not odd, "\n".join(f"{m.place}: {NOT_ENGLISH.findall(m.text)} {m.text}" for m in odd)


if __name__ == "__main__":
    for message in MESSAGES:
        print(f"{message.place} {message.error}: {message.text}")
