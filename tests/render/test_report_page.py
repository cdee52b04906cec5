"""The report page, read as HTML without a browser: it is complete, and no name of a model becomes a tag or a script."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from itertools import pairwise

import pytest
from costed import Builder, gpt2, unet
from long import some
from report_pages import GIB, Read, page_of, page_of_plan

from pipecompile import Report
from pipecompile.errors import InputError
from pipecompile.ir.instruction import Recv, Send
from pipecompile.ir.plan import Plan, with_replicas
from pipecompile.ir.timeline import Timeline
from pipecompile.ir.units import bytes_text
from pipecompile.render.graph_figure import boxes_of, paths_of
from pipecompile.render.html import NOT_MEASURED, html, write
from pipecompile.render.notebook import page_html, topics_html
from pipecompile.render.page import MEASURED, PREDICTED, Page
from pipecompile.render.time_axis import TimeAxis
from pipecompile.render.topics import TOPICS

HOSTILE = (
    "</script><script>window.hacked = 1</script>\"&]]>\\ \x00`--><!-- '; 😀 <img src=x onerror=window.hacked=1> @{kind}"
)
SEEN = HOSTILE.replace("\x00", "�")


@pytest.fixture(scope="module")
def page() -> Page:
    topics = {"guards": ["s0 <= 1024 = True"], "warnings": ["look at model.py:7"], "timing": ["1 s"]}
    return page_of(gpt2(), 4, 8, memory=2 * GIB, model="GPT2LMHeadModel", topics=topics)


@pytest.fixture(scope="module")
def text(page: Page) -> str:
    return html(page)


@pytest.fixture(scope="module")
def read(text: str) -> Read:
    return Read(text)


@pytest.fixture(scope="module")
def hostile() -> Read:
    return Read(html(hostile_page()))


def hostile_page() -> Page:
    b = Builder()
    x = b.input(HOSTILE, 2, 3)
    b.path, b.source = f"{HOSTILE}.a", HOSTILE
    x = b.call(HOSTILE, [x], 2, 3, weights={HOSTILE: (3, 3)})
    b.path = f"{HOSTILE}.b"
    costed = b.costed([b.call(HOSTILE, [x], 2, 3, weights={HOSTILE: (3, 3)})])
    page = page_of_plan(costed, Plan.of(costed.graph, [0, 0, 1]), model=HOSTILE)
    devices = tuple(replace(device, name=HOSTILE) for device in page.cluster.devices)
    topics = {"guards": [HOSTILE], HOSTILE: [HOSTILE]}
    return replace(page, schedule=HOSTILE, topics=topics, cluster=replace(page.cluster, devices=devices))


# What it says


def test_the_head_names_model_devices_schedule_and_steps(page, read):
    for words in ("GPT2LMHeadModel in 4 pipeline stages, 1f1b", "cuda:0, cuda:1, cuda:2, cuda:3", "124 M"):
        assert words in read.text
    assert f"predicted step {page.steps[PREDICTED]}" in " ".join(read.text.split())
    assert f"measured step {page.steps[MEASURED]}" in " ".join(read.text.split())
    assert page.steps[PREDICTED] != page.steps[MEASURED]
    assert "counted, not measured" in read.text


@pytest.mark.parametrize("name", some(["replicas", "gpt2", "unet"]))
def test_every_stage_every_crossing_value_and_every_node_is_listed(name):
    costed = unet() if name == "unet" else gpt2(layers=3)
    page = page_of(costed, 4)
    if name == "replicas":
        replica_of = with_replicas((1, 2, 1, 3))
        first = sorted(set(replica_of))
        stage_of = [None if stage is None else first[stage] for stage in page.view.plan.stage_of]
        page = page_of_plan(costed, Plan.of(costed.graph, stage_of, replica_of=replica_of))
    view, read = page.view, Read(html(page))
    assert len(read.rows["stages"]) == len(view.stages) + 2
    crossing = [value for channel in view.cuts for value in channel.values]
    assert len(read.rows["cuts"]) == len(crossing) + 1
    for value, row in zip(crossing, read.rows["cuts"][1:], strict=True):
        node = view.node(value)
        assert node.name in row
        assert str(node.outputs[0]) in row
        assert node.source in row
    nodes = "".join(read.rows["nodes"])
    assert all(f"{node.name} " in nodes for node in costed.graph.nodes)
    starts = sum(1 for stage in view.stages if stage.inputs or stage.rematerialized)
    assert read.details == len(view.stages) + len(view.modules) + starts
    assert all(note in read.text for note in (["stages 1, 2 are replicas"] if name == "replicas" else []))


def test_topics_are_named_in_the_order_of_importance(page, read):
    assert list(read.topics) == ["warnings", "guards", "timing"]
    assert read.topics["warnings"] == "look at model.py:7\n"
    others = Read(html(Page(view=page.view, topics={"mine": ["x"], "guards": [], "plan": ["y"]})))
    assert others.topics == {"plan": "y\n", "mine": "x\n"}


def test_a_plan_that_no_call_has_run_says_so(page):
    read = Read(html(replace(page, timelines={PREDICTED: page.timelines[PREDICTED]})))
    assert NOT_MEASURED in read.text
    assert "measured step" not in read.text
    assert len(read.document.figures) == 3


def test_a_process_that_measures_one_rank_says_so(page):
    measured = page.timelines[MEASURED]
    mine = replace(measured, spans=tuple(span for span in measured.spans if span.rank == 1))
    steps = replace(page, timelines={**page.timelines, MEASURED: mine}).steps
    assert steps[MEASURED].endswith(" on rank 1 of 4")
    assert "bubble" in steps[PREDICTED]


def test_a_stage_graph_alone_is_a_page(page):
    read = Read(html(Page(view=page.view)))
    assert "4 pipeline stages" in read.text
    assert len(read.document.figures) == 1
    assert "peak" not in "".join(read.rows["stages"])


# Figures


def computations(timeline: Timeline) -> list[str]:
    done = (span for span in timeline.spans if span.seconds > 0 and not isinstance(span.instruction, Send | Recv))
    return sorted(str(span.instruction) for span in done)


@pytest.mark.parametrize("name", [PREDICTED, MEASURED])
def test_each_computation_is_a_cell_at_its_time(page, read, name):
    timeline = page.timelines[name]
    cells, transfers = [], []
    for words in read.columns(name, "words"):
        (transfers if words and ">" in words[0] else cells).extend(words)
    assert sorted(each.partition(":")[0] for each in cells) == computations(timeline)
    sent = [str(span.instruction) for span in timeline.spans if isinstance(span.instruction, Send)]
    assert sorted(each.partition(":")[0] for each in transfers) == sorted(sent)
    (left,), (right,) = read.columns(name, "left"), read.columns(name, "right")
    axis = TimeAxis.of(max(each.makespan for each in page.timelines.values()))
    ends = {str(span.instruction): span for span in timeline.spans}
    for start, end, words in zip(left, right, cells, strict=True):
        span = ends[words.partition(":")[0]]
        assert (start, end) == (pytest.approx(span.start * axis.factor), pytest.approx(span.end * axis.factor))


def test_both_timelines_zoom_together(read):
    ranges = {name: figure["x_range"]["id"] for name, figure in read.document.figures.items()}
    assert ranges[PREDICTED] == ranges[MEASURED]
    assert len(set(ranges.values())) == 3  # memory and graph have their own
    wanted = {"PanTool", "WheelZoomTool", "BoxZoomTool", "ZoomInTool", "ZoomOutTool", "ResetTool", "HoverTool"}
    assert all(wanted <= read.document.tools(name).keys() for name in ranges)


def test_timelines_of_other_lengths_have_axes_of_their_own(page, text):
    """On one axis, a step that took fifty times as long as predicted would hide the prediction."""
    slow = page.timelines[MEASURED]
    spans = tuple(replace(span, start=50 * span.start, end=50 * span.end) for span in slow.spans)
    other = replace(page, timelines={**page.timelines, MEASURED: replace(slow, spans=spans)})
    read = Read(html(other))
    ranges = {name: read.document.of(figure["x_range"]) for name, figure in read.document.figures.items()}
    for name, timeline in other.timelines.items():
        most = max(read.columns(name, "right")[0])
        assert most == pytest.approx(timeline.makespan * TimeAxis.of(timeline.makespan).factor)
        assert ranges[name]["end"] == pytest.approx(most)
    assert "each has a time axis of its own" in read.text
    assert "each has a time axis of its own" not in text


def test_memory_is_drawn_against_the_limit_of_each_device(page, read):
    words, colors = read.columns("memory", "words")[0], read.columns("memory", "color")[0]
    assert len(words) == sum(map(len, page.levels)) > 50
    peaks = [max(levels, key=lambda level: level.nbytes) for levels in page.levels]
    for rank, level in enumerate(peaks):
        assert f"rank {rank}: {bytes_text(level.nbytes)} of 2.0 GiB, {level.words}" in words
    beyond = {text.partition(":")[0] for text, color in zip(words, colors, strict=True) if color == "#d0312d"}
    assert beyond == {f"rank {rank}" for rank, level in enumerate(peaks) if level.nbytes > 2 * GIB} == {"rank 0"}
    assert "The dashed line is the limit" in read.text
    assert "dashed" in str(read.document.glyphs("memory")[-1]["line_dash"])


@pytest.mark.parametrize(("memory", "words"), [(None, "no known limit"), (64 * GIB, "No rank comes near the limit")])
def test_memory_that_is_far_from_its_limit_fills_the_row(memory, words):
    page = page_of(unet(), 4, memory=memory)
    read = Read(html(page))
    assert words in read.text
    tops = read.columns("memory", "top")[0]
    assert min(top % 1 if top > 0 else top for top in tops) == pytest.approx(-0.4)  # the largest peak


def test_every_module_is_a_box_and_every_edge_a_line(page, read):
    view = page.view
    (paths,) = read.columns("graph", "path")
    assert len(paths) == len(view.modules)
    assert sum(map(len, read.columns("graph", "ends"))) == len(view.edges)
    said = "".join(text for values in read.columns("graph", "values") for text in values)
    assert all(view.node(value).name in said for edge in view.crossings for value in edge.values[:3])


@pytest.mark.parametrize("costed", [gpt2(), unet()], ids=["gpt2", "unet"])
@pytest.mark.parametrize("stages", [1, 4, 8])
def test_boxes_stand_apart_and_lines_go_from_box_to_box(costed, stages):
    view = page_of(costed, stages).view
    boxes, starts = boxes_of(view)
    drawn = [*boxes, *filter(None, starts)]
    assert all(0 <= box.left < box.right <= 1 + 1e-9 for box in drawn)
    in_rows = [sorted((b.left, b.right) for b in drawn if b.stage == stage) for stage in range(len(view.stages))]
    assert all(a[1] < b[0] for row in in_rows for a, b in pairwise(row))
    for edge, path in zip(view.edges, paths_of(view, boxes), strict=True):
        source, target = boxes[edge.source], boxes[edge.target]
        assert source.left < path[0][0] <= source.right
        assert target.left <= path[-1][0] < target.right
        assert int(path[0][1]) == source.stage
        assert int(path[-1][1]) == target.stage
        passed = [b for b in drawn if source.stage < b.stage < target.stage]
        through = [
            (x, y) for x, y in path for b in passed if b.left < x < b.right and b.stage + 0.14 < y < b.stage + 0.58
        ]
        assert through == []


# Names of a hostile model


def test_hostile_names_stay_text(read, hostile):
    assert len(hostile.code) == len(read.code)
    assert hostile.loads == []
    assert SEEN in hostile.rows["cuts"][1]
    assert SEEN in hostile.topics["guards"]
    assert hostile.text.count("window.hacked") > 10
    code = "".join(hostile.code)
    assert "window.hacked" in code
    assert not re.search(r"<(script|/script|img|!--)[^>]*hacked|<script>window", code)


def test_hostile_names_reach_the_figures_as_they_are(hostile):
    assert any(HOSTILE in path for column in hostile.columns("graph", "path") for path in column)
    tips = [hostile.document.tools(name)["HoverTool"]["tooltips"] for name in hostile.document.figures]
    assert len(tips) == 4
    assert not any("{safe}" in tip or "hacked" in tip for tip in tips)  # templates, whose values are escaped


def test_hostile_names_stay_text_in_a_notebook():
    page = hostile_page()
    for text in (page_html(page), topics_html(page.topics)):
        assert "<script" not in text
        assert "<img" not in text
        assert "window.hacked" in text
        Read(text)


# The file


def test_a_page_loads_nothing(text, read):
    assert read.loads == []
    assert not re.search(r"<(link|iframe|img|object|embed)\b", text.partition("<script")[0])
    assert "@import" not in text.partition("<script")[0]
    assert "http" not in text.partition("<script")[0]


def test_a_page_is_written_to_a_file(page, tmp_path):
    page = Page(view=page.view)
    write(page, tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    with pytest.raises(InputError, match=r"cannot write .*no.report.html: No such file or directory; give a path"):
        write(page, tmp_path / "no" / "report.html")


def test_without_bokeh_the_error_says_what_to_install(page, monkeypatch):
    for name in [name for name in sys.modules if name.startswith(("bokeh", "pipecompile.render.page_figures"))]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("figures", "page_figures", "graph_figure", "memory_figure", "time_axis", "timeline_figure"):
        monkeypatch.delitem(sys.modules, f"pipecompile.render.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "bokeh", None)
    with pytest.raises(
        InputError, match=r"needs bokeh, which draws its figures .*; pip install 'pipecompile\[report\]'"
    ):
        html(page)


def test_every_topic_of_a_report_has_a_title():
    assert set(TOPICS) == set(Report().to_dict())
