"""Report pages to look at, and what is in the HTML of one: its text, its tables, and the data of its figures."""

from __future__ import annotations

import html as html_text
import json
import re
from dataclasses import replace
from functools import cached_property
from html.parser import HTMLParser
from typing import Any

from costed import by_time

from pipecompile.ir.cluster import Cluster, Device
from pipecompile.ir.graph import CostedGraph
from pipecompile.ir.plan import Plan, stage_costs
from pipecompile.planning.training_spec import Workload
from pipecompile.render.memory_levels import memory_levels
from pipecompile.render.page import MEASURED, PREDICTED, Page
from pipecompile.render.stage_graph import stage_graph
from pipecompile.schedule import one_f_one_b
from pipecompile.schedule.simulator import simulate

GIB = 2**30


def page_of(costed: CostedGraph, stages: int, microbatches: int = 4, memory: int | None = None, **more: Any) -> Page:
    """A page of a plan by time, under 1F1B, with a measured step in which forwards take twice as long."""
    return page_of_plan(costed, by_time(costed, stages), microbatches, memory, **more)


def page_of_plan(
    costed: CostedGraph, plan: Plan, microbatches: int = 4, memory: int | None = None, **more: Any
) -> Page:
    cluster = Cluster(tuple(Device(f"cuda:{rank}", memory=memory) for rank in range(plan.num_ranks)))
    work = Workload(one_f_one_b, microbatches)
    program, costs = one_f_one_b(plan, microbatches), stage_costs(costed, plan)
    predicted = simulate(program, costs, cluster)
    slower = [replace(cost, forward=2 * cost.forward) for cost in costs]
    return Page(
        view=stage_graph(costed, plan),
        schedule="1f1b",
        microbatches=microbatches,
        cluster=cluster,
        timelines={PREDICTED: predicted, MEASURED: simulate(program, slower, cluster)},
        memory=work.memory(costed, plan, cluster),
        levels=memory_levels(costed, plan, program, predicted, work, cluster),
        **more,
    )


class Read(HTMLParser):
    """A page as a reader without scripts has it, and the documents that its scripts draw."""

    VOID = ("meta", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: dict[str, list[str]] = {}
        self.loads: list[str] = []
        self.topics: dict[str, str] = {}
        self.text, self.code = "", []
        self.details = 0
        self._open: list[str] = []
        self._table = self._topic = ""
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attributes}
        self.loads += [v for name, v in values.items() if name in ("src", "href") or name.startswith("on")]
        self.details += tag == "details"
        if tag == "details":
            kind, _, self._topic = values.get("class", "").partition(" ")
            self._topic = self._topic if kind == "topic" else ""
        if tag == "table":
            self._table = values.get("id", "nodes")
        if tag == "tr":
            self.rows.setdefault(self._table, []).append("")
        if tag == "script":
            self.code.append("")
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "script" in self._open:
            self.code[-1] += data
        elif "style" not in self._open:
            self.text += data + " "
        if "tr" in self._open:
            self.rows[self._table][-1] += data + " "
        if self._topic and "li" in self._open:
            self.topics[self._topic] = self.topics.get(self._topic, "") + data + "\n"

    @cached_property
    def document(self) -> Document:
        """The figures: bokeh's document, as its script reads it."""
        (literal,) = (m for code in self.code for m in re.findall(r"const docs_json = '(.*)';\n", code))
        (document,) = json.loads(html_text.unescape(literal.replace("\\'", "'").replace("\\\\", "\\"))).values()
        return Document(document["roots"])

    def columns(self, figure: str, name: str) -> list[list[Any]]:
        """The columns with this name of what a figure draws."""
        return [it[name] for it in self.document.drawn(figure) if name in it]


class Document:
    """The models of a document, each of which is defined where it occurs first, and referred to by its id."""

    def __init__(self, roots: list[Any]) -> None:
        self._defined: dict[str, dict[str, Any]] = {}
        self._define(roots)
        self.figures = {self.of(root)["name"]: self.of(root) for root in roots}

    def _define(self, tree: Any) -> None:
        if isinstance(tree, dict):
            if tree.get("type") == "object":
                self._defined[tree["id"]] = tree
            tree = list(tree.values())
        for each in tree if isinstance(tree, list) else ():
            self._define(each)

    def of(self, model: dict[str, Any]) -> dict[str, Any]:
        """The attributes of a model."""
        attributes: dict[str, Any] = self._defined[model["id"]].get("attributes", {})
        return attributes

    def kind(self, model: dict[str, Any]) -> str:
        return str(self._defined[model["id"]]["name"])

    def drawn(self, figure: str) -> list[dict[str, Any]]:
        """The columns of the data source of each renderer."""
        renderers = map(self.of, self.figures[figure]["renderers"])
        return [dict(self.of(renderer["data_source"])["data"]["entries"]) for renderer in renderers]

    def glyphs(self, figure: str) -> list[dict[str, Any]]:
        return [self.of(self.of(renderer)["glyph"]) for renderer in self.figures[figure]["renderers"]]

    def tools(self, figure: str) -> dict[str, dict[str, Any]]:
        """The tools by kind; of several hovers the last."""
        tools = self.of(self.figures[figure]["toolbar"])["tools"]
        return {self.kind(tool): self.of(tool) for tool in tools}
