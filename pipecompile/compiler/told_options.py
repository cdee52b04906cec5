"""The options of ``compile`` and ``replan`` as texts, the same in every process that was given the same ones."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pipecompile.compiler.options import Options, read_costs
from pipecompile.errors import InputError
from pipecompile.ir.graph import CostedGraph
from pipecompile.ir.plan_options import PlanOptions

PATHS = {"leaf_modules", "no_split", "colocate", "allow_mixing"}  # in any order: perhaps that of a set


def told_options(options: Options) -> dict[str, str]:
    """What each option is, by the name of the argument. Functions are told by their names.

    Of costs and cluster, which the first process reads, it is told whether they are given: then no process measures.
    """
    told = dict(_told(options))
    del told["asked"], told["found"]
    told["schedule"] = _text(options.schedule)  # none is 1F1B, since over processes no other is taken unasked
    if told.pop("finds_microbatches") == "True":
        told["microbatches"] = "None"
    told["costs"] = repr(options.costs or "measure") if isinstance(options.costs, str | None) else "saved costs"
    told["cluster"] = str(options.cluster and "given")
    return told


def told_replan(plan: PlanOptions | None, costs: str | Path | CostedGraph | None) -> dict[str, str]:
    """What each argument of ``replan`` is. All processes read saved costs, so of these the contents are told."""
    told = {"costs": _told_costs(costs), "plan": "None" if plan is None else "given"}
    return told | (dict(_told(plan)) if isinstance(plan, PlanOptions) else {"plan": _text(plan)})


def _told_costs(costs: str | Path | CostedGraph | None) -> str:
    try:
        read = read_costs(costs)
    except InputError as error:
        return f"{costs!r}, which cannot be used ({error})"
    if not isinstance(read, CostedGraph):
        return repr(read)
    return f"costs with the digest {hashlib.blake2b(read.to_json().encode(), digest_size=6).hexdigest()}"


def _told(options: Any) -> Iterator[tuple[str, str]]:
    for field in fields(options):
        value = getattr(options, field.name)
        if field.name in ("batching", "plan"):
            yield from _told(value)
        else:
            yield field.name, _in_any_order(value) if field.name in PATHS else _text(value)


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key!r}: {_text(value[key])}' for key in sorted(value, key=str))}}}"
    if isinstance(value, Set):
        return _in_any_order(value)
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
    if isinstance(value, np.generic):
        return _text(value.item())
    text = repr(value)
    return type(value).__qualname__ if " at 0x" in text else text


def _in_any_order(values: Iterable[Any]) -> str:
    texts = (_in_any_order(each) if isinstance(each, list | tuple) else _text(each) for each in values)
    return f"({', '.join(sorted(texts))})"
