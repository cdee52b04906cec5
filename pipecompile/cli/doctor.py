"""``pipecompile doctor``: examines the machine."""

from __future__ import annotations

from typing import Annotated

import typer

from pipecompile.cli.arguments import AsJson


def doctor(
    devices: Annotated[
        str, typer.Option(help="Devices of the step, by commas: cuda:0,cuda:1. Default: all accelerators, or the CPU.")
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Look at the machine: devices, links, memory, versions, what works, and a step split over all devices.

    The exit code is 1 if that step is not exact.
    """
    from rich.console import Console

    from pipecompile.cli.examination import all_devices, examine
    from pipecompile.cli.output import print_json, working
    from pipecompile.compiler.devices import parse_devices

    places = parse_devices(devices.split(",")) if devices else all_devices()
    with working("examining the machine"):
        found = examine(places)
    if as_json:
        print_json(found.to_dict())
    else:
        found.show(Console())
    raise typer.Exit(not found.exact)
