"""The command line: its commands, its errors and its exit codes.

A command's file declares its options and imports nothing large. What it calls is imported when it runs, so that
``--help``, ``--version``, ``schedule``, ``simulate`` and ``cache`` work without torch.

Exit codes: 0, done; 1, results differ (``check``, ``doctor``); 2, the input is not valid, or the model is refused; 3,
an error of another kind, with its traceback (see ``__main__``).
"""

from __future__ import annotations

import warnings
from typing import Annotated, Any

import typer
from rich.text import Text
from typer.core import TyperGroup

from pipecompile.cli.cache import cache
from pipecompile.cli.check import check
from pipecompile.cli.doctor import doctor
from pipecompile.cli.output import say
from pipecompile.cli.plan import plan
from pipecompile.cli.profile import profile
from pipecompile.cli.schedule import schedule
from pipecompile.cli.simulate import simulate
from pipecompile.errors import PipecompileError


class _Group(TyperGroup):
    """Prints an error of pipecompile, and each warning, as one message instead of a traceback or a source line."""

    def invoke(self, ctx: Any) -> Any:
        if ctx.params["debug"]:
            return super().invoke(ctx)
        shown, warnings.showwarning = warnings.showwarning, _say_warning
        try:
            return super().invoke(ctx)
        except PipecompileError as error:
            say(Text.assemble(("error: ", "bold red"), (str(error), "red")))
            raise typer.Exit(2) from None
        finally:
            warnings.showwarning = shown


def _say_warning(message: Warning | str, *where: Any, **options: Any) -> None:
    say(Text.assemble(("warning: ", "bold yellow"), str(message)))


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Split any PyTorch model over several devices and train it, without rewriting it.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"pipecompile {version('pipecompile')}")
        raise typer.Exit


@app.callback()
def main(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Read by ``_Group`` and ``_print_version``."""


for _command in (plan, check, schedule, simulate, profile, doctor, cache):
    app.command()(_command)
