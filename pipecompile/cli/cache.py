"""``pipecompile cache``: shows the entries of the cache of costs, links and plans, and removes them."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipecompile.cli.arguments import AsJson
from pipecompile.cli.output import print_json
from pipecompile.compiler.disk_cache import OFF, VARIABLE, DiskCache, Entry
from pipecompile.errors import InputError
from pipecompile.ir.units import bytes_text, plural
from pipecompile.render.fitted import Fitted

COLUMNS = ("what", "model", "inputs", "devices", "torch", "written")


def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Remove all entries.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show or clear what earlier runs have measured and planned. PIPECOMPILE_CACHE names another folder, or off."""
    kept = DiskCache.of_user()
    removed = cleared(kept) if clear else 0
    if as_json:
        print_json(facts(kept) | ({"removed": removed} if clear else {}))
    elif clear and kept.folder is not None:
        typer.echo(f"removed {_entries(removed)} from {kept.folder}")
    else:
        show(kept, Console())


def facts(cache: DiskCache) -> dict[str, Any]:
    """The folder and its entries, ready for JSON."""
    entries = [
        {"path": str(it.path), "bytes": it.nbytes, **it.about, **({"ignored": it.ignored} if it.ignored else {})}
        for it in cache.entries()
    ]
    return {"folder": None if cache.folder is None else str(cache.folder), "entries": entries}


def show(cache: DiskCache, console: Console) -> None:
    """Prints the entries as a table, and the folder."""
    if cache.folder is None:
        console.print(f"nothing is kept: {VARIABLE}={OFF}")
        return
    entries = cache.entries()
    if entries:
        table = Table(*COLUMNS, "size", box=None, padding=(0, 1), header_style="bold")
        for entry in entries:
            table.add_row(*_cells(entry))
        console.print(Fitted(table, keys=2))
    size = bytes_text(sum(entry.nbytes for entry in entries))
    console.print(Text(f"{_entries(len(entries))}, {size}, in {cache.folder}"), soft_wrap=True)


def cleared(cache: DiskCache) -> int:
    """Removes all entries, and returns how many there were.

    Raises:
        InputError: a file cannot be removed.
    """
    if cache.folder is None:
        return 0
    try:
        return cache.clear()
    except OSError as error:
        raise InputError(f"cannot remove {error.filename} ({error.strerror}); remove the folder yourself") from error


def _cells(entry: Entry) -> list[Text]:
    if entry.ignored:
        cells = [entry.path.name, f"ignored: it {entry.ignored}", *[""] * (len(COLUMNS) - 2)]
    else:
        cells = [entry.about.get(column, "") for column in COLUMNS]
    return [*map(Text, cells), Text(bytes_text(entry.nbytes))]


def _entries(count: int) -> str:
    return plural(count, "entry") if count == 1 else f"{count:,} entries"
