"""The report page: one HTML file that loads nothing, so it can be mailed, archived, or opened offline.

Text and tables are plain HTML. The figures (timelines, memory, stage graph) are drawn by bokeh, whose script is in the
page. Colors follow the reader's light or dark scheme.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module, resources
from pathlib import Path
from types import ModuleType

from pipecompile.errors import InputError
from pipecompile.ir.units import bytes_text, plural
from pipecompile.render.cells import SHADES, drawn_kinds, word_of
from pipecompile.render.escape import xml
from pipecompile.render.html_tables import cuts_table, nodes_folds, stages_table
from pipecompile.render.page import MEASURED, PREDICTED, Page
from pipecompile.render.table import totals
from pipecompile.render.topics import TOPICS

ZOOM = "Drag to pan. Zoom with the buttons, with Ctrl and the wheel, or with a box. Hover for details."
NOT_MEASURED = "Nothing was measured: no call has run this program yet."
COLORS = {
    "gray": "within a stage",
    "orange": "to the next stage",
    "purple": "past a stage",
}


def html(page: Page) -> str:
    """The report page of a pipeline or of a plan.

    Raises:
        InputError: bokeh is not installed.
    """
    scripts, places = figures().page_figures(page)
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{xml(page.heading)} · pipecompile</title>",
            f"<style>{_style()}</style>\n</head>\n<body>",
            *_header(page),
            *_timelines(page, places),
            *_memory(page, places),
            *_graph(page, places),
            *_section("Stages", f"One microbatch. Costs: {page.costs}.", stages_table(page)),
            *_section("What crosses each cut", "Bytes of one microbatch.", cuts_table(page.view)),
            *_topics(page),
            *_section(
                "Nodes", "All operations, by stage and module, in the order of execution.", nodes_folds(page.view)
            ),
            f"{scripts}\n</body>\n</html>\n",
        ]
    )


def write(page: Page, path: str | Path) -> None:
    """Writes the report page to a file.

    Raises:
        InputError: bokeh is not installed, or the file cannot be written.
    """
    text = html(page)
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}; give a path that can be written") from error


def figures() -> ModuleType:
    """The module that draws.

    Raises:
        InputError: bokeh is not installed.
    """
    try:
        return import_module("pipecompile.render.page_figures")  # bokeh is optional
    except ModuleNotFoundError as error:
        raise InputError(
            f"the report page needs bokeh, which draws its figures ({error}); pip install 'pipecompile[report]'"
        ) from error


def _style() -> str:
    return resources.files("pipecompile.render").joinpath("page.css").read_text(encoding="utf-8")


def _header(page: Page) -> Iterator[str]:
    view = page.view
    facts = {
        "model": page.model,
        "devices": page.devices,
        "schedule": page.schedule,
        "microbatches": str(page.microbatches or ""),
        **{f"{name} {page.part}": text for name, text in page.steps.items()},
        "largest peak": _largest(page),
        "parameters": totals(view)[0],
        "nodes": f"{len(view.costed.graph):,}",
        "across the cuts": f"{bytes_text(sum(cut.nbytes for cut in view.cuts))} per microbatch",
        "bottleneck / mean": f"{view.balance:.2f}",
        "costs": page.costs,
    }
    pairs = (f"<div><dt>{name}</dt><dd>{xml(text)}</dd></div>" for name, text in facts.items() if text)
    yield f'<header><h1>{xml(page.heading)}</h1><dl class="facts">{"".join(pairs)}</dl></header>'


def _largest(page: Page) -> str:
    if page.memory is None:
        return ""
    rank, nbytes = max(enumerate(page.memory.ranks), key=lambda pair: pair[1])
    limit = page.limit(rank)
    of = "" if limit is None else f" of {bytes_text(limit)}"
    return f"{bytes_text(nbytes)}{of} on rank {rank}, predicted"


def _section(title: str, hint: str, body: Iterator[str] | list[str]) -> Iterator[str]:
    yield f'<section><h2>{xml(title)}</h2><p class="hint">{xml(hint)}</p>'
    yield from body
    yield "</section>"


def _timelines(page: Page, places: Mapping[str, str]) -> Iterator[str]:
    if not page.timelines:
        return
    kinds = dict.fromkeys(kind for each in page.timelines.values() for kind in drawn_kinds(each))
    swatches = (f'<span><i style="background:{SHADES[kind][0]}"></i>{kind} {word_of(kind)}</span>' for kind in kinds)
    body = [f'<p class="legend">{"".join(swatches)}<span><i class="line"></i>transfer</span></p>']
    for name in page.timelines:
        body += [f'<h3>{name} {page.part}: {xml(page.steps[name])}</h3><div class="figure">{places[name]}</div>']
    if PREDICTED in page.timelines and MEASURED not in page.timelines:
        body.append(f'<p class="hint">{NOT_MEASURED}</p>')
    apart = "" if page.is_on_one_axis else "The two steps differ so much that each has a time axis of its own. "
    yield from _section("Timeline", f"What each rank computes, and when. {apart}{ZOOM}", body)


def _memory(page: Page, places: Mapping[str, str]) -> Iterator[str]:
    if "memory" not in places:
        return
    hint = f"Predicted bytes that each rank holds over the predicted timeline. {_heights(page)}"
    yield from _section("Memory", hint, [f'<div class="figure">{places["memory"]}</div>'])


def _heights(page: Page) -> str:
    if all(page.limit(rank) is None for rank in range(len(page.levels))):
        return "The devices have no known limit; the height of a row is the largest peak."
    if figures().near_limits(page):
        return "The dashed line is the limit, the memory of the device."
    return "No rank comes near the limit of its device; the height of a row is the largest peak."


def _graph(page: Page, places: Mapping[str, str]) -> Iterator[str]:
    hint = (
        "Modules in the order of execution, the redder the longer they take. Times are forward and backward of one "
        f"microbatch together. Costs: {page.costs}. {ZOOM}"
    )
    swatches = (f'<span><i class="line {color}"></i>{words}</span>' for color, words in COLORS.items())
    body = [f'<p class="legend">{"".join(swatches)}</p>', f'<div class="figure">{places["graph"]}</div>']
    yield from _section("Stage graph", hint, body)


def _topics(page: Page) -> Iterator[str]:
    known = [name for name in TOPICS if page.topics.get(name)]
    others = [name for name, lines in page.topics.items() if lines and name not in TOPICS]
    if not (known or others):
        return
    body = []
    for name in (*known, *others):
        title, opened = TOPICS.get(name, (name, False))
        lines = page.topics[name]
        items = "".join(f"<li>{xml(line)}</li>" for line in lines)
        summary = f'<summary><b>{xml(title)}</b><span class="soft">{plural(len(lines), "line")}</span></summary>'
        body.append(f'<details class="topic {xml(name)}"{" open" * opened}>{summary}<ul>{items}</ul></details>')
    yield from _section("Notes", "What pipe.pipeline.report says.", body)
