"""``python -m pipecompile``."""

from pipecompile.cli.main import app

app(prog_name="pipecompile")
