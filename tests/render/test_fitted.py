"""Tables that do not fit their terminal."""

from __future__ import annotations

import io

import pytest
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipecompile.render.fitted import Fitted

NAMES = ("stage", "forward", "backward", "weights", "saved")
ROWS = (("0", "1.20 ms", "2.00 ms", "258 MiB", "109 MiB"), ("1", "1.07 ms", "1.80 ms", "108 MiB", "108 MiB"))


def figures(footer: bool = False, title: str | None = None, caption: Text | None = None) -> Table:
    it = Table(
        box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_footer=footer, title=title, caption=caption
    )
    for name in NAMES:
        it.add_column(name, "all" if name == "stage" else "sum", justify="right", no_wrap=True)
    for row in ROWS:
        it.add_row(*row)
    return it


def printed(table: Table, width: int, keys: int = 1) -> str:
    console = Console(width=width, file=io.StringIO(), no_color=True)
    console.print(Fitted(table, keys))
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())  # type: ignore[attr-defined]


def test_a_table_that_fits_is_printed_as_it_is() -> None:
    console = Console(width=60, file=io.StringIO(), no_color=True)
    console.print(figures())
    assert printed(figures(), 60) == "\n".join(
        line.rstrip()
        for line in console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    )


def test_a_narrow_terminal_gets_parts_with_the_first_column_each() -> None:
    assert printed(figures(footer=True), 26).split("\n\n")[0].strip("\n").splitlines() == [
        " stage  forward  backward",
        " ────────────────────────",
        "     0  1.20 ms   2.00 ms",
        "     1  1.07 ms   1.80 ms",
    ]
    text = printed(figures(footer=True), 26)
    assert text.count("stage") == text.count("all") == 2
    assert all(cell in text for row in ROWS for cell in row)


@pytest.mark.parametrize("width", range(17, 60))
def test_no_width_cuts_a_figure(width: int) -> None:
    text = printed(figures(), width)
    assert all(cell in text for row in ROWS for cell in row[1:])
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width


def test_each_part_repeats_as_many_columns_as_are_keys() -> None:
    text = printed(figures(), 27, keys=2)
    assert text.count("stage") == text.count("1.20 ms") == 3


def test_the_title_is_above_the_first_part_and_the_caption_below_the_last() -> None:
    lines = printed(figures(title="costs", caption=Text("one microbatch")), 26).splitlines()
    assert [line.strip() for line in lines].count("costs") == 1
    assert lines[0].strip() == "costs"
    assert lines[-1] == "one microbatch"


def test_text_is_folded_before_columns_are_moved() -> None:
    it = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    it.add_column("module")
    it.add_column("forward", no_wrap=True)
    it.add_row("transformer.encoder.layers.0.attention", "1.20 ms")
    text = printed(it, 30)
    assert "".join(line[:20].strip() for line in text.splitlines()[3:]) == "transformer.encoder.layers.0.attention"
    assert text.count("1.20 ms") == 1
