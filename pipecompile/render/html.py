"""The stage graph as one self-contained page: the picture, the stages, the values that cross each cut, and all nodes.

The page is plain HTML and readable without scripts. The script adds hover cards and shows one stage at a time. The page
loads nothing, so it can be mailed, archived, or opened offline.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from importlib import resources

from pipecompile.ir.units import bytes_text, names_text, plural, seconds_text
from pipecompile.render.escape import xml
from pipecompile.render.labels import module_path, modules_line, replica_notes, stage_lines, stage_name
from pipecompile.render.stage_graph import StageGraph
from pipecompile.render.svg import svg
from pipecompile.render.table import NUMBERS, stage_numbers, totals

NODE_COLUMNS = ("node", "operation", "outputs", "-bytes", "-forward", "-backward", "-saved", "parameters", "source")
CUT_COLUMNS = ("from", "to", "value", "operation", "module", "shape", "-bytes", "source")
HINT = "Point at a module or a wire for its shapes and source lines; click a stage for its nodes."


def html(view: StageGraph) -> str:
    """A page with all information about a plan."""
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{len(view.stages)} stages · pipecompile</title>",
            f"<style>{_asset('page.css')}</style>\n</head>\n<body>",
            _header(view),
            f'<div class="picture">{svg(view)}</div>',
            f'<p class="hint">{HINT}</p>',
            *_stages(view),
            *_cuts(view),
            *_details(view),
            f'<div id="tip" hidden></div>\n<script>{_asset("page.js")}</script>\n</body>\n</html>\n',
        ]
    )


def _asset(name: str) -> str:
    return resources.files("pipecompile.render").joinpath(name).read_text(encoding="utf-8")


def _header(view: StageGraph) -> str:
    facts = [
        plural(len(view.costed.graph), "node"),
        f"{totals(view)[0]} parameters",
        f"{bytes_text(sum(cut.nbytes for cut in view.cuts))} across the cuts",
        f"bottleneck / mean {view.balance:.2f}",
        f"one microbatch, {view.costed.origin}",
    ]
    return f"<header><h1>{len(view.stages)} pipeline stages</h1><p>{xml(' · '.join(facts))}</p></header>"


def _stages(view: StageGraph) -> Iterator[str]:
    yield '<h2>Stages</h2><div class="wide"><table id="stages">'
    yield _head(("stage", "rank", "modules", *(f"-{name}" for name in NUMBERS)))
    for index, stage in enumerate(view.stages):
        cells = [str(index), str(stage.rank), modules_line(view, index, limit=12)]
        yield f'<tr data-stage="{index}">{_cells(cells)}{_cells(stage_numbers(stage), "number")}</tr>'
    yield f'<tfoot><tr><td colspan="3">all</td>{_cells(totals(view), "number")}</tr></tfoot></table></div>'
    for note in replica_notes(view.plan):
        yield f'<p class="hint">{xml(note)}.</p>'
    for tied in view.plan.tied_by_model:
        stages = ", ".join(map(str, tied.stages))
        yield f'<p class="hint"><code>{xml(tied.parameter)}</code> is tied: stages {stages} hold it.</p>'


def _cuts(view: StageGraph) -> Iterator[str]:
    yield '<h2>What crosses each cut</h2><div class="wide"><table id="cuts">'
    yield _head(CUT_COLUMNS)
    for cut in view.cuts:
        for value in cut.values:
            node = view.node(value)
            ends = [f"stage {cut.source}", f"stage {cut.target}"]
            words = [node.name, node.op, node.path or "(model)", *_specs(view, value)]
            tail = f"{_cells([bytes_text(node.nbytes)], 'number')}{_cells([node.source])}"
            yield f"<tr>{_cells(ends)}{_codes(words)}{tail}</tr>"
    yield "</table></div>"


def _details(view: StageGraph) -> Iterator[str]:
    """All nodes of all stages, with a section per stage and a fold per module."""
    buttons = (f'<button data-stage="{s}">{xml(stage_name(view, s))}</button>' for s in range(len(view.stages)))
    yield f'<div class="tabs" role="tablist">{"".join(buttons)}</div>'
    for index, stage in enumerate(view.stages):
        facts = xml(" · ".join(stage_lines(view, index)))
        yield f'<section class="detail" data-stage="{index}"><h2>{xml(stage_name(view, index))}</h2>'
        yield f'<p class="hint">{facts}</p>'
        if start := (*stage.inputs, *stage.rematerialized):
            head = "<b>inputs and rematerialized nodes</b>"
            yield _fold(head, f"{_count(start)}, never sent", view, start)
        for position in stage.modules:
            yield _module(view, position)
        yield "</section>"


def _module(view: StageGraph, position: int) -> str:
    module = view.modules[position]
    time = f"forward {seconds_text(module.cost.forward)}, backward {seconds_text(module.cost.backward)}"
    head = f"<b>{xml(module.label)}</b><code>{xml(module_path(view, position))}</code>"
    return _fold(head, f"{time} · {_count(module.nodes)}", view, module.nodes, f' id="module-{position}"')


def _fold(head: str, facts: str, view: StageGraph, nodes: Sequence[int], attribute: str = "") -> str:
    rows = "\n".join(_node(view, index) for index in nodes)
    summary = f'<summary>{head}<span class="soft">{xml(facts)}</span></summary>'
    table = f'<div class="wide"><table>{_head(NODE_COLUMNS)}{rows}</table></div>'
    return f"<details{attribute}>{summary}{table}</details>"


def _count(nodes: Sequence[int]) -> str:
    return plural(len(nodes), "node")


def _node(view: StageGraph, index: int) -> str:
    node, cost = view.node(index), view.costed.costs[index]
    numbers = [bytes_text(node.nbytes), seconds_text(cost.forward), seconds_text(cost.backward)]
    words = _codes([node.name, node.op, *_specs(view, index)])
    numbers.append(bytes_text(cost.saved_bytes))
    return f"<tr>{words}{_cells(numbers, 'number')}{_codes([', '.join(node.parameters), node.source])}</tr>"


def _specs(view: StageGraph, index: int) -> list[str]:
    return [names_text([str(spec) for spec in view.node(index).outputs])]


def _head(columns: Iterable[str]) -> str:
    """A row of column names. A name that starts with a dash is of a column of numbers."""
    cells = (f'<th class="number">{name[1:]}</th>' if name[0] == "-" else f"<th>{name}</th>" for name in columns)
    return f"<thead><tr>{''.join(cells)}</tr></thead>"


def _cells(texts: Iterable[str], kind: str = "") -> str:
    attribute = f' class="{kind}"' if kind else ""
    return "".join(f"<td{attribute}>{xml(text)}</td>" for text in texts)


def _codes(texts: Iterable[str]) -> str:
    return "".join(f"<td><code>{xml(text)}</code></td>" for text in texts)
