"""Makes the options of a command from the fields of a dataclass; their help comes from its docstring.

So the command line offers the same options as ``compile``, with the same documentation. Fields of structured types are
written as text: ``--pin encoder=0``, ``--colocate embed,head``, ``--replicas 1,2,1``. Typer, which makes the other
options, takes the parameters of a function only.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from functools import wraps
from typing import Annotated, Any, Literal, get_type_hints

import typer
from docstring_parser import parse

from pipecompile.errors import InputError
from pipecompile.ir.plan_options import AT_RUN_TIME

SINGULAR = {"pins": "pin"}  # names of options that can be repeated
Read = Callable[[str, Any], Any]  # takes the option's name and typer's value, and returns the field's value


def takes(parameter: str, kind: type[Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Replaces a command's ``parameter`` of type ``kind``, a dataclass, with one option per field that plans read."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(command, eval_str=True)
        options = {field.name: _option(kind, field) for field in fields(kind) if field.metadata != AT_RUN_TIME}

        @wraps(command)
        def wrapped(**given: Any) -> Any:
            texts = {name: given.pop(name) for name in options}
            values = {name: options[name][1](text) for name, text in texts.items() if text not in (None, [])}
            return command(**given, **{parameter: kind(**values)})

        others = [p for name, p in signature.parameters.items() if name != parameter]
        wrapped.__signature__ = signature.replace(  # type: ignore[attr-defined]
            parameters=[*others, *(option for option, _ in options.values())]
        )
        return wrapped

    return decorate


def _option(kind: type[Any], field: Field[Any]) -> tuple[inspect.Parameter, Callable[[Any], Any]]:
    flag = f"--{SINGULAR.get(field.name, field.name).replace('_', '-')}"
    asked, read, form = READERS.get(get_type_hints(kind)[field.name], (str, _as_it_is, ""))
    lines = [p.description or "" for p in parse(kind.__doc__ or "").params if p.arg_name == field.name]
    text = " ".join(" ".join(lines).replace("``", "").split()).replace("[", r"\[")
    text = " ".join(filter(None, [text[:1].upper() + text[1:], form and f"Write {form}."]))
    default = None if field.default in (MISSING, ()) else field.default
    shown = Annotated[asked | None, typer.Option(flag, help=text)]  # type: ignore[valid-type]
    option = inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=shown)
    return option, lambda given: read(flag, given)


def _as_it_is(flag: str, given: Any) -> Any:
    return given


def _paths(flag: str, texts: Sequence[str]) -> tuple[str, ...]:
    return tuple(texts)


def _groups(flag: str, texts: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(text.split(",")) for text in texts)


def _pairs(flag: str, texts: Sequence[str]) -> dict[str, int | None]:
    return dict(_pair(flag, text) for text in texts)


def _pair(flag: str, text: str) -> tuple[str, int | None]:
    name, sign, number = text.rpartition("=")
    if not sign or not (number.isdecimal() or number.lower() == "none"):
        raise InputError(f"{flag} {text} does not end in =number; write name=number, such as {flag} x=0")
    return name, int(number) if number.isdecimal() else None


def _numbers(flag: str, text: str) -> Sequence[int] | Literal["auto"]:
    if text == "auto":
        return "auto"
    try:
        return tuple(map(int, text.split(",")))
    except ValueError:
        raise InputError(f"{flag} {text!r} is not a list of numbers; write auto, or numbers such as 1,2,1") from None


READERS: dict[Any, tuple[Any, Read, str]] = {
    int | None: (int, _as_it_is, ""),
    float: (float, _as_it_is, ""),
    float | None: (float, _as_it_is, ""),
    Sequence[str]: (list[str], _paths, "one path per use of the option"),
    Sequence[Sequence[str]]: (list[str], _groups, "one group per use of the option: a,b"),
    Mapping[str, int]: (list[str], _pairs, "one pair per use of the option: name=0"),
    Mapping[str, int | None]: (list[str], _pairs, "one pair per use of the option: name=0, or name=None"),
    Sequence[int] | Literal["auto"] | None: (str, _numbers, "1,2,1, or auto"),
}  # type of a field -> the type for typer, the reader of its value, and its syntax; other types are text
