"""``python -m pipecompile``, and the command ``pipecompile``."""

from __future__ import annotations

import sys
import traceback

BUG = 3  # exit code of an error that is not pipecompile's own: 1 says that results differ


def main() -> None:
    """Runs the command line, which needs the extra ``pipecompile[cli]``."""
    try:
        from pipecompile.cli.main import app
    except ModuleNotFoundError as error:
        if error.name != "typer":
            raise
        sys.exit("error: the command line needs typer, which is not installed; pip install 'pipecompile[cli]'")
    try:
        app(prog_name="pipecompile")
    except Exception:
        traceback.print_exc()
        sys.exit(BUG)


if __name__ == "__main__":
    main()
