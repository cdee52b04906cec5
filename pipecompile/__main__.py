"""``python -m pipecompile``, and the command ``pipecompile``."""

from __future__ import annotations

import sys


def main() -> None:
    """Runs the command line, which needs the extra ``pipecompile[cli]``."""
    try:
        from pipecompile.cli.main import app
    except ModuleNotFoundError as error:
        if error.name != "typer":
            raise
        sys.exit("error: the command line needs typer, which is not installed; pip install 'pipecompile[cli]'")
    app(prog_name="pipecompile")


if __name__ == "__main__":
    main()
