"""Arguments and options that several commands have, and the checks of their values."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Annotated

import typer

from pipecompile.errors import InputError

DTYPES = ("float32", "bfloat16", "float16")


def one_of(names: Collection[str]) -> Callable[[str], list[str]]:
    """Completes a word to names. Typer knows what to pass by the name of the argument."""

    def complete(incomplete: str) -> list[str]:
        return [name for name in names if name.startswith(incomplete)]

    return complete


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="[bold]module:function[/] or [bold]path/file.py:function[/], a function that returns (model, inputs); "
        "or [bold]hf:gpt2[/] or [bold]hf:path/or/name[/], the config of a transformers model.",
    ),
]
Length = Annotated[int, typer.Option(min=1, help="Sequence length of the sample inputs, for hf.")]
Microbatch = Annotated[
    int | None, typer.Option(min=1, help="Samples per microbatch. Default: all that MODEL returns; 2 for hf.")
]
Stages = Annotated[int, typer.Option("--stages", "-n", min=1, help="Number of stages.")]
Microbatches = Annotated[int, typer.Option("--microbatches", "-m", min=1, help="Number of microbatches per step.")]
Costs = Annotated[
    str | None,
    typer.Option(
        "--costs",
        help="[bold]measure[/] the seconds of each operation, [bold]count[/] its work, or a file of saved costs. "
        "Default: count with --cluster, otherwise measure.",
    ),
]
DeviceToMeasure = Annotated[str, typer.Option(help="Device to measure on.")]
Dtype = Annotated[
    str,
    typer.Option(help=f"Dtype of the weights: {', '.join(DTYPES)}.", autocompletion=one_of(DTYPES)),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


def check_choice(what: str, given: str, choices: Collection[str]) -> None:
    """Raises ``InputError`` if a word is not one of those that are known."""
    if given not in choices:
        raise InputError(f"{what} {given!r} is not known; it must be one of {', '.join(choices)}")


def per_stage(option: str, text: str, stages: int) -> list[float]:
    """The seconds of each stage: one number for all, or one for each.

    Raises:
        InputError: the text has another form, or a number cannot be a time.
    """
    try:
        seconds = [float(word) for word in text.split(",")]
    except ValueError:
        raise InputError(
            f"{option} {text!r} is not a number of seconds; write one number, or one per stage, such as 1,2,1,1"
        ) from None
    if not all(0 <= it < float("inf") for it in seconds):
        raise InputError(f"{option} {text!r} is negative or not finite; seconds must be finite and at least 0")
    if len(seconds) not in (1, stages):
        raise InputError(f"{option} has {len(seconds)} numbers for {stages} stages; give one, or {stages}")
    return seconds * stages if len(seconds) == 1 else seconds
