"""What ``pipecompile cache`` prints: the entries of the cache of costs, links and plans."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipecompile.compiler.disk_cache import OFF, VARIABLE, DiskCache, Entry
from pipecompile.errors import InputError
from pipecompile.ir.units import bytes_text, plural

COLUMNS = ("what", "model", "inputs", "devices", "torch", "written")


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
        console.print(table)
    size = bytes_text(sum(entry.nbytes for entry in entries))
    console.print(Text(f"{_entries(len(entries))}, {size}, in {cache.folder}"), soft_wrap=True)


def clear(cache: DiskCache) -> str:
    """Removes all entries. Returns what was done, in words.

    Raises:
        InputError: a file cannot be removed.
    """
    if cache.folder is None:
        return f"nothing is kept: {VARIABLE}={OFF}"
    try:
        return f"removed {_entries(cache.clear())} from {cache.folder}"
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
