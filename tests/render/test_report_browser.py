"""The report page in a headless Chromium: it draws without an error or a request, wide and narrow, light and dark."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import chromium
import pytest
from chromium import Browser
from costed import gpt2, unet
from long import some
from report_pages import GIB, page_of
from test_report_page import hostile_page

from pipecompile.render.html import html
from pipecompile.render.page import Page

FOUND = chromium.find()
pytestmark = pytest.mark.skipif(FOUND is None, reason=f"none of {', '.join(chromium.NAMES)} is on PATH")
COLORS = {False: [255, 255, 255], True: [20, 24, 28]}

FIGURE = """
const figures = [...Bokeh.index.roots].filter(view => view.model.type == "Figure");
const views = Object.fromEntries(figures.map(view => [view.model.name, view]));
const place = (name, x, y) => {  // of a point of a figure, in the window
    const view = views[name];
    view.el.scrollIntoView({block: "center"});
    const box = view.canvas_view.el.getBoundingClientRect();
    return [box.x + view.frame.x_scale.compute(x), box.y + view.frame.y_scale.compute(y)];
};
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    assert FOUND is not None
    with chromium.started(FOUND, tmp_path_factory.mktemp("profile")) as it:
        yield it


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    topics = {"warnings": ["a" * 300], "guards": [f"/a/long/path/{'of/' * 60}model.py:7"]}
    drawn: dict[str, Page] = {
        "gpt2": page_of(gpt2(), 4, 8, memory=2 * GIB, model="GPT2LMHeadModel", topics=topics),
        "unet": page_of(unet(), 4, model="UNet"),
        "large": Page(view=page_of(gpt2(layers=218), 8).view),
        "hostile": hostile_page(),
    }
    for name, page in drawn.items():
        (folder / f"{name}.html").write_text(html(page), encoding="utf-8")
    return {name: folder / f"{name}.html" for name in drawn}


SIGHTS = [(name, *sight) for name in ("gpt2", "unet") for sight in ((500, True), (1600, False), (500, False))]


@pytest.mark.parametrize(
    ("name", "width", "dark"), [*some(SIGHTS), ("unet", 1600, True), ("large", 500, False), ("hostile", 500, True)]
)
def test_a_page_draws_without_an_error_a_request_or_a_horizontal_scroll(browser, pages, name, width, dark):
    browser.visit(pages[name], width, dark)
    assert browser.errors == []
    assert browser.requests == []
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.run("window.hacked") is None
    assert browser.run(PIXEL) == COLORS[dark]
    assert browser.run("getComputedStyle(document.body).backgroundColor") == f"rgb({', '.join(map(str, COLORS[dark]))})"


PIXEL = f"""(() => {{ {FIGURE}
    const data = views.graph.canvas_view.primary.ctx.getImageData(3, 3, 1, 1).data;
    return [...data].slice(0, 3);
}})()"""


def test_a_graph_of_10000_nodes_is_listed_in_a_few_megabytes(browser, pages):
    browser.visit(pages["large"], 1600)
    assert 10_000 < browser.run("document.querySelectorAll('details details tr').length") < 10_200
    assert pages["large"].stat().st_size < 8e6


@pytest.mark.parametrize("width", [500, 1600])
def test_labels_stand_in_their_boxes(browser, pages, width):
    browser.visit(pages["gpt2"], width)
    shown, over = browser.run(f"""(() => {{ {FIGURE}
        const context = document.createElement("canvas").getContext("2d");
        context.font = "10.5px Helvetica, Arial, 'Liberation Sans', sans-serif";
        let shown = 0;
        const over = [];
        for (const {{model}} of Object.values(views)) {{
            const scale = model.inner_width / (model.x_range.end - model.x_range.start);
            for (const {{data_source: {{data}}}} of model.renderers.filter(each => "full" in each.data_source.data)) {{
                data.text.forEach((text, i) => text.split("\\n").filter(Boolean).forEach(line => {{
                    shown += 1;
                    if (context.measureText(line).width > data.width[i] * scale) over.push(line);
                }}));
            }}
        }}
        return [shown, over];
    }})()""")
    assert over == []
    assert shown > 40


def test_a_pointed_cell_says_its_instruction_and_times(browser, pages):
    browser.visit(pages["unet"], 1600)
    assert tip_of(browser, "predicted", "2B1").startswith("2B1: backward of stage 2, microbatch 1; ")
    assert "duration" in tip_of(browser, "measured", "0F3")
    assert "during 3B0" in tip_of(browser, "memory", "during 3B0")


def test_a_hostile_name_is_text_in_a_tooltip(browser, pages):
    browser.visit(pages["hostile"], 1600)
    tip = tip_of(browser, "graph", "window.hacked", "path")
    assert "</script><script>window.hacked = 1</script>" in tip
    assert "<img src=x onerror=window.hacked=1> @{kind}" in tip
    assert browser.run("window.hacked") is None
    assert browser.errors == browser.requests == []


def tip_of(browser: Browser, figure: str, part: str, column: str = "words") -> str:
    """The tooltip over the middle of the first area of a figure with a part in a column."""
    x, y = browser.run(f"""(() => {{ {FIGURE}
        for (const {{data_source: {{data}}}} of views[{figure!r}].model.renderers) {{
            if (!("left" in data && {column!r} in data)) continue;
            const i = data[{column!r}].findIndex(each => each.includes({part!r}));
            const [x, y] = [(data.left[i] + data.right[i]) / 2, (data.top[i] + data.bottom[i]) / 2];
            if (i >= 0) return place({figure!r}, x, y);
        }}
    }})()""")
    browser.mouse("mouseMoved", x - 1, y)
    browser.mouse("mouseMoved", x, y)
    browser.run(chromium.DRAWN)
    return str(browser.run(TIP))


TIP = """(() => {
    const inner = it => it.shadowRoot ? all(it.shadowRoot) : [];
    const all = root => [...root.querySelectorAll("*")].flatMap(it => [it, ...inner(it)]);
    const shown = all(document).filter(it => it.matches(".bk-Tooltip") && it.getBoundingClientRect().width > 0);
    const parts = shown.flatMap(it => [...it.shadowRoot.children]).filter(it => !it.matches("style, link"));
    return parts.map(it => it.innerText).join("").trim();
})()"""


def test_zooming_one_timeline_zooms_the_other_and_shows_more_labels(browser, pages):
    browser.visit(pages["unet"], 500)
    state = f"""(() => {{ {FIGURE}
        return ["predicted", "measured"].map(name => {{
            const {{model}} = views[name];
            const labels = model.renderers.find(each => "full" in each.data_source.data).data_source.data.text;
            return [model.x_range.start, model.x_range.end, labels.filter(Boolean).length];
        }});
    }})()"""
    before = browser.run(state)
    x, y = browser.run(f"""(() => {{ {FIGURE}
        const {{start, end}} = views.predicted.model.x_range;
        return place("predicted", (start + end) / 3, 1);
    }})()""")
    for _ in range(4):
        browser.mouse("mouseWheel", x, y, deltaX=0, deltaY=-240, modifiers=2)
    browser.run(chromium.DRAWN)
    after = browser.run(state)
    assert before[0][:2] == before[1][:2] != after[0][:2] == after[1][:2]
    assert after[0][1] - after[0][0] < 0.8 * (before[0][1] - before[0][0])
    assert after[0][2] > before[0][2]


def test_a_wheel_without_ctrl_scrolls_the_page(browser, pages):
    browser.visit(pages["unet"], 1600)
    x, y = browser.run(f"(() => {{ {FIGURE} scrollTo(0, 0); return place('predicted', 1, 1); }})()")
    range_now = f"(() => {{ {FIGURE} return views.predicted.model.x_range.end; }})()"
    before = browser.run(range_now)
    browser.mouse("mouseWheel", x, y, deltaX=0, deltaY=200)
    browser.run(chromium.DRAWN)
    assert browser.run(range_now) == before


def test_an_error_a_request_or_a_wide_page_would_show(browser, tmp_path):
    page = page_of(unet(), 4)
    text = html(replace(page, timelines={})).replace(
        "<body>",
        "<body><img src='http://127.0.0.1:9/x.png'><div style='width:900px'>x</div><script>nothing()</script>",
        1,
    )
    (tmp_path / "bad.html").write_text(text, encoding="utf-8")
    browser.visit(tmp_path / "bad.html", 500)
    assert browser.requests == ["http://127.0.0.1:9/x.png"]
    assert any("nothing is not defined" in each for each in browser.errors)
    assert browser.run("document.documentElement.scrollWidth") > 500
