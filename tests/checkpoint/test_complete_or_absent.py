"""A checkpoint is complete or absent, whatever happens while it is written."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from resumed import Net, begun, on
from torch import nn

import pipecompile
from pipecompile.checkpoint import files


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Writing waits for this."""
    event, write = threading.Event(), files.FileSystemWriter.write_data

    def waits(*args: Any) -> Any:
        assert event.wait(60)
        return write(*args)

    monkeypatch.setattr(files.FileSystemWriter, "write_data", waits)
    return event


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Nothing can be written."""

    def fails(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.FileSystemWriter, "write_data", fails)
    return monkeypatch


def names(folder: Path) -> list[str]:
    return sorted(each.name for each in folder.iterdir())


def test_the_state_is_that_of_the_call_although_it_is_written_later(tmp_path: Path, held: threading.Event) -> None:
    training = begun(**on(2)).run(1)
    weights, extra = training.weights, {"list": [1]}
    saving = pipecompile.save(tmp_path / "a", training.pipe, training.optimizer, extra=extra, asynchronous=True)
    state = {k: v["exp_avg"].clone() for k, v in training.optimizer.state.items()}
    extra["list"].append(2)
    training.run(2)
    assert not saving.done()
    assert pipecompile.latest(tmp_path) is None
    held.set()
    assert saving.wait() == tmp_path / "a"
    assert saving.done()
    other = begun(seed=1)
    assert pipecompile.load(tmp_path / "a", other.pipe, other.optimizer) == {"list": [1]}
    assert all(torch.equal(value, weights[name]) for name, value in other.weights.items())
    assert len(state) > 10
    loaded = [value["exp_avg"] for value in other.optimizer.state.values()]
    assert all(torch.equal(one, two) for one, two in zip(state.values(), loaded, strict=True))


def test_a_relative_path_is_that_of_the_call(
    tmp_path: Path, held: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = begun(**on(2)).run(1)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    saving = pipecompile.save("step_1", training.pipe, asynchronous=True)
    monkeypatch.chdir(tmp_path / "elsewhere")
    held.set()
    assert saving.wait() == tmp_path / "step_1"
    assert pipecompile.latest(tmp_path) == tmp_path / "step_1"
    assert names(tmp_path / "elsewhere") == []


def test_the_next_save_and_close_wait_for_the_last_one(tmp_path: Path, held: threading.Event) -> None:
    training = begun(**on(2)).run(1)
    training.save(tmp_path / "step_1", asynchronous=True)
    threading.Timer(0.2, held.set).start()
    training.save(tmp_path / "step_2", asynchronous=True)
    assert pipecompile.latest(tmp_path) is not None
    training.pipe.pipeline.close()
    assert names(tmp_path) == ["step_1", "step_2"]


def test_an_error_in_the_background_is_raised_once(tmp_path: Path, full: pytest.MonkeyPatch) -> None:
    training = begun(**on(2)).run(1)
    training.save(tmp_path / "step_1", asynchronous=True)
    with pytest.raises(pipecompile.CheckpointError, match=r"OSError: .* No space left on device"):
        training.save(tmp_path / "step_2")
    failed = training.save(tmp_path / "step_3", asynchronous=True)
    with pytest.raises(pipecompile.CheckpointError, match="No space left on device"):
        failed.wait()
    training.save(tmp_path / "step_4", asynchronous=True)
    with pytest.raises(pipecompile.CheckpointError, match="No space left on device"):
        training.pipe.pipeline.close()
    assert names(tmp_path) == []
    full.undo()
    training.save(tmp_path / "step_5")
    assert names(tmp_path) == ["step_5"]


def test_an_error_of_the_script_is_not_hidden_by_one_of_the_background(
    tmp_path: Path, full: pytest.MonkeyPatch
) -> None:
    training = begun(**on(2)).run(1)

    def script() -> None:
        with training.pipe.pipeline:
            training.save(tmp_path / "step_1", asynchronous=True)
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        script()


def test_a_save_that_fails_leaves_nothing(tmp_path: Path, full: pytest.MonkeyPatch) -> None:
    with pytest.raises(pipecompile.CheckpointError, match=r"OSError: .* No space left on device"):
        pipecompile.save(tmp_path / "step_1", Net())
    assert names(tmp_path) == []


def test_the_largest_number_is_the_latest(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    assert pipecompile.latest(tmp_path / "absent") is None
    for name in ("step_9", "step_10", "last", "step_2"):
        pipecompile.save(tmp_path / name, model)
    (tmp_path / "step_99").mkdir()
    (tmp_path / ".step_77.0a.writing").mkdir()
    (tmp_path / "step_88").touch()
    assert pipecompile.latest(tmp_path) == tmp_path / "step_10"
    assert pipecompile.latest(str(tmp_path)) == tmp_path / "step_10"


def test_older_ones_are_removed(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    (tmp_path / ".step_3.0a.writing").mkdir(parents=True)  # of a process that was killed
    for step in (1, 2, 10):
        pipecompile.save(tmp_path / f"step_{step}", model)
    pipecompile.save(tmp_path / "epoch_1", model)
    pipecompile.save(tmp_path / "step_3", model, keep=2)
    assert names(tmp_path) == ["epoch_1", "step_10", "step_2", "step_3"]
    pipecompile.save(tmp_path / "step_11", model, keep=1)
    assert names(tmp_path) == ["epoch_1", "step_11"]


def test_of_two_that_write_one_folder_the_first_to_end_has_it(tmp_path: Path, held: threading.Event) -> None:
    one, two = (pipecompile.save(tmp_path / "step_1", nn.Linear(2, 2), asynchronous=True) for _ in range(2))
    held.set()
    ends = []
    for each in (one, two):
        try:
            ends.append(each.wait().name)
        except pipecompile.CheckpointError as error:
            ends.append(str(error))
    assert "step_1" in ends
    assert [end for end in ends if "was written by somebody else meanwhile" in end or "No such file" in end]
    assert names(tmp_path) == ["step_1"]


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    pipecompile.save(tmp_path, nn.Linear(2, 2))
    assert pipecompile.load(tmp_path, nn.Linear(2, 2)) == {}


def test_a_model_that_was_saved_can_go(tmp_path: Path) -> None:
    model = Net()
    pipecompile.save(tmp_path / "step_1", model, asynchronous=True).wait()
    pipecompile.save(tmp_path / "step_2", model, asynchronous=True)
    gone = weakref.ref(model)
    del model
    for thread in threading.enumerate():
        if thread.name.startswith("pipecompile writes"):
            thread.join()
    gc.collect()
    assert gone() is None
    assert names(tmp_path) == ["step_1", "step_2"]


SCRIPT = """
import sys, torch, pipecompile
from torch import nn
model, step = nn.Linear(500, 500), 0
print("ready", flush=True)
while step < int(sys.argv[2]):
    step += 1
    with torch.no_grad():
        model.weight.fill_(step)
    pipecompile.save(f"{sys.argv[1]}/step_{step}", model, extra={"step": step}, keep=2, asynchronous=step % 2 == 0)
"""


@pytest.mark.parametrize("after", [0.01, 0.1, 0.3])
def test_what_a_killed_process_leaves_is_complete(tmp_path: Path, after: float) -> None:
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path), "100000"], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    threading.Event().wait(after)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    found = [each for each in tmp_path.iterdir() if not each.name.startswith(".")]
    assert len(found) <= 4
    for each in found:
        model = nn.Linear(500, 500)
        step = pipecompile.load(each, model)["step"]
        assert each.name == f"step_{step}"
        assert (model.weight == step).all()


def test_a_script_that_ends_completes_what_it_writes(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path), "2"], check=True, capture_output=True)
    assert names(tmp_path) == ["step_1", "step_2"]
    assert os.listdir(tmp_path / "step_2")
