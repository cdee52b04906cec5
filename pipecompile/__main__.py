"""``python -m pipecompile``."""

from pipecompile.cli import app

app(prog_name="pipecompile")
