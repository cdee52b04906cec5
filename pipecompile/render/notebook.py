"""What notebooks show: small static HTML without scripts, in the colors of the notebook, light or dark."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from pipecompile.ir.units import bytes_text, count_text, seconds_text
from pipecompile.render.escape import xml
from pipecompile.render.labels import modules_line
from pipecompile.render.page import Page
from pipecompile.render.topics import TOPICS

COLUMNS = ("stage", "device", "modules", "parameters", "forward", "backward", "peak")
CELL = "text-align: left; padding: 2px 12px 2px 0; border: 0; border-bottom: 1px solid rgba(128, 128, 128, 0.3)"
SOFT = "opacity: 0.75; font-size: 90%"


def page_html(page: Page) -> str:
    """The stages of a pipeline or of a plan, with its steps."""
    facts = [page.devices, f"{page.microbatches} microbatch{'es' if page.microbatches != 1 else ''}"]
    facts += [f"{name} {page.part} {text}" for name, text in page.steps.items()]
    costs = f"One microbatch, costs: {page.costs}. Peaks are predicted, for training."
    head = "".join(f'<th style="{CELL}">{name}</th>' for name in COLUMNS)
    return (
        f"<div><b>{xml(page.heading)}</b><div>{xml(' · '.join(filter(None, facts)))}</div>"
        f'<table style="border-collapse: collapse"><thead><tr>{head}</tr></thead><tbody>{_rows(page)}</tbody></table>'
        f'<div style="{SOFT}">{xml(costs)}</div></div>'
    )


def _rows(page: Page) -> str:
    return "".join(f"<tr>{_cells(_row(page, stage))}</tr>" for stage in range(len(page.view.stages)))


def _row(page: Page, stage: int) -> Iterable[str]:
    it = page.view.stages[stage]
    yield str(stage)
    yield page.device(it.rank)
    yield modules_line(page.view, stage)
    yield count_text(it.num_parameters)
    yield seconds_text(it.cost.forward)
    yield seconds_text(it.cost.backward)
    if page.memory is not None:
        limit = page.limit(it.rank)
        yield bytes_text(page.memory.stages[stage].total) + ("" if limit is None else f" of {bytes_text(limit)}")
    else:
        yield ""


def _cells(texts: Iterable[str]) -> str:
    return "".join(f'<td style="{CELL}">{xml(text)}</td>' for text in texts)


def topics_html(topics: Mapping[str, Sequence[str]]) -> str:
    """The lines of a report, by topic, in the order of ``TOPICS``; the first topics are open."""
    folds = []
    known = [name for name in TOPICS if name in topics]
    for name in (*known, *(name for name in topics if name not in TOPICS)):
        lines = topics[name]
        title, opened = TOPICS.get(name, (name, False))
        listed = "<br>".join(map(xml, lines))
        folds.append(f"<details{' open' * opened}><summary><b>{xml(title)}</b></summary>{listed}</details>")
    return f"<div>{''.join(folds)}</div>"


def not_captured(words: str) -> str:
    """A pipeline that has no plan yet."""
    return f'<div><code>{xml(words)}</code><div style="{SOFT}">captured and planned at the first call</div></div>'
