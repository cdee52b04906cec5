"""The tables of the report page: stages, values that cross cuts, and all nodes in folds. Readable without scripts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from pipecompile.ir.units import bytes_text, names_text, plural, seconds_text
from pipecompile.render.escape import xml
from pipecompile.render.labels import module_path, modules_line, replica_notes, stage_lines, stage_name
from pipecompile.render.page import Page
from pipecompile.render.stage_graph import StageGraph
from pipecompile.render.table import NUMBERS, stage_numbers, totals

NODE_COLUMNS = ("node", "operation", "outputs", "-bytes", "-forward", "-backward", "-saved", "parameters", "source")
CUT_COLUMNS = ("from", "to", "value", "operation", "module", "shape", "-bytes", "source")
MEMORY = ("peak", "limit")


def stages_table(page: Page) -> Iterator[str]:
    """A row per stage with its costs and its peak memory, and one for the whole model."""
    view, memory = page.view, page.memory
    columns = [*NUMBERS, *(MEMORY if memory else ())]
    yield '<div class="wide"><table id="stages">'
    yield head(("stage", "rank", "device", "modules", *(f"-{name}" for name in columns)))
    for index, stage in enumerate(view.stages):
        texts = [str(index), str(stage.rank), page.device(stage.rank) or "-", modules_line(view, index, limit=12)]
        numbers = [*stage_numbers(stage), *(_peak(page, index) if memory else ())]
        yield f"<tr>{cells(texts)}{cells(numbers, 'number')}</tr>"
    blank = [""] * (len(columns) - len(NUMBERS))
    yield f'<tfoot><tr><td colspan="4">all</td>{cells([*totals(view), *blank], "number")}</tr></tfoot></table></div>'
    for note in replica_notes(view.plan):
        yield f'<p class="hint">{xml(note)}.</p>'
    for tied in view.plan.tied_by_model:
        stages = ", ".join(map(str, tied.stages))
        yield f'<p class="hint"><code>{xml(tied.parameter)}</code> is tied: stages {stages} hold it.</p>'


def _peak(page: Page, stage: int) -> tuple[str, str]:
    assert page.memory is not None
    limit = page.limit(page.view.stages[stage].rank)
    return bytes_text(page.memory.stages[stage].total), "-" if limit is None else bytes_text(limit)


def cuts_table(view: StageGraph) -> Iterator[str]:
    """A row per value and cut."""
    yield '<div class="wide"><table id="cuts">'
    yield head(CUT_COLUMNS)
    for cut in view.cuts:
        for value in cut.values:
            node = view.node(value)
            ends = [f"stage {cut.source}", f"stage {cut.target}"]
            words = [node.name, node.op, node.path or "(model)", *_specs(view, value)]
            yield f"<tr>{cells(ends, 'name')}{_codes(words)}{cells([bytes_text(node.nbytes)], 'number')}"
            yield f"{_codes([node.source])}</tr>"
    yield "</table></div>"


def nodes_folds(view: StageGraph) -> Iterator[str]:
    """All nodes, in a fold per stage, and in it a fold per module."""
    for index, stage in enumerate(view.stages):
        facts = " · ".join(stage_lines(view, index))
        yield f'<details class="stage"><summary><b>{xml(stage_name(view, index))}</b>'
        yield f'<span class="soft">{xml(facts)}</span></summary>'
        if start := (*stage.inputs, *stage.rematerialized):
            title = "<b>inputs and rematerialized nodes</b>"
            yield _fold(title, f"{plural(len(start), 'node')}, never sent", view, start)
        for position in stage.modules:
            module = view.modules[position]
            time = f"forward {seconds_text(module.cost.forward)}, backward {seconds_text(module.cost.backward)}"
            title = f"<b>{xml(module.label)}</b><code>{xml(module_path(view, position))}</code>"
            yield _fold(title, f"{time} · {plural(len(module.nodes), 'node')}", view, module.nodes)
        yield "</details>"


def _fold(title: str, facts: str, view: StageGraph, nodes: Sequence[int]) -> str:
    rows = "\n".join(_node(view, index) for index in nodes)
    summary = f'<summary>{title}<span class="soft">{xml(facts)}</span></summary>'
    return f'<details>{summary}<div class="wide"><table>{head(NODE_COLUMNS)}{rows}</table></div></details>'


def _node(view: StageGraph, index: int) -> str:
    node, cost = view.node(index), view.costed.costs[index]
    numbers = [bytes_text(node.nbytes), seconds_text(cost.forward), seconds_text(cost.backward)]
    words = _codes([node.name, node.op, *_specs(view, index)])
    numbers.append(bytes_text(cost.saved_bytes))
    return f"<tr>{words}{cells(numbers, 'number')}{_codes([', '.join(node.parameters), node.source])}</tr>"


def _specs(view: StageGraph, index: int) -> list[str]:
    return [names_text([str(spec) for spec in view.node(index).outputs])]


def head(columns: Iterable[str]) -> str:
    """A row of column names. A name that starts with a dash is of a column of numbers."""
    names = (f'<th class="number">{name[1:]}</th>' if name[0] == "-" else f"<th>{name}</th>" for name in columns)
    return f"<thead><tr>{''.join(names)}</tr></thead>"


def cells(texts: Iterable[str], kind: str = "") -> str:
    """Cells of a row."""
    attribute = f' class="{kind}"' if kind else ""
    return "".join(f"<td{attribute}>{xml(text)}</td>" for text in texts)


def _codes(texts: Iterable[str]) -> str:
    return "".join(f"<td><code>{xml(text)}</code></td>" for text in texts)
