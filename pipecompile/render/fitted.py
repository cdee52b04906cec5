"""Tables on narrow terminals: a table that does not fit is printed as several, one below another.

rich cuts cells that do not fit (``67.…``). Figures that are cut are wrong, so columns are moved instead: each part
repeats the first columns, which name the rows.

     stage  rank  params            stage  forward  backward
     ───────────────────            ────────────────────────
         0     0  67.7 M                0  1.20 ms   2.00 ms
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.padding import Padding
from rich.table import Column, Table
from rich.text import Text

LONGEST_WORD = 16  # columns that text which may be folded gets at least


@dataclass(frozen=True)
class Fitted:
    """A table that is printed in as many parts as the width needs. Its caption follows the last part.

    Args:
        table: the table; columns with ``no_wrap`` are never cut, others may be wrapped.
        keys: how many of its first columns each part repeats.
    """

    table: Table
    keys: int = 1

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        parts = list(self._parts(options.max_width))
        for number, columns in enumerate(parts):
            yield _part(self.table, columns, self.table.title if number == 0 else None)
        if self.table.caption is not None:
            yield self.table.caption if isinstance(self.table.caption, Text) else Text(str(self.table.caption))

    def _parts(self, width: int) -> Iterator[Sequence[Column]]:
        """The columns of each part."""
        _, right, _, left = Padding.unpack(self.table.padding)
        boxed = self.table.box is not None
        between = left + right + boxed
        first, rest = self.table.columns[: self.keys], self.table.columns[self.keys :]
        edges = 2 * boxed + (left + right) * self.table.pad_edge - between
        start = edges + sum(_least(column) + between for column in first)
        part, used = list(first), start
        for column in rest:
            needed = _least(column) + between
            if used + needed > width and len(part) > len(first):
                yield part
                part, used = list(first), start
            part.append(column)
            used += needed
        yield part


def _least(column: Column) -> int:
    """The width below which a column would be cut."""
    texts = [_plain(cell) for cell in (column.header, *column.cells, column.footer)]
    if column.no_wrap:
        return max(map(cell_len, texts))
    words = [cell_len(word) for text in texts for word in text.split()]
    return min(LONGEST_WORD, max(words, default=0))


def _plain(cell: RenderableType) -> str:
    return cell.plain if isinstance(cell, Text) else str(cell)


def _part(table: Table, columns: Sequence[Column], title: object) -> Table:
    part = Table(
        title=title,  # type: ignore[arg-type]
        box=table.box,
        padding=table.padding,
        pad_edge=table.pad_edge,
        show_footer=table.show_footer,
        title_style=table.title_style,
        header_style=table.header_style,
    )
    for column in columns:
        part.add_column(
            column.header,
            column.footer,
            justify=column.justify,
            no_wrap=column.no_wrap,
            overflow="crop" if column.no_wrap else "fold",
            ratio=column.ratio if len(columns) == len(table.columns) else None,
        )
    for row in zip(*(column.cells for column in columns), strict=True):
        part.add_row(*row)
    return part
