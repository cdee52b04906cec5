"""What a pipeline writes to a report page and shows in a notebook, from a model with a part that is kept whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from report_pages import Read
from torch import Tensor, nn

import pipecompile
from pipecompile.errors import InputError, PipecompileError
from pipecompile.render.page import MEASURED, PREDICTED

NAME = "<script>hacked()</script>"
FILE = Path(__file__).name


class Odd(nn.Module):
    """Runs in numpy, so it is kept whole."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + torch.from_numpy(x.detach().numpy() * 0.5)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({NAME: nn.Linear(8, 8), "odd": Odd(), "last": nn.Linear(8, 8)})
        self.scale = 2.0

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers.values():
            x = layer(x) * self.scale
        return x.square().mean()


class Rich(Net):
    def _repr_html_(self) -> str:
        return "<b>mine</b>"


def piped(model: nn.Module) -> nn.Module:
    return pipecompile.compile(model, ["cpu"] * 2, microbatches=2, costs="count")


@pytest.fixture(scope="module")
def pipe() -> nn.Module:
    pipe = piped(Net())
    pipe(torch.ones(4, 8)).backward()
    return pipe


def test_a_report_page_has_plan_times_and_all_lines_of_the_report(pipe, tmp_path):
    pipe.pipeline.save_report(tmp_path / "report.html")
    read = Read((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "Net in 2 pipeline stages, 1f1b" in read.text
    assert "2x cpu" in read.text
    assert set(read.document.figures) == {PREDICTED, MEASURED, "memory", "graph"}
    cells = " ".join(read.columns(MEASURED, "words")[-1])
    assert all(f"{stage}{kind}{k}: " in cells for stage in (0, 1) for kind in "FB" for k in (0, 1))
    report = pipe.pipeline.report
    for topic, lines in report.said.items():
        assert read.topics[topic].rstrip("\n").split("\n") == [part for line in lines for part in line.split("\n")]
    assert "guards" in read.topics
    assert "window" not in read.topics


def test_a_guard_names_the_argument_whose_size_it_asks():
    class Long(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = self.layers[NAME](x) if x.shape[1] < 100 else x
            return self.layers["last"](x).square().mean()

    pipe = piped(Long())
    pipe(torch.ones(4, 6, 8)).backward()
    sizes = [line for line in pipe.pipeline.report.guards if "100" in line]
    assert sizes
    assert all("is dimension 1 of 'x'" in line for line in sizes)


def test_a_leaf_is_named_with_its_line(pipe):
    (line,) = pipe.pipeline.report.leaves
    assert line.startswith("module 'layers.odd' is kept whole in one stage: 1 call, first from ")
    assert f"{FILE}:" in line


def test_the_name_of_a_module_is_no_script(pipe, tmp_path):
    pipe.pipeline.save_report(tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    shown = [text, pipe._repr_html_(), pipe.pipeline.report._repr_html_(), pipe.pipeline.plan._repr_html_()]
    assert all("<script>hacked" not in each for each in shown)
    assert "hacked()" in Read(text).text


def test_a_call_without_gradients_has_no_memory_of_training(tmp_path):
    pipe = piped(Net())
    with torch.no_grad():
        pipe(torch.ones(4, 8))
    pipe.pipeline.save_report(str(tmp_path / "report.html"))
    read = Read((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert set(read.document.figures) == {PREDICTED, MEASURED, "graph"}
    assert "B0" not in " ".join(text for words in read.columns(MEASURED, "words") for text in words)
    assert "measured forward" in read.text
    assert "measured step" not in read.text


def test_a_loss_of_the_caller_leaves_the_backward_alone(tmp_path):
    class Body(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.layers["last"](self.layers[NAME](x).tanh())

    pipe = piped(Body())
    pipe(torch.ones(4, 8)).square().mean().backward()
    pipe.pipeline.save_report(tmp_path / "report.html")
    read = Read((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert {"memory", MEASURED} <= read.document.figures.keys()
    assert "predicted backward" in read.text
    assert "F0" not in " ".join(text for words in read.columns(MEASURED, "words") for text in words)


def test_before_a_capture_there_is_no_page_but_a_notebook_shows_the_pipeline(tmp_path):
    pipe = piped(Net())
    with pytest.raises(PipecompileError, match="the model has not been captured yet"):
        pipe.pipeline.save_report(tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()
    assert "captured and planned at the first call" in pipe._repr_html_()
    assert "devices=(cpu, cpu), not captured yet)" in pipe._repr_html_()
    pipe.pipeline.prepare(torch.ones(4, 8))
    assert "measured step" not in pipe._repr_html_()
    assert "predicted step" in pipe._repr_html_()


def test_a_file_that_cannot_be_written_is_an_error(pipe, tmp_path):
    with pytest.raises(InputError, match="cannot write"):
        pipe.pipeline.save_report(tmp_path)


def test_a_notebook_shows_stages_and_steps_small_and_without_scripts(pipe):
    text = pipe._repr_html_()
    assert text == pipe.pipeline._repr_html_()
    assert "Net in 2 pipeline stages, 1f1b" in text
    assert text.count("<tr>") == 3
    assert "predicted step" in text
    assert "measured step" in text
    assert len(text) < 8000
    for each in (text, pipe.pipeline.report._repr_html_(), pipe.pipeline.plan._repr_html_()):
        assert Read(each).code == Read(each).loads == []
        assert "#" not in each.replace("&#", "")  # no color of its own, so that it suits light and dark
    assert "Leaves" in pipe.pipeline.report._repr_html_()
    assert "2 stages on 2 ranks" in pipe.pipeline.plan._repr_html_()


def test_a_model_with_a_display_of_its_own_keeps_it():
    assert piped(Rich())._repr_html_() == "<b>mine</b>"
    assert not hasattr(Net, "_repr_html_")
